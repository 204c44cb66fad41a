"""Looks at a few small frames of each clip: whether it is black or frozen or has bars, and which clips look alike."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crepa_cli.data.cache import cache_key
from crepa_cli.data.images import image_pixels
from crepa_cli.data.index import FileState, Index, Known
from crepa_cli.data.scan import PreparedClip, clip_name, key_parts
from crepa_cli.data.stages import each
from crepa_cli.data.video import decode
from crepa_cli.events import Event

# Part of the rows of the index: a change of what is measured needs another number.
VERSION = 1
MOMENTS = 5
"""Frames of a clip that are looked at, evenly spread over the part that is trained on."""
SIDE = 480
"""Longest side, in pixels, of the frames that are looked at."""
DARK = 24
"""Levels of 255 up to which a pixel is black; compression makes noise of it."""
SPECKS = 0.02
"""Share of brighter pixels that a black picture, row or column may have: a logo, or noise."""
LIT = 0.5
"""Share of brighter pixels in the row next to a bar. A dark background around an object has none that bright."""
LEAST_BAR = 0.02
"""Share of the width or height from which on two bars are named."""
STILL_CELLS, STILL = 32, 4
"""Cells across a picture, and levels of change in any of them up to which it stands still."""
CELLS, ALIKE = 8, 16
"""Cells across a picture, and levels of difference in any of them up to which two clips look alike."""
ROWS_AT_ONCE = 64


class Bars(NamedTuple):
    """The widths of the black bars at the sides of a clip, in its own pixels."""

    left: int
    top: int
    right: int
    bottom: int


class Look(NamedTuple):
    """The look of a clip.

    Attributes:
        black: whether every frame is.
        frozen: whether nothing moves; never of a single frame.
        bars: black bars; all 0 without any.
        colors: the mean colors of `CELLS` x `CELLS` cells of each frame, as hexadecimal bytes.
    """

    black: bool
    frozen: bool
    bars: Bars
    colors: str


def look_at_all(clips: Sequence[PreparedClip], index: Index) -> Generator[Event, None, list[tuple[PreparedClip, Look]]]:
    """Look at clips; yields progress and skipped clips. Those that the `index` knows are not opened."""
    rows = [_row(clip) for clip in clips]
    looks = {
        place: _read(row.content) for place, row in enumerate(index.find(rows)) if row and row.state == FileState(0, 0)
    }
    unknown = [place for place in range(len(clips)) if place not in looks]
    fresh = yield from each(
        "looking", unknown, lambda place: (place, look(clips[place])), name=lambda place: clip_name(clips[place])
    )
    index.put((rows[place], Known(FileState(0, 0), json.dumps(one))) for place, one in fresh)
    looks |= dict(fresh)
    return [(clips[place], one) for place, one in sorted(looks.items())]


def look(clip: PreparedClip) -> Look:
    """Look at the part of a clip that is trained on.

    Raises:
        ClipError: if it cannot be read.
    """
    info, frames = clip.info, min(MOMENTS, clip.bucket.frames)
    scale = min(1.0, SIDE / max(info.width, info.height))
    width, height = max(1, round(info.width * scale)), max(1, round(info.height * scale))
    if info.image:
        pixels = image_pixels(clip.clip.path, width, height)
    else:
        fps = clip.fps * (frames - 1) / (clip.bucket.frames - 1) if frames > 1 else clip.fps
        pixels = decode(clip.clip.path, frames=frames, fps=fps, width=width, height=height, start=clip.start)
    lit = pixels.amax(1) > DARK
    black = bool((lit.float().mean((1, 2)) <= SPECKS).all())
    small = F.adaptive_avg_pool2d(pixels.float(), STILL_CELLS)
    frozen = frames > 1 and bool((small - small[0]).abs().amax() <= STILL)
    colors = F.adaptive_avg_pool2d(pixels.float(), CELLS).round().to(torch.uint8)
    bars = Bars(0, 0, 0, 0) if black else _bars(lit.any(0), info.width / width, info.height / height)
    return Look(black, frozen, bars, colors.numpy().tobytes().hex())


def alike(looked: Sequence[tuple[PreparedClip, Look]]) -> list[tuple[PreparedClip, PreparedClip]]:
    """The pairs of clips of different files that look alike; of two files, one pair at most.

    Black clips are left out: they all look alike.
    """
    pairs: dict[tuple[object, object], tuple[PreparedClip, PreparedClip]] = {}
    lengths = sorted((one for one in looked if not one[1].black), key=lambda one: len(one[1].colors))
    for _, group in groupby(lengths, key=lambda one: len(one[1].colors)):
        same = list(group)
        colors = torch.stack([_colors(one) for _, one in same])
        for first in range(0, len(same), ROWS_AT_ONCE):
            near = torch.cdist(colors[first : first + ROWS_AT_ONCE], colors, p=torch.inf) <= ALIKE
            for row, column in near.nonzero().tolist():
                one, other = same[first + row][0], same[column][0]
                if first + row < column and one.clip.path != other.clip.path:
                    pairs.setdefault((one.clip.path, other.clip.path), (one, other))
    return list(pairs.values())


def _colors(one: Look) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(one.colors), dtype=torch.uint8).float()


def _bars(lit: Tensor, across: float, down: float) -> Bars:
    """The bars around the pixels `[H, W]` that are ever lit; the factors lead from these to the clip's own pixels."""
    top, bottom = _edges(lit.float().mean(1))
    left, right = _edges(lit.float().mean(0))
    return Bars(round(left * across), round(top * down), round(right * across), round(bottom * down))


def _edges(shares: Tensor) -> tuple[int, int]:
    """The widths of two bars at the ends of a picture, from the share of lit pixels of each row; 0 without both."""
    rows = (shares > SPECKS).nonzero().flatten().tolist()
    if not rows:
        return 0, 0
    first, last = rows[0], len(shares) - 1 - rows[-1]
    # A row at the edge of a bar may be half black.
    beside = [float(shares[min(rows[0] + 1, rows[-1])]), float(shares[max(rows[-1] - 1, rows[0])])]
    wide = min(first, last) >= max(1, LEAST_BAR * len(shares))
    return (first, last) if wide and min(beside) >= LIT else (0, 0)


def _row(clip: PreparedClip) -> str:
    """The name of a clip's look in the index. It depends on the content of the file, whatever its name and date."""
    return f"look/{cache_key(look=VERSION, **key_parts(clip))}"


def _read(content: str) -> Look:
    black, frozen, bars, colors = json.loads(content)
    return Look(black, frozen, Bars(*bars), colors)
