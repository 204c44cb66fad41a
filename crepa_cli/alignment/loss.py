"""The alignment loss as a module: the projector, the objective, and the neighbors of a frame."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from crepa_cli.alignment.comparison import Comparison, pooled, spatial_statistics
from crepa_cli.alignment.cosine import FrameSimilarities
from crepa_cli.alignment.grid import TokenGrid, matching_frames
from crepa_cli.alignment.relation import FrameRelations

Objective = Literal["cosine", "relation"]
Projector = Literal["linear", "conv"]


class Alignment(NamedTuple):
    """The alignment of one batch, as 0-d tensors.

    `loss` is unscaled and carries the gradient. The similarities carry none and lie within [-1, 1]: `similarity`
    weights each frame's neighbors as the loss does; `self_similarity` compares each frame with its own features only.
    They are mean cosines or, for the objective "relation", mean correlations: see `relation.FrameRelations`.
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
        objective: "cosine" pulls each patch to its features: see `cosine`. "relation" compares the cosines between
            patches with those between their features (VideoREPA, arXiv 2505.23656): see `relation`.
        projector: "linear", or "conv" for a 3x3 convolution over each frame (iREPA, arXiv 2512.10794). It runs on the
            grid on which the two are compared, with zeros beyond its edges.
        spatial_norm: strength, from 0 to 1, of the centering of each frame's features over its patches, after which
            they are divided by their standard deviation (iREPA); None leaves them as they are.

    Attributes:
        projector: LayerNorm(H), then Linear(H, D) or Conv2d(H, D, 3), in float32. It is trained with the model and
            never exported.

    Raises:
        ValueError: for a negative distance, a tau that is not positive, an unknown objective or projector, a strength
            out of its range, or pooled patches with what needs several of them.
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
        objective: Objective = "cosine",
        projector: Projector = "linear",
        spatial_norm: float | None = None,
    ) -> None:
        super().__init__()
        if adjacent_distance < 0 or not adjacent_tau > 0:
            raise ValueError(
                "adjacent_distance must be at least 0 and adjacent_tau above 0, "
                f"got {adjacent_distance} and {adjacent_tau}"
            )
        _check_choice("objective", objective, Objective)
        _check_choice("projector", projector, Projector)
        if spatial_norm is not None and not 0 <= spatial_norm <= 1:
            raise ValueError(f"spatial_norm must be None or from 0 to 1, got {spatial_norm}")
        if not spatial_align and (objective, projector, spatial_norm) != ("cosine", "linear", None):
            raise ValueError(
                'spatial_align = False leaves one patch per frame, and the objective "relation", the projector "conv" '
                "and spatial_norm need several"
            )
        self.adjacent_distance = adjacent_distance
        self.adjacent_tau = adjacent_tau
        self.cumulative_neighbors = cumulative_neighbors
        self.spatial_align = spatial_align
        self.normalize_by_frames = normalize_by_frames
        self.objective = objective
        self.spatial_norm = spatial_norm
        norm = nn.LayerNorm(hidden_size, dtype=torch.float32)
        layer = (
            nn.Linear(hidden_size, feature_size, dtype=torch.float32)
            if projector == "linear"
            else nn.Conv2d(hidden_size, feature_size, 3, padding=1, dtype=torch.float32)
        )
        self.projector = nn.Sequential(norm, layer)
        self._comparisons: dict[tuple[TokenGrid, TokenGrid, torch.device, torch.dtype], Comparison] = {}

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
        parameters = tuple(self.projector.parameters())
        weight = parameters[2]
        _check_shape("hidden", hidden, student_grid, len(parameters[0]))
        _check_shape("features", features, teacher_grid, len(weight))
        if len(hidden) != len(features):
            raise ValueError(f"hidden has {len(hidden)} clips and features has {len(features)}")
        frames, statistics = matching_frames(teacher_grid.frames, student_grid.frames), None
        if not self.spatial_align:
            features = pooled(features, frames, weight.dtype)
            teacher_grid = TokenGrid(student_grid.frames, 1, 1)
        if self.spatial_norm is not None:
            statistics = spatial_statistics(features, frames, self.spatial_norm, weight.dtype)
        comparison = self._comparison(student_grid, teacher_grid, weight)
        of_frames = FrameRelations if self.objective == "relation" else FrameSimilarities
        losses, similarities, self_similarities = cast(
            tuple[Tensor, Tensor, Tensor],
            of_frames.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
                hidden, features, statistics, comparison, *parameters
            ),
        )
        loss = losses.sum(1).mean()
        if self.normalize_by_frames:
            loss = loss / student_grid.frames
        similarity = (similarities.detach() / comparison.weights.sum(1)).mean()
        # Rounding can push a mean of cosines slightly above 1; thresholds must not see that.
        return Alignment(loss, similarity.clamp(-1, 1), self_similarities.mean().clamp(-1, 1))

    def _comparison(self, student: TokenGrid, teacher: TokenGrid, weight: Tensor) -> Comparison:
        """The comparison of two grids on the device and in the dtype of the projector, made once."""
        key = student, teacher, weight.device, weight.dtype
        if key not in self._comparisons:
            distance, cumulative = self.adjacent_distance, self.cumulative_neighbors
            self._comparisons[key] = Comparison.make(
                student,
                teacher,
                self.spatial_align,
                neighbor_weights(student.frames, distance, self.adjacent_tau, cumulative).to(weight),
                neighbor_distances(distance, cumulative),
                cast(nn.LayerNorm, self.projector[0]).eps,
                whole_frames=weight.ndim == 4,
            )
        return self._comparisons[key]


def neighbor_distances(distance: int, cumulative: bool) -> list[int]:
    """The distances from a frame to itself and to its neighbors on either side."""
    return [0, *range(1 if cumulative else max(distance, 1), distance + 1)]


def neighbor_weights(frames: int, distance: int, tau: float, cumulative: bool) -> Tensor:
    """W, the weight of frame k in S(f): a banded float64 matrix `[T, T]` with ones on its diagonal.

    A neighbor outside the clip does not exist: its weight is dropped, not moved to the nearest frame.
    """
    offsets = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    neighbors = (offsets > 0) & ((offsets <= distance) if cumulative else (offsets == distance))
    return torch.eye(frames, dtype=torch.float64) + neighbors * torch.exp(-offsets.double() / tau)


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


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
