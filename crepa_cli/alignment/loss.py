"""The alignment loss of CREPA (arXiv 2506.09229, Eq. 6), with memory that does not grow with the clip.

With the hidden states h of one block, teacher features y, and the projector g (LayerNorm, then Linear):

    s(f, k) = mean over patches p of cos(g(h[f, p]), y[k, p])
    S(f)    = s(f, f) + sum over the neighbors k of f of exp(-|k - f| / tau) * s(f, k)
    loss    = - mean over clips of the sum over f of S(f)

With unit-length features Y, S(f) = mean over p of <P[f, p], (W Y)[f, p]> for the unit-length projections P and a banded
matrix W `[T, T]` of the neighbors' weights: one product, whatever the distance.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crepa_cli.alignment.grid import TokenGrid, coarser_grid, matching_frames
from crepa_cli.alignment.resampling import Constants, Resampling

CHUNK_TOKENS = 4096
"""Tokens processed at a time: large enough to keep a GPU busy, 25 MB for each float32 copy at width 1536."""


class Alignment(NamedTuple):
    """The alignment of one batch, as 0-d tensors.

    `loss` is unscaled and carries the gradient. The similarities carry none and lie within [-1, 1]: `similarity`
    weights each frame's neighbors as the loss does; `self_similarity` compares each frame with its own features only.
    """

    loss: Tensor
    similarity: Tensor
    self_similarity: Tensor


class Crepa(nn.Module):
    """Cross-frame Representation Alignment: aligns one block's hidden states with a frozen teacher's features.

    Args:
        hidden_size: width H of the block's hidden states.
        feature_size: width D of the teacher's features.
        adjacent_distance: frames f - d and f + d are the neighbors of frame f; 0 aligns each frame alone (REPA*).
        adjacent_tau: a neighbor at distance k has the weight exp(-k / tau).
        cumulative_neighbors: all frames within the distance are neighbors, not only those exactly at it.
        spatial_align: compare patch by patch; otherwise the mean over each frame's patches.
        normalize_by_frames: divide the loss by the number of frames.

    Attributes:
        projector: LayerNorm(H), then Linear(H, D), in float32. It is trained with the model and never exported.

    Raises:
        ValueError: for a negative distance or a tau that is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        feature_size: int,
        *,
        adjacent_distance: int = 1,
        adjacent_tau: float = 1.0,
        cumulative_neighbors: bool = False,
        spatial_align: bool = True,
        normalize_by_frames: bool = True,
    ) -> None:
        super().__init__()
        if adjacent_distance < 0 or not adjacent_tau > 0:
            raise ValueError(
                "adjacent_distance must be at least 0 and adjacent_tau above 0, "
                f"got {adjacent_distance} and {adjacent_tau}"
            )
        self.adjacent_distance = adjacent_distance
        self.adjacent_tau = adjacent_tau
        self.cumulative_neighbors = cumulative_neighbors
        self.spatial_align = spatial_align
        self.normalize_by_frames = normalize_by_frames
        norm = nn.LayerNorm(hidden_size, dtype=torch.float32)
        linear = nn.Linear(hidden_size, feature_size, dtype=torch.float32)
        self.projector = nn.Sequential(norm, linear)
        self._plans: dict[tuple[TokenGrid, TokenGrid, torch.device, torch.dtype], _Plan] = {}

    def forward(self, hidden: Tensor, features: Tensor, student_grid: TokenGrid, teacher_grid: TokenGrid) -> Alignment:
        """Compare hidden states with features at the positions given by their grids.

        Args:
            hidden: `[B, T, N, H]`, any floating dtype, tokens row-major on `student_grid`.
            features: `[B, T', N', D]`, any floating dtype, row-major on `teacher_grid`. They get no gradient.
            student_grid: grid of the hidden states, T frames of N tokens.
            teacher_grid: grid of the features, T' frames of N' tokens.

        Raises:
            TypeError: if `hidden` or `features` is not a tensor, or a grid is not a TokenGrid.
            ValueError: if a tensor's shape does not match its grid or the widths of the projector, or if the two have
                different numbers of clips.
        """
        _check_grid("student_grid", student_grid)
        _check_grid("teacher_grid", teacher_grid)
        norm, linear = cast(tuple[nn.LayerNorm, nn.Linear], tuple(self.projector))
        _check_shape("hidden", hidden, student_grid, norm.normalized_shape[0])
        _check_shape("features", features, teacher_grid, linear.out_features)
        if len(hidden) != len(features):
            raise ValueError(f"hidden has {len(hidden)} clips and features has {len(features)}")
        if not self.spatial_align:
            frames = matching_frames(teacher_grid.frames, student_grid.frames)
            features = pooled(features, frames, linear.weight.dtype)
            teacher_grid = TokenGrid(student_grid.frames, 1, 1)
        plan = self._plan(student_grid, teacher_grid, linear.weight)
        similarities, self_similarities = cast(
            tuple[Tensor, Tensor],
            _FrameSimilarities.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
                hidden, features, plan, norm.weight, norm.bias, linear.weight, linear.bias
            ),
        )
        loss = -similarities.sum(1).mean()
        if self.normalize_by_frames:
            loss = loss / student_grid.frames
        similarity = (similarities.detach() / plan.weights.sum(1)).mean()
        # Rounding can push a mean of cosines slightly above 1; thresholds must not see that.
        return Alignment(loss, similarity.clamp(-1, 1), self_similarities.mean().clamp(-1, 1))

    def _plan(self, student: TokenGrid, teacher: TokenGrid, weight: Tensor) -> _Plan:
        """The plan for two grids on the device and in the dtype of the projector, made once."""
        key = student, teacher, weight.device, weight.dtype
        if key not in self._plans:
            weights = neighbor_weights(
                student.frames, self.adjacent_distance, self.adjacent_tau, self.cumulative_neighbors
            ).to(weight)
            norm = cast(nn.LayerNorm, self.projector[0])
            self._plans[key] = _Plan.make(student, teacher, self.spatial_align, weights, norm.eps)
        return self._plans[key]


