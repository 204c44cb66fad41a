"""Aspect-ratio buckets and valid frame counts: the shapes that clips are brought to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ASPECT_RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)
SAME_ASPECT = math.log(1.1)


class Size(NamedTuple):
    """A picture's size in pixels."""

    width: int
    height: int


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of the clips that may share a batch: frames, height and width in pixels."""

    frames: int
    height: int
    width: int


def bucket_sizes(width: int, height: int, size_multiple: int) -> list[Size]:
    """The picture sizes that clips are sorted into: `width` x `height` first, then others of about its area.

    The others have aspect ratios from 1:2 to 2:1 and sides that are multiples of `size_multiple`. A ratio
    within a tenth of one that is there already gets no size of its own: each size more makes batches rarer.
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
    """The one of `sizes` whose aspect ratio is nearest to that of a clip of `width` x `height`."""
    return min(sizes, key=lambda size: _aspect_distance(size, Size(width, height)))


def valid_frames(available: int, wanted: int, multiple: int) -> int | None:
    """The largest frame count `multiple * k + 1` that `available` allows and `wanted` asks for.

    A count of 1 is a picture, not a clip: it is given only where it is wanted. None: the clip is too short.
    """
    frames = (min(available, wanted) - 1) // multiple * multiple + 1
    return frames if frames >= min(wanted, multiple + 1) else None


def _nearest_multiple(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def _aspect_distance(one: Size, other: Size) -> float:
    return abs(math.log(one.width * other.height / (one.height * other.width)))
