"""The part of a clip that is trained on: its head, one of several windows, or window after window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple

from crepa_cli.data.buckets import valid_frames
from crepa_cli.data.video import VideoInfo, frames_available
from crepa_cli.profile import DataSettings


class Sampling(NamedTuple):
    """How the parts of a clip that are trained on are chosen.

    Attributes:
        kind: `head` is the beginning of each scene; `uniform` are `windows` spread over it, of which each visit draws
            one; `windows` cuts all of it into windows.
        windows: number of windows of `uniform`.
        overlap: share of a window of `windows` that the next one repeats.
        split_scenes: whether a clip is divided at its hard cuts. Otherwise it is one scene.
    """

    kind: Literal["head", "uniform", "windows"] = "head"
    windows: int = 1
    overlap: float = 0.0
    split_scenes: bool = False

    @classmethod
    def of(cls, data: DataSettings) -> Sampling:
        """The sampling given by the settings."""
        return cls(data.sampling, data.windows, data.overlap, data.split_scenes)

    @property
    def takes_head_alone(self) -> bool:
        """Whether nothing but the beginning of a clip is trained on."""
        return self.kind == "head" and not self.split_scenes


HEAD = Sampling()


class Window(NamedTuple):
    """A part of a clip: its first frame, in seconds after that of the clip, and its number of frames.

    It is one of those of the `scene`, counted from 0.
    """

    start: float
    frames: int
    scene: int


def windows(
    info: VideoInfo, cuts: Sequence[float], sampling: Sampling, wanted: int, multiple: int, fps: float
) -> list[Window]:
    """The windows of a clip, none of which crosses a cut; empty if every scene is too short.

    Args:
        info: of the clip.
        cuts: the seconds at which its later scenes begin.
        sampling: how windows are chosen.
        wanted: most frames of a window.
        multiple: a window has this many frames times k, plus one.
        fps: frame rate of the windows.
    """
    found = []
    bounds = [0.0, *cuts, info.duration]
    for scene, (start, end) in enumerate(pairwise(bounds)):
        available = frames_available(replace(info, duration=end - start), fps)
        parts = _in_scene(available, sampling, wanted, multiple)
        found += [Window(start + first / fps, frames, scene) for first, frames in parts]
    return found


def _in_scene(available: int, sampling: Sampling, wanted: int, multiple: int) -> Iterator[tuple[int, int]]:
    """First frame and number of frames of each window of a scene of some frames."""
    frames = valid_frames(available, wanted, multiple)
    if frames is None:
        return
    room = available - frames
    if sampling.kind == "uniform" and sampling.windows > 1:
        last = min(sampling.windows - 1, room)
        yield from ((number * room // max(1, last), frames) for number in range(last + 1))
        return
    yield 0, frames
    if sampling.kind == "windows":
        step = max(1, round(frames * (1 - sampling.overlap)))
        first = step
        while first + frames - step < available:
            length = valid_frames(available - first, frames, multiple)
            if length is not None:
                yield first, length
            first += step
