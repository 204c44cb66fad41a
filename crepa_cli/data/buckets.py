"""Aspect-ratio buckets and valid frame counts: the shapes to which clips are resized."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ASPECT_RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)
SAME_ASPECT = math.log(1.1)


class Size(NamedTuple):
    """The size of a picture in pixels."""

    width: int
    height: int


@dataclass(frozen=True, order=True, slots=True)
class Bucket:
    """The shape of clips that can share a batch: number of frames, and height and width in pixels."""

    frames: int
    height: int
    width: int

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a clip's frames, uint8 RGB."""
        return 3 * self.frames * self.height * self.width


class Fit(NamedTuple):
    """The change of a picture that is resized until it just covers a size, and cropped to it.

    Attributes:
        enlargement: factor by which its sides grow; below 1 they shrink.
        cropped: share of the picture that the crop takes, from 0 to 1.
    """

    enlargement: float
    cropped: float


def bucket_sizes(width: int, height: int, size_multiple: int) -> list[Size]:
    """The picture sizes into which clips are sorted: `width` x `height` first, then others of about the same area.

    The others have aspect ratios from 1:2 to 2:1 and sides that are multiples of `size_multiple`. A ratio within 10 %
    of an existing one gets no size of its own: with every further size, fewer clips can share a batch.
    """
    sizes = [Size(width, height)]
    area = width * height
    for ratio in ASPECT_RATIOS:
        size = Size(
            _nearest_multiple(math.sqrt(area * ratio), size_multiple),
            _nearest_multiple(math.sqrt(area / ratio), size_multiple),
        )
        if all(_aspect_distance(size, other) > SAME_ASPECT for other in sizes):
            sizes.append(size)
    return sizes


def nearest_bucket(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size in `sizes` whose aspect ratio is closest to that of a clip of `width` x `height`."""
    return min(sizes, key=lambda size: _aspect_distance(size, Size(width, height)))


def fit(width: int, height: int, size: Size) -> Fit:
    """How a clip of `width` x `height` is fitted to `size`."""
    across, down = size.width / width, size.height / height
    return Fit(max(across, down), 1 - min(across, down) / max(across, down))


def valid_frames(available: int, wanted: int, multiple: int) -> int | None:
    """The largest frame count of the form `multiple * k + 1` up to `available` and `wanted`; None if too short.

    A count of 1 is a picture, not a clip: it is returned only if it is wanted.
    """
    frames = (min(available, wanted) - 1) // multiple * multiple + 1
    return frames if frames >= min(wanted, multiple + 1) else None


def _nearest_multiple(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def _aspect_distance(one: Size, other: Size) -> float:
    return abs(math.log(one.width * other.height / (one.height * other.width)))
