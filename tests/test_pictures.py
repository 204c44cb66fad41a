"""Pictures of a run: its curves, and contact sheets of its videos."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import RunCrepa
from PIL import Image

from crepa_cli.data.sheet import COLUMNS, LARGEST, LINE_HEIGHT, frame_row, write_sheet
from crepa_cli.report.metrics import read_metrics
from crepa_cli.report.plot import curve_points, draw_metrics


def metrics(steps: int) -> list[dict[str, float | None]]:
    return [
        {
            "step": step,
            "loss": 1 / (step + 1),
            "diffusion_loss": 2 / (step + 1),
            "crepa_loss": None if step > steps // 2 else -0.5,
            "crepa_similarity": None if step > steps // 2 else 0.5,
            "crepa_similarity_ema": 0.5,
            "crepa_coefficient": 0.5,
        }
        for step in range(steps)
    ]


def test_curves_are_the_same_bytes_for_the_same_run_and_stay_small() -> None:
    picture = draw_metrics(metrics(40), 0.85)
    assert picture == draw_metrics(metrics(40), 0.85)
    text = "".join(ElementTree.fromstring(picture).itertext())
    for label in ("total", "diffusion", "alignment", "lambda (coefficient)", "similarity", "average", "step"):
        assert label in text
    assert "threshold 0.85" in text
    assert len(draw_metrics(metrics(20_000), None)) < 200_000


def test_curves_of_a_run_without_steps_are_empty() -> None:
    assert b"<svg" in draw_metrics([], None)


def test_a_finished_run_has_curves_and_its_card_shows_them(demo: Path) -> None:
    run = demo / "runs" / "wan-t2v-1"
    assert (run / "curves.svg").read_bytes() == draw_metrics(read_metrics(run / "metrics.jsonl"), 0.5)
    assert "](curves.svg)" in (run / "README.md").read_text()


def test_resuming_draws_the_curves_of_the_steps_so_far(
    demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    run = demo / "runs" / "drawn-again"
    flags = ["--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", 2, "--output", run]
    assert run_crepa("train", *flags, "--set", "validation.every=0") == 0
    (run / "curves.svg").unlink()
    assert run_crepa("train", "--resume", "--plain", "--output", run) == 0
    assert (run / "curves.svg").exists()


def test_a_sheet_shows_frames_of_each_video_from_first_to_last(tmp_path: Path) -> None:
    levels = torch.arange(15, dtype=torch.uint8).view(-1, 1, 1, 1) * 10
    row = frame_row(levels.expand(-1, 3, 4, 6))
    assert row.size == (6 * COLUMNS, 4)
    reds = row.getchannel("R")
    assert [reds.getpixel((6 * column + 3, 2)) for column in range(COLUMNS)] == [0, 20, 40, 60, 80, 100, 120, 140]
    write_sheet(tmp_path / "sheet.png", [row, frame_row(levels[:1].expand(-1, 3, 4, 6))])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * COLUMNS, 8)


def test_large_frames_are_made_smaller() -> None:
    row = frame_row(torch.zeros(2, 3, 480, 832, dtype=torch.uint8))
    assert row.size == (2 * LARGEST[0], 185)


def test_validation_leaves_a_sheet(demo: Path) -> None:
    with Image.open(demo / "runs" / "wan-t2v-1" / "samples" / "step-000030" / "sheet.png") as sheet:
        # The video of step 0, that of this step and a training clip, each with a line above and one below.
        assert sheet.size == (8 * 96, 3 * (64 + 2 * LINE_HEIGHT))


def test_curves_of_long_runs_start_and_end_with_exact_values() -> None:
    """The coefficient of a warmup starts at 0, whatever the mean of the first stretch is."""
    values: list[tuple[int, float | None]] = [(step, min(step / 1000, 0.5)) for step in range(10_000)]
    points = curve_points(values)
    assert [points[0], points[-1]] == [(0, 0.0), (9_999, 0.5)]
    assert len(points) < 600
    assert all(before[0] < after[0] for before, after in itertools.pairwise(points))
    assert all(abs(value - min(step / 1000, 0.5)) < 1e-2 for step, value in points)
    assert curve_points([(step, None if step > 5 else 1.0) for step in range(2_000)])[-1] == (5, 1.0)
    assert curve_points([(step, None) for step in range(2_000)]) == []
