"""The clips of a folder with what was measured of each; a file that the index knows is not opened."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

from crepa_cli.data.clips import Clip, ClipScan, file_digest, find_clips
from crepa_cli.data.images import is_image, probe_image
from crepa_cli.data.index import Index, Known, now, settled
from crepa_cli.data.stages import each
from crepa_cli.data.video import DECODING_VERSION, VideoInfo, probe
from crepa_cli.errors import counted, listed
from crepa_cli.events import ClipSkipped, Event, Notice
from crepa_cli.processes import from_main


class Measured(NamedTuple):
    """The measurements of a clip, and the digest of its file."""

    info: VideoInfo
    digest: str


class MeasuredClips(NamedTuple):
    """Clips with what was measured of each, and how many more were found that cannot be used."""

    clips: list[tuple[Clip, Measured]]
    skipped: int


def measured_clips(folder: Path, index: Index | None) -> Generator[Event, None, MeasuredClips]:
    """Find the clips of a folder and measure them; yields progress, skipped clips and notices.

    The processes of a run share out the clips that are not in the index.

    Raises:
        UserError: if the folder does not exist or contains no clip.
    """
    found, known = from_main(lambda: _looked_up(folder, index))
    for skipped in found.skipped:
        yield ClipSkipped(skipped.name, skipped.reason)
    if others := found.left_out:
        yield Notice(f"{counted(len(others), 'file')} left out, neither video nor image: {listed(others)}")
    unknown = [place for place, one in enumerate(known) if one is None]
    if unknown:
        started = now()
        fresh = yield from each(
            "scanning",
            unknown,
            lambda place: (place, _measure(found.clips[place].path)),
            name=lambda place: found.clips[place].path.name,
        )
        for place, measured in fresh:
            known[place] = measured
        if index:
            rows = [
                (str(found.clips[place].path), Known(found.states[place], _written(measured)))
                for place, measured in fresh
                if settled(found.states[place], started)
            ]
            from_main(lambda: index.put(rows))
    clips = [(clip, one) for clip, one in zip(found.clips, known, strict=True) if one is not None]
    return MeasuredClips(clips, len(found.skipped) + len(found.clips) - len(clips))


def _looked_up(folder: Path, index: Index | None) -> tuple[ClipScan, list[Measured | None]]:
    """The clips of a folder, and what the index knows of each."""
    found = find_clips(folder, index)
    known = index.find([str(clip.path) for clip in found.clips]) if index else [None] * len(found.clips)
    return found, [
        _read(one.content) if one and one.state == state else None
        for one, state in zip(known, found.states, strict=True)
    ]


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
