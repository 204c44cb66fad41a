"""The strip of frames of validation videos in the dashboard."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from test_dashboard import LOADING, dashboard_of
from torch import Tensor

from crepa_cli.data.video import write_video
from crepa_cli.events import RunOpened, TrainingStarted, ValidationSampled
from crepa_cli.profile import Profile
from crepa_cli.report.dashboard import Dashboard
from crepa_cli.report.events_file import EventsFile
from crepa_cli.report.watch import WatchedRun
from crepa_cli.runs.folder import RunFolder
from crepa_cli.settings import resolve

PROMPT = "a paper boat drifts down a stream, " * 10
CELL = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀\x1b\[0m")
FRAMES = 9


def video(color: int) -> Tensor:
    """Frames of 48 x 32 that get brighter in one color; their lower half is black."""
    frames = torch.zeros(FRAMES, 3, 32, 48, dtype=torch.uint8)
    frames[:, color, :16] = torch.arange(50, 50 + 20 * FRAMES, 20, dtype=torch.uint8)[:, None, None]
    return frames


@pytest.fixture
def profile() -> Profile:
    return resolve("t2v", {"model.family": "wan"}, [f'validation.prompts=["{PROMPT}"]'], demo=True).profile


@pytest.fixture
def run(tmp_path: Path, profile: Profile) -> RunFolder:
    """A run with a red video of step 0 and a green one of step 1,250."""
    run = RunFolder(tmp_path / "run")
    for step, color in ((0, 0), (1250, 1)):
        write_video(run.samples(step) / "00.mp4", video(color), 8)
    run.write_profile(profile)
    return run


def sampled(run: RunFolder, step: int) -> ValidationSampled:
    return ValidationSampled(step, (run.samples(step) / "00.mp4",), {"still": 0.0, "motion": 0.5})


def dashboard_with(run: RunFolder, *steps: int) -> Dashboard:
    dashboard = dashboard_of("warmup", Console(file=io.StringIO()))
    dashboard(RunOpened(run.path, 0, LOADING, "tiny, t2v", "1 x CPU"))
    dashboard(TrainingStarted(run.path, 0, 5000, 8, 2, 100))
    for step in steps:
        dashboard(sampled(run, step))
    return dashboard


def drawn(dashboard: Dashboard, width: int, height: int, **options: object) -> str:
    settings: dict[str, object] = {"file": io.StringIO(), "color_system": "truecolor", "no_color": False} | options
    console = Console(width=width, height=height, force_terminal=True, **settings)  # type: ignore[arg-type]
    with console.capture() as capture:
        console.print(dashboard, end="")
    return capture.get()


def colors(line: str) -> list[list[int]]:
    """The upper and the lower color of each half block in a line."""
    return [[int(value) for value in cell] for cell in CELL.findall(line)]


def test_the_newest_video_is_shown_below_that_of_the_first_step(run: RunFolder) -> None:
    lines = [line for line in drawn(dashboard_with(run, 0, 1250), 120, 40).splitlines() if "▀" in line]
    size = len(lines) // 2
    assert [line for line in lines if "step " in line] == [lines[0], lines[size]]
    assert "step 0 " in lines[0]
    assert "step 1,250 " in lines[size]
    (across, *others) = map(len, re.findall("▀+", re.sub(r"\x1b\[[\d;]*m", "", lines[0])))
    assert set(others) == {across}
    assert across / (2 * size) == pytest.approx(48 / 32, rel=0.1)
    for first, color in ((0, 0), (size, 1)):
        upper = colors(lines[first])
        brightness = [cell[color] for cell in upper[across // 2 :: across]]
        assert brightness == pytest.approx([50 + 20 * (frame * 8 // 5) for frame in range(6)], abs=8)
        assert max(max(cell[1 - color], cell[2]) for cell in upper) < 30
        assert max(map(max, colors(lines[first + size - 1]))) < 30


def test_the_prompt_is_shortened(run: RunFolder) -> None:
    title = next(line for line in drawn(dashboard_with(run, 0), 120, 40).splitlines() if "validation video: " in line)
    assert "a paper boat drifts" in title
    assert "... " in title


@pytest.mark.parametrize(
    "options",
    [{"no_color": True}, {"color_system": None}, {"color_system": "standard"}],
    ids=["no_color", "none", "16 colors"],
)
def test_a_terminal_without_colors_shows_no_strip(run: RunFolder, options: dict[str, object]) -> None:
    screen = drawn(dashboard_with(run, 0, 1250), 120, 40, **options)
    assert "▀" not in screen
    assert "validation video:" not in screen


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", False), ("cp1252", False), ("cp437", True)])
def test_a_strip_needs_block_characters(run: RunFolder, encoding: str, *, shown: bool) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert ("▀▀" in re.sub(r"\x1b\[[\d;]*m", "", drawn(dashboard_with(run, 0), 120, 40, file=stream))) == shown


def test_256_colors_are_enough(run: RunFolder) -> None:
    assert re.search(r"38;5;\d+;48;5;\d+m▀", drawn(dashboard_with(run, 0), 120, 40, color_system="256"))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 31), (30, 40)])
def test_a_small_window_is_as_without_videos(run: RunFolder, width: int, height: int) -> None:
    assert "validation video:" not in drawn(dashboard_with(run, 0, 1250), width, height)


def test_every_window_is_filled(run: RunFolder) -> None:
    dashboard = dashboard_with(run, 0, 1250)
    for width in range(20, 220, 49):
        for height in range(8, 70, 11):
            lines = re.sub(r"\x1b\[[\d;]*m", "", drawn(dashboard, width, height)).splitlines()
            assert [cell_len(line) for line in lines] == [width] * height


def test_a_video_is_read_once(run: RunFolder) -> None:
    dashboard = dashboard_with(run, 0, 1250)
    before = drawn(dashboard, 120, 40)
    for step in (0, 1250):
        (run.samples(step) / "00.mp4").unlink()
    assert drawn(dashboard, 120, 40) == before
    assert "▀" in drawn(dashboard, 150, 50)


@pytest.mark.parametrize("content", [None, b"no video"])
def test_a_video_that_cannot_be_read_is_not_shown(run: RunFolder, content: bytes | None) -> None:
    for step in (0, 1250):
        path = run.samples(step) / "00.mp4"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    assert "▀" not in drawn(dashboard_with(run, 0, 1250), 120, 40)


def test_a_resumed_run_and_a_copied_one_show_their_videos(run: RunFolder, profile: Profile, tmp_path: Path) -> None:
    listener = EventsFile(run.events)
    started = TrainingStarted(run.path, 0, 5000, 8, 2, 100)
    for event in (RunOpened(run.path, 0, LOADING, "tiny, t2v", "1 x CPU"), started):
        listener(event)
    for step in (0, 1250):
        listener(sampled(run, step))
    copy = run.path.rename(tmp_path / "copy")
    dashboard = Dashboard(Console(file=io.StringIO()), None)
    for _, found in WatchedRun(RunFolder(copy), profile).poll():
        dashboard(found)
    assert "step 1,250" in drawn(dashboard, 120, 40)

    lines = ['{"step": 0, "validation_still": 0.0}', '{"step": 1250, "validation_still": 0.0}']
    (copy / "metrics.jsonl").write_text("\n".join(lines))
    resumed = Dashboard(Console(file=io.StringIO()), None)
    resumed(RunOpened(copy, 0, LOADING, "tiny, t2v", "1 x CPU"))
    resumed(TrainingStarted(copy, 1250, 5000, 8, 2, 100))
    assert "step 1,250 " in drawn(resumed, 120, 40)
    assert "▀" in drawn(resumed, 120, 40)
