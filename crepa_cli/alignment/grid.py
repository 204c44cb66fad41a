"""Where tokens are: grids, the frames that meet, and the interpolation between grids.

Tokens and features carry their grid. Nothing here, or anywhere else, guesses a grid from a token count: the same
number of tokens fits many grids, and the wrong one pairs every patch with a stranger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


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


class Taps(NamedTuple):
    """Linear interpolation along one axis: target position i is `lower[i]` moved by `fraction[i]` to `upper[i]`."""

    lower: list[int]
    upper: list[int]
    fraction: list[float]

    def renumbered(self, kept: Sequence[int]) -> Taps:
        """The same taps where only these source positions are left."""
        place = {position: index for index, position in enumerate(kept)}
        return Taps([place[one] for one in self.lower], [place[one] for one in self.upper], self.fraction)


def interpolation_taps(targets: slice, source: int, target: int) -> Taps:
    """How some target positions are made of source positions, with half-pixel centers.

    Along rows and then along columns it is `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.

    Args:
        targets: the consecutive target positions that are asked for.
        source: source positions in all.
        target: target positions in all.
    """
    centers = [
        min(max((index + 0.5) * (source / target) - 0.5, 0.0), source - 1.0)
        for index in range(targets.start, targets.stop)
    ]
    lower = [math.floor(center) for center in centers]
    return Taps(
        lower, [math.ceil(center) for center in centers], [c - low for c, low in zip(centers, lower, strict=True)]
    )
