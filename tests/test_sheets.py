"""Contact sheets of validation videos: labels, the video of step 0, a training clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor

from crepa_cli.data.buckets import Bucket
from crepa_cli.data.clips import Clip
from crepa_cli.data.scan import PreparedClip
from crepa_cli.data.sheet import COLUMNS, LINE_HEIGHT, labeled_row, write_line
from crepa_cli.data.video import probe, write_video
from crepa_cli.runs.folder import RunFolder
from crepa_cli.training.sheets import SampleSheets

WIDTH, HEIGHT, FPS = 64, 48, 8
ROW = HEIGHT + 2 * LINE_HEIGHT


def video(color: int, frames: int = 9) -> Tensor:
    clip = torch.zeros(frames, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    clip[:, color] = 200
    return clip


@pytest.fixture(name="clip")
def _clip(tmp_path: Path) -> PreparedClip:
    """A blue training clip."""
    path = tmp_path / "blue.mp4"
    write_video(path, video(2), FPS)
    return PreparedClip(Clip(path, ("a blue wall",)), probe(path), Bucket(9, HEIGHT, WIDTH), "", FPS)


@pytest.fixture(name="run")
def _run(tmp_path: Path) -> RunFolder:
    """A run that has a red video of its first prompt at step 0, and none of its second."""
    run = RunFolder(tmp_path / "run")
    write_video(run.samples(0) / "00.mp4", video(0), FPS)
    return run


def colors(path: Path) -> list[int]:
    """The strongest color of the first frame in each row."""
    with Image.open(path) as sheet:
        assert sheet.size == (COLUMNS * WIDTH, sheet.height // ROW * ROW)
        middles = range(LINE_HEIGHT + HEIGHT // 2, sheet.height, ROW)
        pixels = [sheet.convert("RGB").getpixel((WIDTH // 2, row)) for row in middles]
    return [max(range(3), key=lambda color: pixel[color]) for pixel in pixels]  # type: ignore[index]


def test_a_sheet_has_the_video_of_step_0_above_the_new_one_and_a_clip_below(run: RunFolder, clip: PreparedClip) -> None:
    sheets = SampleSheets(run, ["a wall", "a door"], FPS, clip)
    sheets.write(50, {1: video(0), 0: video(1)})
    assert colors(run.sheet(50)) == [0, 1, 0, 2]
    sheets.write(0, {0: video(0)})
    assert colors(run.sheet(0)) == [0, 2]


def test_what_cannot_be_read_has_no_row(run: RunFolder, clip: PreparedClip) -> None:
    (run.samples(0) / "00.mp4").write_bytes(b"damaged")
    gone = replace(clip, clip=Clip(run.path / "gone.mp4", ("",)))
    SampleSheets(run, ["a wall"], FPS, gone).write(50, {0: video(1)})
    assert colors(run.sheet(50)) == [1]


def written(text: str, width: int) -> Image.Image:
    line = Image.new("RGB", (width, LINE_HEIGHT))
    write_line(line, (0, 0), text, width)
    return line


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


def test_a_row_has_its_label_above_and_the_time_of_each_frame_below() -> None:
    row = labeled_row(video(0, frames=2 * COLUMNS - 1), FPS, "step 50: a wall")
    assert row.crop((0, 0, row.width, LINE_HEIGHT)).getbbox()
    for column in range(COLUMNS):
        time = row.crop((column * WIDTH, LINE_HEIGHT + HEIGHT, (column + 1) * WIDTH, row.height))
        assert same(time, written(f"{column / 4:.2f} s", WIDTH))


@pytest.mark.parametrize("text", ["i" * 500, "W" * 500, "a wall " * 100])
def test_a_long_text_is_cut_to_the_width(text: str) -> None:
    wide, line = written(text, 2000), written(text, 200)
    assert (bounds := line.getbbox()) is not None
    assert 180 < bounds[2] <= 200
    # As far as it goes it is the same text, up to the dots.
    assert same(line.crop((0, 0, 170, LINE_HEIGHT)), wide.crop((0, 0, 170, LINE_HEIGHT)))
    assert not same(line, wide.crop((0, 0, 200, LINE_HEIGHT)))
    assert written(text, 5).getbbox() is None
