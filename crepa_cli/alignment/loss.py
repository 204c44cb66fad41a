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

from crepa_cli.alignment.grid import (
    Taps,
    TokenGrid,
    coarser_grid,
    interpolation_taps,
    matching_frames,
)

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
        weights = neighbor_weights(
            student_grid.frames, self.adjacent_distance, self.adjacent_tau, self.cumulative_neighbors
        ).to(hidden.device, linear.weight.dtype)
        if not self.spatial_align:
            features = pooled(features, matching_frames(teacher_grid.frames, student_grid.frames), weights.dtype)
            teacher_grid = TokenGrid(student_grid.frames, 1, 1)
        plan = _Plan.make(student_grid, teacher_grid, self.spatial_align, weights, norm.eps)
        similarities, self_similarities = cast(
            tuple[Tensor, Tensor],
            _FrameSimilarities.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
                hidden, features, plan, norm.weight, norm.bias, linear.weight, linear.bias
            ),
        )
        loss = -similarities.sum(1).mean()
        if self.normalize_by_frames:
            loss = loss / student_grid.frames
        similarity = (similarities.detach() / weights.sum(1)).mean()
        # Rounding can push a mean of cosines slightly above 1; thresholds must not see that.
        return Alignment(loss, similarity.clamp(-1, 1), self_similarities.mean().clamp(-1, 1))


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


class _Resampling(NamedTuple):
    """Bilinear interpolation from a grid to the comparison grid; without a target, the mean over all patches."""

    source: TokenGrid
    target: TokenGrid | None

    @property
    def rows(self) -> int:
        """Rows of the result."""
        return self.target.rows if self.target else 1

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.target.columns if self.target else 1

    def window(self, rows: slice) -> slice:
        """The source rows from which these rows of the result are computed."""
        if self.target is None:
            return slice(0, self.source.rows)
        taps = interpolation_taps(rows, self.source.rows, self.rows)
        return slice(taps.lower[0], taps.upper[-1] + 1)

    def __call__(self, values: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """`[T, source rows of the window, source columns, C]` to `[T, rows * columns, C]` in `dtype`."""
        if self.target is None:
            return values.to(dtype).mean((1, 2))[:, None]
        if self.source.rows == self.rows:
            return self._along_columns(values, dtype).flatten(1, 2)
        taps, start = interpolation_taps(rows, self.source.rows, self.rows), self.window(rows).start
        if self.source.rows < self.rows:
            values = _interpolate(values, taps.renumbered(range(start, start + values.shape[1])), 1, dtype)
            return self._along_columns(values, dtype).flatten(1, 2)
        # A coarser grid reads only two source rows for each of its own: the others are not even converted.
        needed = sorted({*taps.lower, *taps.upper})
        values = self._along_columns(_select(values, 1, [row - start for row in needed]), dtype)
        return _interpolate(values, taps.renumbered(needed), 1, dtype).flatten(1, 2)

    def _along_columns(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if self.source.columns == self.columns:
            return values.to(dtype)
        taps = interpolation_taps(slice(0, self.columns), self.source.columns, self.columns)
        return _interpolate(values, taps, 2, dtype)


def _interpolate(values: Tensor, taps: Taps, axis: int, dtype: torch.dtype) -> Tensor:
    lower, upper = (_select(values, axis, positions).to(dtype) for positions in (taps.lower, taps.upper))
    fraction = torch.tensor(taps.fraction, device=values.device, dtype=dtype)
    return torch.lerp(lower, upper, fraction.view([-1 if at == axis else 1 for at in range(values.ndim)]))


def _select(values: Tensor, axis: int, positions: list[int]) -> Tensor:
    return values.index_select(axis, torch.tensor(positions, device=values.device))


class _Plan(NamedTuple):
    """Everything about the comparison that is not a tensor of the batch."""

    student: _Resampling
    teacher: _Resampling
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
        return cls(
            _Resampling(student, target),
            _Resampling(teacher, target or teacher),
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
            window = window[self.teacher_frames]
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