def neighbor_weights(frames: int, distance: int, tau: float, cumulative: bool) -> Tensor:
    """W, the weight of frame k in S(f): a banded float64 matrix `[T, T]` with ones on its diagonal.

    A neighbor outside the clip does not exist: its weight is dropped, not moved to the nearest frame.
    """
    offsets = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    neighbors = (offsets > 0) & ((offsets <= distance) if cumulative else (offsets == distance))
    return torch.eye(frames, dtype=torch.float64) + neighbors * torch.exp(-offsets.double() / tau)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast: cosines of vectors with a thousand elements need float32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def pooled(features: Tensor, frames: list[int], dtype: torch.dtype) -> Tensor:
    """The mean over the patches of the given frames, `[B, T', N', D]` to `[B, T, 1, D]`, one frame at a time."""
    return torch.stack([features[:, frame].to(dtype).mean(1, keepdim=True) for frame in frames], dim=1)


def check_tensor(name: str, value: object) -> None:
    """Raise a TypeError if an argument is not a tensor, such as features that were never computed."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_grid(name: str, grid: object) -> None:
    if not isinstance(grid, TokenGrid):
        raise TypeError(f"{name} must be a TokenGrid, got {type(grid).__name__}")


def _check_shape(name: str, tensor: Tensor, grid: TokenGrid, width: int) -> None:
    check_tensor(name, tensor)
    expected = (grid.frames, grid.tokens, width)
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {grid} and width {width} need [B, {expected}]")


class _Chunk(NamedTuple):
    """A part of one clip that fits in memory: some frames and some rows of the comparison grid."""

    clip: int
    frames: slice
    rows: slice


class _Plan(NamedTuple):
    """Everything about the comparison that is not a tensor of the batch."""

    student: Resampling
    teacher: Resampling
    teacher_frames: list[int]
    weights: Tensor
    patches: int
    spatial_align: bool
    norm_eps: float

    @classmethod
    def make(
        cls, student: TokenGrid, teacher: TokenGrid, spatial_align: bool, weights: Tensor, norm_eps: float
    ) -> _Plan:
        target = coarser_grid(student, teacher) if spatial_align else None
        constants = Constants(weights.device, weights.dtype)
        return cls(
            Resampling(student, target, constants),
            Resampling(teacher, target or teacher, constants),
            matching_frames(teacher.frames, student.frames),
            weights,
            target.tokens if target else 1,
            spatial_align,
            norm_eps,
        )

    def chunks(self, clips: int) -> list[_Chunk]:
        """Some rows of all frames, so that neighbors share a chunk; or some frames, if a frame is one pooled patch."""
        grid, frames = self.student.source, self.student.source.frames
        if self.spatial_align:
            rows = self.student.rows
            size = max(1, CHUNK_TOKENS // (frames * self.student.columns))
            parts = [(slice(0, frames), slice(at, min(at + size, rows))) for at in range(0, rows, size)]
        else:
            size = max(1, CHUNK_TOKENS // grid.tokens)
            parts = [(slice(at, min(at + size, frames)), slice(0, 1)) for at in range(0, frames, size)]
        return [_Chunk(clip, *part) for clip in range(clips) for part in parts]

    def hidden_of(self, hidden: Tensor, chunk: _Chunk) -> Tensor:
        """The view of hidden states that a chunk reads: `[T, rows, columns, H]`."""
        grid = self.student.source
        clip: Tensor = hidden[chunk.clip].unflatten(1, (grid.rows, grid.columns))
        return clip[chunk.frames, self.student.window(chunk.rows)]

    def targets(self, features: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """W Y and Y for a chunk's frames, `[T, N, D]` each, in the projector's dtype."""
        grid = self.teacher.source
        window = features[chunk.clip].unflatten(1, (grid.rows, grid.columns))[:, self.teacher.window(chunk.rows)]
        if self.teacher_frames != list(range(grid.frames)):
            window = window.index_select(0, self.teacher.constants.indices(self.teacher_frames))
        unit = F.normalize(self.teacher(window, chunk.rows, self.weights.dtype), dim=-1)
        return torch.tensordot(self.weights[chunk.frames], unit, dims=1), unit[chunk.frames]

    def project(self, hidden: Tensor, chunk: _Chunk, parameters: tuple[Tensor, ...]) -> Tensor:
        """Unit-length projections `[T, N, D]` of the hidden states of a chunk.

        Interpolation weights sum to 1, so interpolating before the Linear gives the same result as interpolating after
        it, and the Linear runs on the smaller of the two grids.
        """
        norm_weight, norm_bias, weight, bias = parameters
        normed = F.layer_norm(hidden.to(weight.dtype), norm_weight.shape, norm_weight, norm_bias, self.norm_eps)
        return F.normalize(F.linear(self.student(normed, chunk.rows, normed.dtype), weight, bias), dim=-1)


class _FrameSimilarities(torch.autograd.Function):
    """S(f) and s(f, f) of every frame, chunk by chunk; the backward recomputes each chunk.

    Only the inputs are kept between the two passes.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, features: Tensor, plan: _Plan, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        ctx.save_for_backward(hidden, features, *parameters)
        similarities = plan.weights.new_zeros(hidden.shape[:2])
        self_similarities = torch.zeros_like(similarities)
        with full_precision(hidden.device):
            for chunk in plan.chunks(len(hidden)):
                mixed, own = plan.targets(features, chunk)
                projections = plan.project(plan.hidden_of(hidden, chunk), chunk, parameters)
                at = chunk.clip, chunk.frames
                similarities[at] += (projections * mixed).sum((1, 2)) / plan.patches
                self_similarities[at] += (projections * own).sum((1, 2)) / plan.patches
        ctx.mark_non_differentiable(self_similarities)
        return similarities, self_similarities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, similarity_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        hidden, features, *parameters = ctx.saved_tensors
        hidden_gradient = torch.zeros_like(hidden)
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        with full_precision(hidden.device):
            for chunk in plan.chunks(len(hidden)):
                mixed, _ = plan.targets(features, chunk)
                leaves = [plan.hidden_of(hidden, chunk), *parameters]
                leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                with torch.enable_grad():
                    projections = plan.project(leaves[0], chunk, tuple(leaves[1:]))
                upstream = similarity_gradient[chunk.clip, chunk.frames, None, None] / plan.patches
                part, *rest = torch.autograd.grad(projections, leaves, upstream * mixed)
                plan.hidden_of(hidden_gradient, chunk).add_(part)
                for total, gradient in zip(gradients, rest, strict=True):
                    total.add_(gradient)
        return hidden_gradient, None, None, *gradients
