"""Where tokens are: grids, the frames that meet, and the interpolation between grids.

Tokens and features carry their grid. Nothing here, or anywhere else, guesses a grid from a token count: the same
number of tokens fits many grids, and the wrong one pairs every patch with a stranger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """The places of a clip's tokens: `frames` of `rows` by `columns`, stored row-major.

    Raises:
        ValueError: if a side is smaller than 1.
    """

    frames: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        """Refuse a grid without tokens."""
        if min(self.frames, self.rows, self.columns) < 1:
            raise ValueError(f"every side of a token grid is at least 1, got {self}")

    @property
    def tokens(self) -> int:
        """Tokens in one frame."""
        return self.rows * self.columns


def matching_frames(teacher_frames: int, student_frames: int) -> list[int]:
    """The teacher's frame for each of the student's: floor(i * (T_teacher - 1) / (T_student - 1)), in integers.

    A video VAE that compresses time k-fold keeps the first frame and one of every k after it, so with k*n + 1 video
    frames and n + 1 latent frames, latent frame i meets video frame k*i.
    """
    if student_frames == 1:
        return [0]
    return [i * (teacher_frames - 1) // (student_frames - 1) for i in range(student_frames)]


def coarser_grid(student: TokenGrid, teacher: TokenGrid) -> TokenGrid:
    """The grid, of the two, that has fewer tokens in a frame: there the two are compared (the student's if even)."""
    return student if student.tokens <= teacher.tokens else teacher


def interpolation_matrix(source: int, target: int) -> Tensor:
    """Linear interpolation with half-pixel centers along one axis, as a float64 matrix `[target, source]`.

    Row i holds the weights of the source positions in target position i; each row sums to 1. Along rows and then along
    columns it is `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.
    """
    centers = (torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    distance = centers.clamp(0, source - 1)[:, None] - torch.arange(source, dtype=torch.float64)
    return (1 - distance.abs()).clamp(min=0)


def source_window(target_window: slice, source: int, target: int) -> slice:
    """The consecutive source positions that a window of target positions is interpolated from."""
    first, last = (
        min(max((index + 0.5) * (source / target) - 0.5, 0.0), source - 1.0)
        for index in (target_window.start, target_window.stop - 1)
    )
    return slice(math.floor(first), math.ceil(last) + 1)
