"""The layout of tokens: grids, corresponding frames, and interpolation between grids.

Tokens and features come with their grid. No code guesses a grid from a token count: the same number of tokens fits many
grids, and the wrong one pairs every patch with an unrelated one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class TokenGrid:
    """The layout of a clip's tokens: `frames` frames of `rows` by `columns` tokens, stored row-major.

    Raises:
        ValueError: if a side is smaller than 1.
    """

    frames: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        """Reject a grid without tokens."""
        if min(self.frames, self.rows, self.columns) < 1:
            raise ValueError(f"every side of a token grid must be at least 1, got {self}")

    @property
    def tokens(self) -> int:
        """Tokens in one frame."""
        return self.rows * self.columns


def matching_frames(teacher_frames: int, student_frames: int) -> list[int]:
    """The teacher's frame for each student frame i: floor(i * (T_teacher - 1) / (T_student - 1)), in integers.

    A causal video VAE that compresses time k-fold encodes the first frame alone and then k frames at a time: of
    k*n + 1 video frames and n + 1 latent frames, latent frame i meets video frame k*i, the last that it covers.
    """
    if student_frames == 1:
        return [0]
    return [i * (teacher_frames - 1) // (student_frames - 1) for i in range(student_frames)]


def teaching_frames(video_frames: int, latent_frames: int, which: Literal["last", "middle"]) -> list[int]:
    """The video frame that teaches each latent frame, of those that it covers: the last, as above, or the middle one.

    Of k frames, the middle one has k // 2 after it.
    """
    last = matching_frames(video_frames, latent_frames)
    if which == "last":
        return last
    return [end - (end - before) // 2 for before, end in zip([0, *last], last, strict=False)]


def coarser_grid(student: TokenGrid, teacher: TokenGrid) -> TokenGrid:
    """The grid with fewer tokens per frame, on which the two are compared; the student's if they have equally many."""
    return student if student.tokens <= teacher.tokens else teacher


class Taps(NamedTuple):
    """Linear interpolation along one axis: target i lies `fraction[i]` of the way from `lower[i]` to `upper[i]`."""

    lower: list[int]
    upper: list[int]
    fraction: list[float]

    def renumbered(self, kept: Sequence[int]) -> Taps:
        """The same taps for a source reduced to the positions in `kept`."""
        place = {position: index for index, position in enumerate(kept)}
        return Taps([place[one] for one in self.lower], [place[one] for one in self.upper], self.fraction)


def interpolation_taps(targets: slice, source: int, target: int) -> Taps:
    """The source positions and fractions that some target positions are interpolated from, with half-pixel centers.

    Applied along rows, then along columns, this equals
    `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.

    Args:
        targets: the consecutive target positions to interpolate.
        source: total number of source positions.
        target: total number of target positions.
    """
    centers = [
        min(max((index + 0.5) * (source / target) - 0.5, 0.0), source - 1.0)
        for index in range(targets.start, targets.stop)
    ]
    lower = [math.floor(center) for center in centers]
    return Taps(
        lower, [math.ceil(center) for center in centers], [c - low for c, low in zip(centers, lower, strict=True)]
    )
