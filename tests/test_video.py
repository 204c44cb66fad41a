"""Decoding returns the right frames and pixels, and for bad files it fails only with a clear reason."""

import math
import resource
import struct
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crepa_cli.data.clips import ClipError
from crepa_cli.data.video import decode, frames_available, probe, write_video
from crepa_cli.errors import UserError

CODECS = {
    ".mp4": ("libx264", "yuv420p"),
    ".mov": ("libx264", "yuv420p"),
    ".mkv": ("ffv1", "bgr0"),
    ".webm": ("libvpx-vp9", "yuv420p"),
    ".avi": ("mpeg4", "yuv420p"),
    ".gif": ("gif", "rgb8"),
}


def write(
    path: Path,
    pictures: Sequence[Tensor],
    *,
    rate: int = 16,
    times: Sequence[int] | None = None,
    codec: str = "",
    rotation: int = 0,
    pixel_aspect: int = 1,
    title: str = "",
) -> Path:
    """Write pictures (uint8 [3, H, W]) in the usual codec of the suffix; `times` are in 1/90000 s.

    `title` names both the file and its stream.
    """
    name, pixels = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or name, rate=rate)
        assert isinstance(stream, av.VideoStream)
        if title:
            container.metadata["title"] = stream.metadata["handler_name"] = title
        stream.height, stream.width = pictures[0].shape[1:]
        stream.pix_fmt = pixels
        stream.thread_count = 1
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 90000)
        if rotation:
            stream.set_display_rotation(rotation)
        for index, picture in enumerate(pictures):
            image = picture.permute(1, 2, 0).contiguous().numpy()
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(count: int, width: int = 32, height: int = 32) -> list[Tensor]:
    """Pictures in which picture i has the brightness 8 * i."""
    return [torch.full((3, height, width), 8 * index, dtype=torch.uint8) for index in range(count)]


def coordinates(width: int, height: int) -> Tensor:
    """A picture whose red value is the column and whose green value is the row."""
    columns, rows = torch.arange(width).expand(height, -1), torch.arange(height)[:, None].expand(-1, width)
    return torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)


def shown(path: Path, frames: int, fps: float) -> list[int]:
    """The numbers of the pictures that decoding returns."""
    clip = decode(path, frames=frames, fps=fps, width=32, height=32)
    return (clip.float().mean((1, 2, 3)) / 8).round().int().tolist()


