"""The clips of a folder with what was measured of each; a file that the index knows is not opened."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from crepa_cli.data.clips import Clip, ClipScan, file_digest, find_clips
from crepa_cli.data.images import is_image, probe_image
from crepa_cli.data.index import Index, Known, now, settled
from crepa_cli.data.scenes import hard_cuts
from crepa_cli.data.stages import each
from crepa_cli.data.video import DECODING_VERSION, VideoInfo, probe
from crepa_cli.errors import counted, listed
from crepa_cli.events import ClipSkipped, Event, Notice
from crepa_cli.processes import from_main

Result = TypeVar("Result")


class Measured(NamedTuple):
    """The measurements of a clip, the digest of its file, and when its scenes but the first begin, in seconds."""

    info: VideoInfo
    digest: str
    cuts: tuple[float, ...] = ()


class MeasuredClips(NamedTuple):
    """Clips with what was measured of each, and how many more were found that cannot be used."""

    clips: list[tuple[Clip, Measured]]
    skipped: int


@dataclass(frozen=True)
class _Quantity(Generic[Result]):
    """A measurement of clips, and how the index keeps it: under the clip's path after a prefix.

    `read` returns None for what was measured in another way.
    """

    stage: str
    prefix: str
    measure: Callable[[Path], Result]
    write: Callable[[Result], str]
    read: Callable[[str], Result | None]


def measured_clips(
    folder: Path, index: Index | None, *, split_scenes: bool = False, caption_lines: bool = False
) -> Generator[Event, None, MeasuredClips]:
    """Find the clips of a folder and measure them; yields progress, skipped clips and notices.

    The processes of a run share out the clips that are not in the index.

    Args:
        folder: with the clips.
        index: what is known of them.
        split_scenes: whether hard cuts are looked for.
        caption_lines: whether each line of a text is a caption.

    Raises:
        UserError: if the folder does not exist or contains no clip.
    """
    found = from_main(lambda: find_clips(folder, index, caption_lines=caption_lines))
    for skipped in found.skipped:
        yield ClipSkipped(skipped.name, skipped.reason)
    if others := found.left_out:
        yield Notice(f"{counted(len(others), 'file')} left out, neither video nor image: {listed(others)}")
    measured = yield from _measured(CLIP, found, range(len(found.clips)), index)
    if split_scenes:
        videos = [place for place, one in measured.items() if not one.info.image]
        cuts = yield from _measured(CUTS, found, videos, index)
        # A clip in which cuts cannot be looked for has been skipped by name.
        measured = {
            place: one._replace(cuts=cuts.get(place, ()))
            for place, one in measured.items()
            if one.info.image or place in cuts
        }
    clips = [(found.clips[place], one) for place, one in sorted(measured.items())]
    return MeasuredClips(clips, len(found.skipped) + len(found.clips) - len(clips))


def _measured(
    quantity: _Quantity[Result], found: ClipScan, places: Sequence[int], index: Index | None
) -> Generator[Event, None, dict[int, Result]]:
    """The measurements of some clips, by their places; clips that cannot be read are skipped."""
    known = from_main(lambda: _known(quantity, found, places, index))
    unknown = [place for place in places if place not in known]
    if not unknown:
        return known
    started = now()
    fresh = yield from each(
        quantity.stage,
        unknown,
        lambda place: (place, quantity.measure(found.clips[place].path)),
        name=lambda place: found.clips[place].path.name,
    )
    if index:
        rows = [
            (_row(quantity, found, place), Known(found.states[place], quantity.write(one)))
            for place, one in fresh
            if settled(found.states[place], started)
        ]
        from_main(lambda: index.put(rows))
    return known | dict(fresh)


def _known(
    quantity: _Quantity[Result], found: ClipScan, places: Sequence[int], index: Index | None
) -> dict[int, Result]:
    """The measurements that the index has of some clips, by their places."""
    rows = index.find([_row(quantity, found, place) for place in places]) if index else []
    known = {}
    for place, row in zip(places, rows, strict=False):
        if row and row.state == found.states[place] and (one := quantity.read(row.content)) is not None:
            known[place] = one
    return known


def _row(quantity: _Quantity[Result], found: ClipScan, place: int) -> str:
    return f"{quantity.prefix}{found.clips[place].path}"


def _measure(path: Path) -> Measured:
    """Measure a clip.

    Raises:
        ClipError: if it cannot be read.
    """
    return Measured(probe_image(path) if is_image(path) else probe(path), file_digest(path))


def _written(measured: Measured) -> str:
    return json.dumps([DECODING_VERSION, measured.digest, *astuple(measured.info)])


def _read(content: str) -> Measured | None:
    """The measurements that `_written` wrote; None if clips were read in another way then."""
    version, digest, *info = json.loads(content)
    return Measured(VideoInfo(*info), digest) if version == DECODING_VERSION else None


def _read_cuts(content: str) -> tuple[float, ...] | None:
    version, *cuts = json.loads(content)
    return tuple(cuts) if version == DECODING_VERSION else None


CLIP = _Quantity("scanning", "", _measure, _written, _read)
CUTS = _Quantity("scenes", "cuts/", hard_cuts, lambda cuts: json.dumps([DECODING_VERSION, *cuts]), _read_cuts)
