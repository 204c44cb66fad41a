"""Hard cuts of a video: frames that have little in common with the one before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crepa_cli.data.video import small_frames

# The rule and the figures of PySceneDetect's AdaptiveDetector, on differences of small RGB pictures.
LEAST_CHANGE = 15.0
"""Mean difference of two pictures, of 255 levels, from which on there may be a cut between them."""
RATIO = 3.0
"""A cut changes the picture this many times as much as the frames around it do: fast motion changes all of them."""
AROUND = 2


def hard_cuts(path: Path) -> tuple[float, ...]:
    """The seconds, after the first frame, at which the scenes of a video begin, without the first one.

    Raises:
        ClipError: if the file cannot be read; the part before damage is used.
    """
    changes: list[float] = []
    starts: list[float] = []
    before = None
    for picture, start in small_frames(path):
        if before is not None:
            changes.append(float((picture - before).abs().mean()))
            starts.append(start)
        before = picture
    return tuple(starts[place] for place in cut_places(changes))


def cut_places(changes: Sequence[float]) -> list[int]:
    """Which of the changes from frame to frame are cuts."""
    places = []
    for place, change in enumerate(changes):
        around = [*changes[max(0, place - AROUND) : place], *changes[place + 1 : place + 1 + AROUND]]
        usual = sum(around) / len(around) if around else 0.0
        if change >= LEAST_CHANGE and change >= RATIO * usual:
            places.append(place)
    return places