@pytest.mark.parametrize("codec", [*CODECS, "libx264 in .avi"])
def test_every_container_gives_the_frames_that_are_shown_at_each_moment(tmp_path: Path, codec: str) -> None:
    name, _, suffix = codec.rpartition(" in ")
    path = write(tmp_path / f"clip{suffix}", numbered(24), codec=name)
    info = probe(path)
    assert (info.frames, info.width, info.height) == (24, 32, 32)
    assert info.fps == pytest.approx(16, rel=0.01)
    for fps, expected in [(16, range(24)), (8, range(0, 24, 2)), (32, [j // 2 for j in range(48)])]:
        assert frames_available(info, fps) == len(expected)
        assert shown(path, len(expected), fps) == list(expected)
    thirds = [j * 2 // 3 for j in range(36)]
    assert shown(path, 36, 24) == thirds
    assert shown(path, 5, 24) == thirds[:5]


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    gaps=st.lists(st.integers(1, 200), min_size=2, max_size=12),
    fps=st.sampled_from([8, 12, 16, 24, 25, 30]),
    suffix=st.sampled_from([".mp4", ".mkv"]),
    start=st.integers(0, 50),
)
def test_odd_timestamps(gaps: list[int], fps: int, suffix: str, start: int) -> None:
    times = [90 * (start + sum(gaps[:index])) for index in range(len(gaps) + 1)]
    # Seven ticks keep each time off the moments j / fps, so that rounding decides nothing.
    times[1:] = [time + 7 for time in times[1:]]
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name, f"clip{suffix}"), numbered(len(times)), times=times)
        info = probe(path)
        count = frames_available(info, fps)
        pictures = shown(path, count, fps)
        with pytest.raises(ClipError, match="too short"):
            shown(path, count + 1, fps)
    moments = [Fraction(j, fps) + Fraction(str(info.rounding)) for j in range(count)]
    seconds = [Fraction(time - times[0], 90000) for time in times]
    if suffix == ".mkv":
        seconds = [Fraction(round(time * 1000), 1000) for time in seconds]
        assume(not set(seconds) & set(moments))
    assert pictures[0] == 0
    assert pictures[1:] == [max(i for i, time in enumerate(seconds) if time <= moment) for moment in moments[1:]]


def test_rates_that_are_rounded_do_not_repeat_or_drop_frames(tmp_path: Path) -> None:
    times = [1001 * 90000 * index // 30000 for index in range(24)]
    path = write(tmp_path / "ntsc.mp4", numbered(24), times=times)
    for fps in (29.97, 30000 / 1001, 29.971):
        assert shown(path, 24, fps) == list(range(24))


def test_a_clip_that_is_too_short_says_what_it_has_and_what_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", numbered(10))
    with pytest.raises(ClipError, match=r"too short: it has 5 frames at 8 frames per second, 17 are needed"):
        decode(path, frames=17, fps=8, width=32, height=32)


@pytest.mark.parametrize(
    ("width", "height", "target"),
    [(200, 100, (64, 64)), (100, 200, (64, 64)), (120, 90, (48, 96)), (48, 32, (96, 64)), (64, 64, (64, 64))],
)
def test_pictures_cover_the_target_and_are_cropped_around_the_centre(
    tmp_path: Path, width: int, height: int, target: tuple[int, int]
) -> None:
    path = write(tmp_path / "clip.mkv", [coordinates(width, height)] * 2)
    picture = decode(path, frames=1, fps=16, width=target[0], height=target[1])[0].float()
    assert picture.shape == (3, target[1], target[0])
    scale = max(target[0] / width, target[1] / height)
    columns = (torch.arange(target[0]) + 0.5 - target[0] / 2) / scale + width / 2 - 0.5
    rows = (torch.arange(target[1]) + 0.5 - target[1] / 2) / scale + height / 2 - 0.5
    inner = (slice(2, -2), slice(2, -2))  # a filter mirrors or clamps at the edges
    assert (picture[0] - columns)[inner].abs().max() < 1.1
    assert (picture[1] - rows[:, None])[inner].abs().max() < 1.1


def test_shrinking_averages_instead_of_picking(tmp_path: Path) -> None:
    checkers = ((torch.arange(128)[:, None] + torch.arange(128)) % 2 * 255).to(torch.uint8).expand(3, -1, -1)
    path = write(tmp_path / "clip.mkv", [checkers] * 2)
    picture = decode(path, frames=1, fps=16, width=32, height=32).float()
    assert (picture - 127.5).abs().max() < 8


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_clips_are_brought_upright(tmp_path: Path, rotation: int) -> None:
    path = write(tmp_path / "clip.mp4", [coordinates(96, 64)] * 4, rotation=rotation)
    info = probe(path)
    upright = torch.rot90(coordinates(96, 64), rotation // 90, dims=(1, 2))
    assert (info.height, info.width) == upright.shape[1:]
    picture = decode(path, frames=1, fps=16, width=info.width, height=info.height)[0]
    assert (picture.float() - upright).abs().mean() < 6


def test_pixels_that_are_not_square_are_made_square(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [coordinates(48, 64)] * 4, pixel_aspect=2)
    info = probe(path)
    assert (info.width, info.height) == (96, 64)
    picture = decode(path, frames=1, fps=16, width=96, height=64)[0].float()
    assert (picture[0] - torch.arange(96) / 2).abs().mean() < 6


def test_decoding_stops_when_it_has_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mkv", [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8) for _ in range(24)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert decode(path, frames=5, fps=16, width=32, height=32).shape == (5, 3, 32, 32)
    with pytest.raises(ClipError):
        decode(path, frames=24, fps=16, width=32, height=32)


def test_written_clips_keep_their_frames_and_colors(tmp_path: Path) -> None:
    colors = torch.tensor([[200, 40, 90], [0, 0, 0], [255, 255, 255], [20, 220, 30]], dtype=torch.uint8)
    frames = colors[:, :, None, None].expand(-1, -1, 48, 64)
    path = tmp_path / "new" / "folder" / "clip.mp4"
    write_video(path, frames, 23.976)
    info = probe(path)
    assert (info.frames, info.width, info.height) == (4, 64, 48)
    assert info.fps == pytest.approx(23.976)
    read = decode(path, frames=4, fps=23.976, width=64, height=48)
    assert (read.int() - frames.int()).abs().max() <= 3
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


def test_the_same_frames_give_the_same_bytes_ten_times_in_a_row(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    frames = torch.randint(0, 256, (24, 3, 144, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    files = set()
    for _ in range(10):
        write_video(path, frames, 16)
        files.add(path.read_bytes())
    assert len(files) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_clip_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError, match="bytes are free in"):
            write_video(tmp_path / "clip.mp4", frames, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


NO_VIDEO = "not a video that can be read here"


def huge_gif() -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0)
        + bytes(6)
        + b","
        + bytes(4)
        + b"\x01\0\x01\0\0\x02\x02D\x01\0;"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", NO_VIDEO),
        (b"not a video", NO_VIDEO),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n", NO_VIDEO),
        (b"ffconcat version 1.0\nfile real.mp4\n", NO_VIDEO),
        (huge_gif(), "pictures of more than 67,108,864 pixels"),
        (b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\x30mdat" + bytes(20), r"incomplete: its index \(moov\) is missing"),
        (b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\x01mdat" + bytes(20), r"incomplete: its index \(moov\) is missing"),
        (b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\x10moov\0\0\0\0trak", "is damaged|no video stream"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    write(tmp_path / "real.mp4", numbered(4))
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(ClipError, match=reason):
        probe(path)
    with pytest.raises(ClipError, match=reason):
        decode(path, frames=1, fps=16, width=32, height=32)


def test_files_without_usable_pictures_are_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        silence = av.AudioFrame(format="s16", layout="mono", samples=1024)
        silence.sample_rate = 8000
        container.mux(sound.encode(silence))
    with av.open(str(tmp_path / "empty.avi"), "w") as container:
        container.add_stream("mpeg4", rate=16, width=32, height=32, pix_fmt="yuv420p")
        container.start_encoding()
    real = write(tmp_path / "real.mp4", numbered(4)).read_bytes()
    (tmp_path / "foreign.mp4").write_bytes(real.replace(b"avc1", b"zzzz"))
    write(tmp_path / "strip.mkv", numbered(2, width=320, height=16))
    for name, reason in [
        ("sound.mkv", "no video stream"),
        ("empty.avi", "has no frames"),
        ("foreign.mp4", "no video stream that can be decoded"),
        ("strip.mkv", "sides of 320 and 16 pixels"),
        ("gone.mp4", "No such file"),
        (".", "cannot be read: Is a directory"),
    ]:
        with pytest.raises(ClipError, match=reason):
            probe(tmp_path / name)


def test_odd_names_are_names(tmp_path: Path) -> None:
    for name in ["concat:a|b.mp4", "http:x.mp4", "%03d.mp4", "\udcff.mp4", "-i.mp4", "a?b#c.mp4"]:
        real = write(tmp_path / "real.mp4", numbered(3))
        assert probe(real.rename(tmp_path / name)).frames == 3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_titles_that_are_not_utf8_do_not_matter(tmp_path: Path, suffix: str) -> None:
    title = "café in été"
    path = write(tmp_path / f"clip{suffix}", numbered(4), title=title)
    content = path.read_bytes()
    assert content.count(title.encode()) == 2
    latin = title.encode("latin-1").ljust(len(title.encode()))
    path.write_bytes(content.replace(title.encode(), latin))
    assert probe(path).frames == 4
    assert shown(path, 4, 16) == list(range(4))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("samples")
    pictures = [coordinates(48, 32).roll(index, dims=2) for index in range(12)]
    return {suffix: write(folder / f"clip{suffix}", pictures).read_bytes() for suffix in CODECS}


def test_damaged_files_end_in_frames_or_a_reason_and_print_nothing(
    samples: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcomes = {"frames": 0, "reason": 0}

    @settings(max_examples=250, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def attempt(data: st.DataObject) -> None:
        suffix = data.draw(st.sampled_from(sorted(samples)))
        content = bytearray(samples[suffix])
        # Headers are where the claims are: half of the flipped bits go there.
        end = data.draw(st.sampled_from([min(1000, len(content)), len(content)])) * 8
        for bit in data.draw(st.lists(st.integers(0, end - 1), max_size=12)):
            content[bit // 8] ^= 1 << bit % 8
        path = tmp_path / f"clip{suffix}"
        path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
        try:
            info = probe(path)
            assert math.isfinite(info.duration)
            frames = min(frames_available(info, 16), 12)
            assert decode(path, frames=frames, fps=16, width=32, height=32).shape == (frames, 3, 32, 32)
            outcomes["frames"] += 1
        except ClipError:
            outcomes["reason"] += 1

    attempt()
    assert min(outcomes.values()) > 50
    assert capfd.readouterr() == ("", "")
