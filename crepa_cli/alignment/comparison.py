"""How hidden states and features are brought together: one grid, corresponding frames, unit length, some at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crepa_cli.alignment.grid import TokenGrid, coarser_grid, matching_frames
from crepa_cli.alignment.resampling import Constants, Resampling

CHUNK_TOKENS = 4096
"""Tokens processed at a time: large enough to keep a GPU busy, 25 MB for each float32 copy at width 1536."""
SPATIAL_EPS = 1e-6
"""Added to the standard deviation in the spatial norm, as iREPA does."""


class Chunk(NamedTuple):
    """A part of one clip that fits in memory: some frames and some rows of the comparison grid."""

    clip: int
    frames: slice
    rows: slice


class Comparison(NamedTuple):
    """Everything about a comparison that is not a tensor of the batch.

    Attributes:
        weights: W `[T, T]`, of the frames and their neighbors.
        distances: between the frames whose weights are not 0, beginning with 0.
        whole_frames: whether a chunk has all rows of its frames, as a convolution needs.
    """

    student: Resampling
    teacher: Resampling
    teacher_frames: list[int]
    weights: Tensor
    distances: list[int]
    patches: int
    spatial_align: bool
    norm_eps: float
    whole_frames: bool

    @classmethod
    def make(
        cls,
        student: TokenGrid,
        teacher: TokenGrid,
        spatial_align: bool,
        weights: Tensor,
        distances: list[int],
        norm_eps: float,
        whole_frames: bool,
    ) -> Comparison:
        """The comparison of two grids, on the device and in the dtype of the weights."""
        target = coarser_grid(student, teacher) if spatial_align else None
        constants = Constants(weights.device, weights.dtype)
        return cls(
            Resampling(student, target, constants),
            Resampling(teacher, target or teacher, constants),
            matching_frames(teacher.frames, student.frames),
            weights,
            distances,
            target.tokens if target else 1,
            spatial_align,
            norm_eps,
            whole_frames,
        )

    def chunks(self, clips: int) -> list[Chunk]:
        """Some rows of all frames, so that neighbors share a chunk; or some whole or pooled frames."""
        grid, frames, rows = self.student.source, self.student.source.frames, self.student.rows
        if self.spatial_align and not self.whole_frames:
            size = max(1, CHUNK_TOKENS // (frames * self.student.columns))
            parts = [(slice(0, frames), slice(at, min(at + size, rows))) for at in range(0, rows, size)]
        else:
            size = max(1, CHUNK_TOKENS // grid.tokens)
            parts = [(slice(at, min(at + size, frames)), slice(0, rows)) for at in range(0, frames, size)]
        return [Chunk(clip, *part) for clip in range(clips) for part in parts]

    def with_neighbors(self, frames: slice) -> slice:
        """These frames and all that are at most as far from them as their neighbors; all of the clip in most cases."""
        if not self.whole_frames:
            return slice(0, self.student.source.frames)
        reach = self.distances[-1]
        return slice(max(0, frames.start - reach), min(self.student.source.frames, frames.stop + reach))

    def whole_frame(self, clip: int, frame: int) -> Chunk:
        """All rows of one frame."""
        return Chunk(clip, slice(frame, frame + 1), slice(0, self.student.rows))

    def not_before(self, frame: int) -> list[int]:
        """The frame itself and its later neighbors."""
        later = (frame + distance for distance in self.distances)
        return [other for other in later if other < self.student.source.frames]

    def hidden_of(self, hidden: Tensor, chunk: Chunk) -> Tensor:
        """The view of hidden states that a chunk reads: `[T, rows, columns, H]`."""
        grid = self.student.source
        clip: Tensor = hidden[chunk.clip].unflatten(1, (grid.rows, grid.columns))
        return clip[chunk.frames, self.student.window(chunk.rows)]

    def unit_features(self, features: Tensor, statistics: Tensor | None, chunk: Chunk) -> Tensor:
        """Y, unit-length features `[T, N, D]` of a chunk, in the projector's dtype.

        Args:
            features: `[B, T', N', D]`.
            statistics: of `spatial_statistics`, for features that are normalized over the patches of their frame.
            chunk: whose frames are the student's.
        """
        grid, frames = self.teacher.source, self.teacher_frames[chunk.frames]
        window = features[chunk.clip].unflatten(1, (grid.rows, grid.columns))[:, self.teacher.window(chunk.rows)]
        if frames != list(range(grid.frames)):
            window = window.index_select(0, self.teacher.constants.indices(frames))
        resampled = self.teacher(window, chunk.rows, self.weights.dtype)
        if statistics is not None:
            # Interpolation weights sum to 1, so this equals the interpolation of normalized features.
            shift, scale = statistics[:, chunk.clip, chunk.frames]
            resampled = (resampled - shift) / scale
        return F.normalize(resampled, dim=-1)

    def project(self, hidden: Tensor, chunk: Chunk, parameters: tuple[Tensor, ...]) -> Tensor:
        """P, unit-length projections `[T, N, D]` of the hidden states of a chunk.

        The projector runs on the comparison grid. For a Linear that equals interpolating its projections, because
        interpolation weights sum to 1.
        """
        norm_weight, norm_bias, weight, bias = parameters
        normed = F.layer_norm(hidden.to(weight.dtype), norm_weight.shape, norm_weight, norm_bias, self.norm_eps)
        tokens = self.student(normed, chunk.rows, normed.dtype)
        if weight.ndim == 2:
            return F.normalize(F.linear(tokens, weight, bias), dim=-1)
        image = tokens.unflatten(1, (self.student.rows, self.student.columns)).permute(0, 3, 1, 2)
        convolved = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2)
        return F.normalize(convolved.permute(0, 2, 3, 1).flatten(1, 2), dim=-1)


def spatial_statistics(features: Tensor, frames: list[int], strength: float, dtype: torch.dtype) -> Tensor:
    """The mean to subtract from each frame's features and the divisor, `[2, B, T, 1, D]`, of iREPA (arXiv 2512.10794).

    Over the patches of a frame, y becomes (y - strength * mean) / (standard deviation + 1e-6), channel by channel.

    Args:
        features: `[B, T', N', D]`; they get no gradient.
        frames: the T frames that are used.
        strength: of the centering, from 0 to 1.
        dtype: of the result.
    """
    statistics = []
    for frame in frames:  # one at a time: a copy of all features would be large
        patches = features[:, frame].detach().to(dtype)
        deviation, mean = torch.std_mean(patches, dim=1, keepdim=True, correction=min(1, patches.shape[1] - 1))
        statistics.append(torch.stack([strength * mean, deviation + SPATIAL_EPS]))
    return torch.stack(statistics, dim=2)


def pooled(features: Tensor, frames: list[int], dtype: torch.dtype) -> Tensor:
    """The mean over the patches of the given frames, `[B, T', N', D]` to `[B, T, 1, D]`, one frame at a time."""
    return torch.stack([features[:, frame].to(dtype).mean(1, keepdim=True) for frame in frames], dim=1)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast: cosines of vectors with a thousand elements need float32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
