"""Clips as cameras, recorders and broken copies leave them: the frame taken for every index, and how the clip ends."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest

from crepa_cli.data.clips import ClipError
from crepa_cli.data.video import decode, frames_available, probe

SIZE = 64
OPEN_GOP = "open-gop=1:keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0"


class Case(NamedTuple):
    """A file, and the frames that it shows at 16 frames per second; then the end, or the reason of the end."""

    name: str
    make: Callable[[Path], object]
    shown: Sequence[int]
    end: str = "too short"


def gray(index: int, pixels: str = "yuv420p") -> av.VideoFrame:
    """A picture of the brightness 8 * index."""
    picture = np.full((SIZE, SIZE, 3), 8 * index, np.uint8)
    return av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)


def write(path: Path, codec: str, options: dict[str, str], *, count: int = 24, rate: int = 16, step: int = 1) -> None:
    """Write gray pictures, each after `step` units of 1 / rate seconds."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = SIZE
        stream.thread_count = 1
        for index in range(count):
            frame = gray(index)
            frame.pts, frame.time_base = index * step, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def gaps(codec: str, **options: str) -> Callable[[Path], object]:
    """An AVI of 32 chunks per second in which every other chunk is empty."""
    return lambda path: write(path, codec, options, rate=32, step=2, count=12)


def open_gop(codec: str, skipped: int, **options: str) -> Callable[[Path], object]:
    """A clip with open groups of pictures, copied without its first packets."""

    def make(path: Path) -> None:
        source = path.with_stem("whole")
        write(source, codec, options)
        with av.open(str(source)) as whole, av.open(str(path), "w") as cut:
            stream = cut.add_stream_from_template(whole.streams.video[0])
            for index, packet in enumerate(whole.demux(video=0)):
                if index >= skipped and packet.size:
                    packet.stream = stream
                    cut.mux(packet)

    return make


def cut_off(codec: str, packet: int, **options: str) -> Callable[[Path], object]:
    """A file that ends in the middle of a packet."""

    def make(path: Path) -> None:
        write(path, codec, options)
        with av.open(str(path)) as container:
            packets = [one for one in container.demux(video=0) if one.size]
            end = (packets[packet].pos or 0) + packets[packet].size // 2
        path.write_bytes(path.read_bytes()[:end])

    return make


CASES = [
    Case("gaps.avi", gaps("mpeg4"), range(12)),
    Case("gaps-between-b-frames.avi", gaps("mpeg4", bf="2"), range(12)),
    Case("gaps-in-h264.avi", gaps("libx264"), range(12)),
    Case("open-gop.mp4", open_gop("libx264", 5, **{"x264-params": OPEN_GOP}), range(8, 24)),
    Case("open-gop.ts", open_gop("libx264", 5, **{"x264-params": OPEN_GOP}), range(8, 24)),
    Case("open-gop.mkv", open_gop("mpeg2video", 4, bf="2", g="8", qmin="1", qmax="1"), range(6, 24)),
    Case("before-the-first-key-frame.mp4", open_gop("libx264", 8, **{"x264-params": OPEN_GOP}), range(16, 24)),
    Case("cut-off.mp4", cut_off("mpeg4", 10, bf="0"), range(10), "damaged"),
    Case("cut-off-in-h264.mp4", cut_off("libx264", 12, bf="0"), range(12)),
    Case("cut-off.avi", cut_off("mpeg4", 10, bf="0"), range(10)),
    Case("cut-off.mkv", cut_off("mpeg4", 10, bf="0"), range(10)),
    Case("cut-off.ts", cut_off("mpeg2video", 10, bf="0", qmin="1", qmax="1"), range(10)),
    Case("clip.m4v", lambda path: write(path, "libx264", {}), range(24)),
    Case("clip.3gp", lambda path: write(path, "mpeg4", {}), range(24)),
    Case("clip.mts", lambda path: write(path, "libx264", {}), range(24)),
    Case("clip.mpg", lambda path: write(path, "mpeg2video", {"qmin": "1", "qmax": "1"}), range(24)),
    Case("clip.wmv", lambda path: write(path, "wmv2", {}), range(24)),
    Case("clip.flv", lambda path: write(path, "libx264", {}), range(24)),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_frame_of_every_index(tmp_path: Path, case: Case) -> None:
    path = tmp_path / case.name
    case.make(path)
    expected = list(case.shown)
    info = probe(path)
    assert (info.frames, frames_available(info, 16)) == (len(expected), len(expected))
    clip = decode(path, frames=len(expected), fps=16, width=32, height=32)
    assert (clip.float().mean((1, 2, 3)) / 8).round().int().tolist() == expected
    with pytest.raises(ClipError, match=case.end):
        decode(path, frames=len(expected) + 1, fps=16, width=32, height=32)
