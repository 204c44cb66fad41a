"""Which part of a long clip is trained on: windows, scenes, and decoding from the middle of a file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import pytest
import torch
from conftest import OpenTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crepa_cli.data.cache import Cache
from crepa_cli.data.dataset import ClipDataset
from crepa_cli.data.index import Index
from crepa_cli.data.scan import ClipForm, PreparedClip, clip_pixels, scan
from crepa_cli.data.scenes import cut_places, hard_cuts
from crepa_cli.data.video import VideoInfo, decode, frames_available, probe, write_video
from crepa_cli.data.windows import Sampling, Window, windows
from crepa_cli.events import ClipSkipped, Event, Notice, drained

FPS = 16.0
LAWS = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def info(frames: int) -> VideoInfo:
    return VideoInfo(frames, 96, 64, FPS, frames / FPS, 0.001, "", False)


def parts(found: list[Window]) -> list[tuple[int, int]]:
    """First frame and number of frames of each window."""
    return [(round(one.start * FPS), one.frames) for one in found]


@LAWS
@given(
    frames=st.integers(1, 400),
    cuts=st.sets(st.integers(1, 399), max_size=4),
    kind=st.sampled_from(["head", "uniform", "windows"]),
    count=st.integers(1, 6),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    wanted=st.sampled_from([1, 17, 81]),
    multiple=st.sampled_from([4, 8]),
)
def test_windows_lie_in_their_scenes_and_have_lengths_that_the_model_takes(
    frames: int, cuts: set[int], kind: str, count: int, overlap: float, wanted: int, multiple: int
) -> None:
    cuts = {cut for cut in cuts if cut < frames}
    sampling = Sampling(kind, count, overlap, True)  # type: ignore[arg-type]
    found = windows(info(frames), [cut / FPS for cut in sorted(cuts)], sampling, wanted, multiple, FPS)
    bounds = [0, *sorted(cuts), frames]
    for window, (first, length) in zip(found, parts(found), strict=True):
        assert bounds[window.scene] <= first
        assert first + length <= bounds[window.scene + 1]
        assert length % multiple == 1 % multiple
        assert length <= wanted
    for scene, (start, end) in enumerate(pairwise(bounds)):
        mine = [part for window, part in zip(found, parts(found), strict=True) if window.scene == scene]
        if end - start < min(wanted, multiple + 1):
            assert not mine
            continue
        assert mine[0][0] == start
        assert len(set(mine)) == len(mine)
        if kind == "head":
            assert len(mine) == 1
        if kind == "uniform":
            assert len({length for _, length in mine}) == 1
            assert len(mine) == min(count, end - start - mine[0][1] + 1)
            assert count == 1 or mine[-1][0] + mine[-1][1] == end
        if kind == "windows":
            covered = {frame for first, length in mine for frame in range(first, first + length)}
            assert covered == set(range(start, max(covered) + 1))
            assert end - 1 - max(covered) <= multiple


def test_windows_overlap_as_asked_and_the_last_one_takes_what_is_left() -> None:
    def found(frames: int, kind: str, **more: object) -> list[tuple[int, int]]:
        return parts(windows(info(frames), (), Sampling(kind, **more), 17, 4, FPS))  # type: ignore[arg-type]

    assert found(60, "head") == [(0, 17)]
    assert found(60, "uniform", windows=3) == [(0, 17), (21, 17), (43, 17)]
    assert found(60, "windows") == [(0, 17), (17, 17), (34, 17), (51, 9)]
    assert found(60, "windows", overlap=0.5) == [(0, 17), (8, 17), (16, 17), (24, 17), (32, 17), (40, 17), (48, 9)]
    assert found(9, "uniform", windows=3) == [(0, 9)]


def numbered(count: int, scene: int = 10**6) -> Tensor:
    """Pictures that differ a little from one to the next, and much after each `scene` of them."""
    index = torch.arange(count)
    shades = (index % scene) * 2 + (index // scene % 2) * 120
    frames = shades.byte().view(-1, 1, 1, 1).expand(-1, 3, 64, 96).clone()
    frames[:, :, :32, 48:] = (200 - frames[:, :, :32, 48:].int()).byte()
    return frames


def written(path: Path, codec: str, frames: Tensor, rate: int = 16, **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[2:]
        stream.thread_count = 1
        for picture in frames.permute(0, 2, 3, 1).numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("long.mp4", "libx264", {"g": "24"}),
        ("one-key-frame.mkv", "libx264", {"g": "999"}),
        ("open-gop.mp4", "libx264", {"x264-params": OPEN_GOP}),
        ("open-gop.ts", "libx264", {"x264-params": OPEN_GOP}),
        ("old.avi", "mpeg4", {"bf": "2"}),
        ("small.webm", "libvpx", {}),
        ("parts.mpg", "mpeg2video", {"g": "12", "bf": "2"}),
    ],
)
def test_a_window_in_the_middle_of_a_file_has_the_frames_of_the_whole(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    rate = 25 if name.endswith("mpg") else 16
    path = written(tmp_path / name, codec, numbered(100), rate, **options)
    measured = probe(path)
    size = {"width": 48, "height": 32}
    count = frames_available(measured, measured.fps)
    whole = decode(path, frames=count, fps=measured.fps, **size)
    for first in (1, 20, 37, 60, 80):
        part = decode(path, frames=9, fps=measured.fps, start=first / measured.fps, **size)
        assert torch.equal(part, whole[first : first + 9]), f"from frame {first} on"


def test_a_window_that_cannot_be_sought_is_decoded_from_the_first_frame_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "long.mp4", "libx264", numbered(60))
    expected = decode(path, frames=5, fps=FPS, start=2.5, width=48, height=32)
    monkeypatch.setattr("av.container.InputContainer.seek", lambda *_, **__: None, raising=False)
    assert torch.equal(decode(path, frames=5, fps=FPS, start=2.5, width=48, height=32), expected)


def test_a_cut_is_a_change_that_stands_out_among_those_around_it() -> None:
    assert cut_places([1, 2, 40, 2, 1]) == [2]
    assert cut_places([30, 35, 40, 35, 30]) == [], "fast motion"
    assert cut_places([1, 1, 40, 40, 1, 1]) == [2, 3], "a flash is a scene of its own, too short to train on"
    assert cut_places([0, 0, 14, 0, 0]) == [], "a small change"
    assert cut_places([50]) == [0]
    assert cut_places([]) == []


def found(
    open_tiny: OpenTiny, folder: Path, sampling: Sampling, index: Index | None = None
) -> tuple[list[PreparedClip], list[Event]]:
    events: list[Event] = []
    form = ClipForm(96, 64, 9, FPS)
    return drained(scan(open_tiny("wan", "t2v"), folder, form, index, sampling), events.append), events


@pytest.fixture
def cut_clip(tmp_path: Path) -> Path:
    """A folder with a clip of three scenes of 20 frames."""
    folder = tmp_path / "clips"
    write_video(folder / "cut.mp4", numbered(60, scene=20), FPS)
    (folder / "cut.txt").write_text("three scenes")
    return folder


def test_no_clip_crosses_a_hard_cut_if_scenes_are_split(cut_clip: Path, open_tiny: OpenTiny, tmp_path: Path) -> None:
    assert [round(cut * FPS) for cut in hard_cuts(cut_clip / "cut.mp4")] == [20, 40]
    (tmp_path / "cache").mkdir()
    index = Index(tmp_path / "cache")
    clips, _ = found(open_tiny, cut_clip, Sampling("windows", split_scenes=True), index)
    assert [(round(clip.start * FPS), clip.bucket.frames) for clip in clips] == [
        *((0, 9), (9, 9), (20, 9), (29, 9), (40, 9), (49, 9)),
    ]
    for clip in clips:
        shades = clip_pixels(clip)[:, :, 50:, :20].float().mean((1, 2, 3))
        assert shades.diff().abs().max() < 5
    assert found(open_tiny, cut_clip, Sampling("windows", split_scenes=True), index)[0] == clips
    across, _ = found(open_tiny, cut_clip, Sampling("windows"))
    assert [round(clip.start * FPS) for clip in across] == [0, 9, 18, 27, 36, 45, 54]


def test_uniform_sampling_draws_every_window_and_the_head_is_what_it_was(cut_clip: Path, open_tiny: OpenTiny) -> None:
    (head,), events = found(open_tiny, cut_clip, Sampling())
    assert (head.start, head.scene) == (0.0, None)
    assert any("only the first 0.6 s of each" in event.message for event in events if isinstance(event, Notice))
    clips, events = found(open_tiny, cut_clip, Sampling("uniform", windows=4))
    assert not [event for event in events if isinstance(event, Notice)]
    assert [round(clip.start * FPS) for clip in clips] == [0, 17, 34, 51]
    dataset = ClipDataset(clips, Cache(cut_clip / "cache"), "", torch.float32)
    assert dataset.buckets() == [[0]]
    assert [dataset.drawn(0, place / 8) for place in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_clip_whose_scenes_are_all_too_short_is_skipped_with_their_number(
    open_tiny: OpenTiny, cut_clip: Path
) -> None:
    write_video(cut_clip / "quick.mp4", numbered(12, scene=4), FPS)
    (cut_clip / "quick.txt").write_text("scenes of four frames")
    clips, events = found(open_tiny, cut_clip, Sampling(split_scenes=True))
    assert {clip.clip.path.name for clip in clips} == {"cut.mp4"}
    assert [event.reason for event in events if isinstance(event, ClipSkipped)] == [
        "too short: 12 frames in 3 scenes at 16 frames per second, needs at least 5"
    ]
