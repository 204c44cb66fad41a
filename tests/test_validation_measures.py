"""The measures of validation videos in the metrics file, in plain lines and in the dashboard."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from crepa_cli.events import Event, StepDone, StepSkipped, TrainingEnded, TrainingStarted, ValidationSampled
from crepa_cli.report.dashboard import Dashboard
from crepa_cli.report.metrics import MetricsFile, read_metrics, read_validations
from crepa_cli.report.plain import describe
from crepa_cli.training.validator import mean_measures

LAST = 5


def measures(step: int, still: int = 0) -> dict[str, float]:
    return {
        "saturation": 0.31,
        "contrast": 0.15,
        "stripes": 0.02,
        "temporal_flickering": 0.95 + step / 1000,
        "motion": 0.3 - step / 100,
        "still": still,
    }


def sampled(step: int, still: int = 0) -> ValidationSampled:
    return ValidationSampled(step, (Path(f"samples/step-{step:06d}/00.mp4"),), measures(step, still))


def done(step: int) -> StepDone:
    return StepDone(step, 1.0, 1.0, None, None, None, 0.0, True, None, 1e-4, 0.5, None, 0.2, 5.0, 10**9)


def events(output: Path, first: int, last: int = LAST) -> Iterator[Event]:
    """A run from a step to another, that samples before the first of all steps and after every second one."""
    yield TrainingStarted(output, first, LAST, 8, 2, 100)
    if first == 0:
        yield sampled(0)
    for step in range(first, last):
        yield StepSkipped(step, "no number") if step == 3 else done(step)
        if (step + 1) % 2 == 0:
            yield sampled(step + 1)


def record(output: Path, *happened: Event) -> list[dict[str, object]]:
    """Write events to the metrics file of a run, and return its lines."""
    path = output / "metrics.jsonl"
    metrics = MetricsFile(path)
    for event in happened:
        metrics(event)
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_measures(lines: list[dict[str, object]]) -> dict[object, object]:
    return {line["step"]: line["validation_motion"] for line in lines if "validation_motion" in line}


def test_measures_are_in_the_line_of_the_step_that_follows(tmp_path: Path) -> None:
    lines = record(tmp_path, *events(tmp_path, 0), TrainingEnded(LAST, tmp_path))
    assert [line["step"] for line in lines] == list(range(LAST))
    assert with_measures(lines) == {step: measures(step)["motion"] for step in (0, 2, 4)}
    assert {f"validation_{name}" for name in measures(0)} < lines[0].keys()
    assert read_validations(tmp_path / "metrics.jsonl") == [
        ValidationSampled(step, (), measures(step)) for step in (0, 2, 4)
    ]


def test_measures_after_the_last_step_have_a_line_which_is_no_step(tmp_path: Path) -> None:
    record(tmp_path, *events(tmp_path, 0, 4), TrainingEnded(4, tmp_path))
    assert [event.step for event in read_validations(tmp_path / "metrics.jsonl")] == [0, 2, 4]
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    assert [StepDone(**line) for line in steps if line.pop("skipped") is None] == [done(step) for step in (0, 1, 2)]


@pytest.mark.parametrize("stopped", [[], [TrainingEnded(LAST, None)]], ids=["killed", "stopped"])
@pytest.mark.parametrize("checkpoint", [0, 1, 2, 4])
def test_a_resumed_run_keeps_the_measures_up_to_its_checkpoint(
    checkpoint: int, stopped: list[Event], tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    record(whole, *events(whole, 0), TrainingEnded(LAST, whole))
    record(resumed, *events(resumed, 0), *stopped)
    record(resumed, *events(resumed, checkpoint, checkpoint))
    record(resumed, *events(resumed, checkpoint), TrainingEnded(LAST, resumed))
    for read in (read_metrics, read_validations):
        assert read(resumed / "metrics.jsonl") == read(whole / "metrics.jsonl")


def test_a_metrics_file_of_an_older_version_has_no_measures(tmp_path: Path) -> None:
    record(tmp_path, *(event for event in events(tmp_path, 0) if not isinstance(event, ValidationSampled)))
    assert read_validations(tmp_path / "metrics.jsonl") == []
    assert "steadiness" not in screen(TrainingStarted(tmp_path, LAST, LAST, 8, 2, 100))


def test_the_plain_line_of_a_validation_has_its_measures() -> None:
    line = describe(sampled(2))
    assert line.startswith("1 validation video sampled: ")
    assert line.endswith(" saturation=0.31 contrast=0.15 stripes=0.02 temporal_flickering=0.952 motion=0.28 still=0")
    assert describe(ValidationSampled(2, ())) == "0 validation videos sampled at step 2"


def screen(*happened: Event, width: int = 80, height: int = 24) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None, force_terminal=True)
    dashboard = Dashboard(console, None)
    for event in happened:
        dashboard(event)
    with console.capture() as capture:
        console.print(dashboard, end="")
    lines = capture.get().splitlines()
    assert len(lines) == height
    return "\n".join(lines)


def test_the_dashboard_shows_the_newest_validation_against_the_first(tmp_path: Path) -> None:
    assert "steadiness" not in screen(TrainingStarted(tmp_path, 0, LAST, 8, 2, 100))
    assert "│ videos at step 0:  steadiness 0.9500  motion 0.3000  saturation 0.3100" in screen(*events(tmp_path, 0, 1))
    trained = list(events(tmp_path, 0))
    assert "│ videos (step 0):  steadiness 0.9540 (0.9500)  motion 0.2600 (0.3000)   " in screen(*trained)
    assert "stripes 0.0200 (0.0200)" in screen(*trained, width=160)
    assert "│ 2 still videos (step 0):  steadiness" in screen(*trained, sampled(6, still=2))


def test_the_dashboard_of_a_resumed_run_knows_the_first_validation(tmp_path: Path) -> None:
    record(tmp_path, *events(tmp_path, 0))
    shown = screen(*events(tmp_path, 2, 3))
    assert "videos (step 0):  steadiness 0.9520 (0.9500)" in shown


def test_means_count_the_videos_that_do_not_move() -> None:
    picture = torch.randint(256, (1, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    still, dark = picture.repeat(3, 1, 1, 1), torch.zeros(3, 3, 24, 24, dtype=torch.uint8)
    moving = torch.cat([picture, picture.roll(4, -1), picture.roll(8, -1)])
    one, both = mean_measures([still]), mean_measures([still, moving, dark])
    assert (one["still"], both["still"]) == (1, 2)
    assert one["temporal_flickering"] == 1
    assert both["saturation"] == pytest.approx(2 / 3 * one["saturation"])
