"""The dashboard's screens for recorded events, compared with those in `screens/`.

`UPDATE_SCREENS=1 pytest tests/test_dashboard.py` rewrites them.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from crepa_cli.alignment import CoefficientSchedule
from crepa_cli.alignment.schedule import Scheduler
from crepa_cli.events import (
    AlignmentDropped,
    CheckpointSaved,
    ClipSkipped,
    Event,
    Notice,
    Progress,
    RunOpened,
    StepDone,
    TrainingEnded,
    TrainingStarted,
    ValidationSampled,
)
from crepa_cli.report.chart import BRAILLE
from crepa_cli.report.curves import BUCKETS, Curve
from crepa_cli.report.dashboard import Dashboard
from crepa_cli.report.metrics import MetricsFile, read_metrics
from crepa_cli.report.panels import View
from crepa_cli.report.plot import draw_metrics
from crepa_cli.report.records import prints_as_notices, records_as_notices
from crepa_cli.report.state import phase

SCREENS = Path(__file__).parent / "screens"
SIZES = [(60, 24), (80, 24), (120, 40), (200, 50)]
GB = 10**9
RUN = Path("runs/wan-t2v-1")
LOADING = 'pipeline = WanPipeline.from_pretrained("checkpoint")\npipeline.load_lora_weights("weights")'


def schedule(scheduler: Scheduler, threshold: float | None = 0.85, **settings: object) -> CoefficientSchedule:
    return CoefficientSchedule(
        peak=0.5,
        total_steps=5000,
        scheduler=scheduler,
        warmup_steps=100,
        similarity_threshold=threshold,
        **settings,  # type: ignore[arg-type]
    )


def recorded_events(plan: CoefficientSchedule, steps: int, *, aligned: bool = True) -> Iterator[Event]:
    """The first `steps` of a run of 5,000: losses fall in waves, the similarity rises to 0.9."""
    yield RunOpened(RUN, 80 * GB, LOADING, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, t2v", "1 x NVIDIA RTX 4090")
    yield Progress("scanning", 400, 400)
    yield ClipSkipped("clips/broken.mp4", "no video stream")
    yield Progress("latents", 399, 399)
    yield TrainingStarted(RUN, 0, 5000, 399, 150, 12_345_678, 500, 250)
    dropped = not aligned
    for step in range(steps):
        if not dropped and plan.finished(step):
            dropped = True
            reason = (
                f"similarity average {plan.similarity_ema:.3f} >= 0.85" if plan.cut_off else "cutoff_step 1000 reached"
            )
            yield AlignmentDropped(step, reason)
        coefficient = 0.0 if dropped else plan.coefficient(step)
        cut_off = aligned and (plan.cut_off or dropped)
        similarity = None if dropped else 0.9 - 0.8 * math.exp(-step / 600) + 0.02 * math.sin(step)
        if similarity is not None:
            plan.observe(similarity)
        diffusion = 0.1 + 0.9 * math.exp(-step / 800) + 0.03 * math.sin(step / 7)
        crepa = None if similarity is None else -1.7 * similarity
        yield StepDone(
            step=step,
            loss=diffusion + coefficient * (crepa or 0),
            diffusion_loss=diffusion,
            crepa_loss=crepa,
            crepa_weighted_loss=None if crepa is None else coefficient * crepa,
            crepa_similarity=similarity,
            crepa_self_similarity=None if similarity is None else similarity + 0.05,
            crepa_similarity_ema=plan.similarity_ema,
            crepa_coefficient=coefficient,
            crepa_cutoff=cut_off,
            layersync_loss=None,
            learning_rate=1e-4,
            grad_norm=0.5321,
            projector_grad_norm=None if crepa is None else 1.25,
            step_seconds=0.213,
            samples_per_second=4 / 0.213,
            peak_memory_bytes=12 * GB,
            data_seconds=0.002,
            forward_seconds=0.07,
            backward_seconds=0.12,
            optimizer_seconds=None if step == 0 else 0.02,
        )
        if step + 1 in (500, 1000, 2000):
            yield CheckpointSaved(step + 1, RUN / f"checkpoints/step-{step + 1:06d}")
            yield ValidationSampled(step + 1, (RUN / f"samples/step-{step + 1:06d}/00.mp4",))
        if step == 600:
            yield Notice("UserWarning: a library has a long warning for those who train, " * 3)


CASES: dict[str, tuple[Callable[[], CoefficientSchedule | None], int]] = {
    "preparation": (lambda: schedule("constant"), -1),
    "start": (lambda: schedule("constant"), 0),
    "warmup": (lambda: schedule("cosine", end=0.1), 38),
    "decaying": (lambda: schedule("cosine", end=0.1, threshold=None), 1200),
    "decayed": (lambda: schedule("linear", end=0.1, decay_steps=700), 1200),
    "constant": (lambda: schedule("constant"), 700),
    "cutoff_step": (lambda: schedule("constant", cutoff_step=1000), 1100),
    "cut_off": (lambda: schedule("cosine", end=0.1), 2001),
    "cut_off_for_now": (lambda: schedule("cosine", end=0.1, threshold_mode="recoverable"), 2001),
    "no_alignment": (lambda: None, 300),
}


def dashboard_of(case: str, console: Console) -> Dashboard:
    make_plan, steps = CASES[case]
    plan = make_plan()
    now = 0.0
    dashboard = Dashboard(console, plan, clock=lambda: now)
    for event in recorded_events(plan or schedule("constant"), steps, aligned=plan is not None):
        if steps < 0 and isinstance(event, TrainingStarted):
            break
        now += 0.25
        dashboard(event)
    return dashboard


@cache
def recorded(case: str) -> Dashboard:
    """A dashboard that is drawn and not changed."""
    return dashboard_of(case, Console(file=io.StringIO()))


def screen_of(case: str, width: int, height: int) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(recorded(case), end="")
    return capture.get()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_screen_is_as_it_was(case: str, width: int, height: int) -> None:
    lines = [line.rstrip() for line in screen_of(case, width, height).splitlines()]
    assert len(lines) <= height
    assert all(cell_len(line) <= width for line in lines)
    stored = SCREENS / f"{case}-{width}x{height}.txt"
    if os.environ.get("UPDATE_SCREENS"):
        stored.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert lines == stored.read_text(encoding="utf-8").splitlines()


WHOLE_VALUES = {
    "cut_off": [
        "2,001 of 5,000",
        "40%",
        "ETA 0:12:33",
        "0.1790",
        "12.00 of 80.00 GB",
        "18.78",
        "1,774:",
        "0.8501",
        "57%",
    ],
    "warmup": ["38 of 5,000", "0.1850", "warmup 37/100", "-0.2295", "0.1081", "1.00e-04", "0.532", "12,345,678"],
}


@pytest.mark.parametrize("case", WHOLE_VALUES)
@pytest.mark.parametrize(("width", "height"), SIZES[1:])
def test_no_value_is_cut(case: str, width: int, height: int) -> None:
    screen = " ".join(screen_of(case, width, height).split())
    for value in WHOLE_VALUES[case]:
        assert re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", screen), value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("width", "height"), [(20, 5), (41, 12), (79, 23), (300, 100)])
def test_any_window_is_filled_and_not_left(case: str, width: int, height: int) -> None:
    lines = screen_of(case, width, height).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    if case != "preparation":
        assert len(lines) == height


@pytest.mark.parametrize("case", CASES)
def test_the_panel_of_events_has_no_empty_lines(case: str) -> None:
    for width in range(40, 200, 37):
        for height in range(24, 70, 9):
            lines = screen_of(case, width, height).splitlines()
            start = next(row for row, line in enumerate(lines) if line.startswith("╭─ events"))
            assert all(line.strip("│ ") for line in lines[start:])


@pytest.mark.parametrize("case", CASES)
def test_no_color_vanishes_on_a_dark_or_a_light_background(case: str) -> None:
    """The color of the text, or one of the six that every scheme tells from its background."""
    console = Console(file=io.StringIO(), width=120, height=40, color_system="truecolor", force_terminal=True)
    with console.capture() as capture:
        console.print(recorded(case), end="")
    codes = set(";".join(re.findall(r"\x1b\[([\d;]*)m", capture.get())).split(";"))
    assert codes <= {"0", "1", "2", "31", "32", "33", "34", "35", "36"}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
@pytest.mark.parametrize("case", ["preparation", "cut_off"])
def test_a_screen_has_only_characters_of_its_encoding(case: str, encoding: str) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=screen, width=80, height=24, color_system=None, force_terminal=True)
    console.print(recorded(case), end="")
    screen.flush()


@pytest.mark.parametrize("width", range(30, 130, 14))
def test_every_number_on_a_screen_is_one_of_the_wide_screen(width: int) -> None:
    def numbers(width: int, height: int) -> set[str]:
        lines = screen_of("cut_off", width, height).splitlines()
        heads = [line for line in lines if re.search(r"epoch|memory|diffusion|lambda 0|own|held out|similarity:", line)]
        return set(re.findall(r"[\d.,]*\d", " ".join(heads)))

    assert numbers(width, 24) - numbers(400, 60) == set()


def test_the_last_view_has_no_gap_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    dashboard = dashboard_of("warmup", Console(width=100, height=60))
    dashboard(TrainingEnded(38, None))
    dashboard.__exit__(None, None, None)
    lines = capsys.readouterr().out.splitlines()
    end = next(row for row, line in enumerate(lines) if line.startswith("Lowest"))
    assert lines[0].startswith("╭─ training")
    assert lines[end - 1].startswith("╰─")


def test_the_end_leaves_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    dashboard = dashboard_of("warmup", Console(width=80, height=24))
    dashboard(TrainingEnded(38, None))
    assert dashboard.summary.lines()[-1] == f"Resume with: crepa train --resume --output {RUN}"
    dashboard(TrainingEnded(5000, RUN / "weights"))
    dashboard.__exit__(None, None, None)
    printed = capsys.readouterr().out
    assert "Lowest diffusion loss (smoothed): 0.9699 at step 37" in printed
    assert re.search(r"Highest similarity: 0\.16\d\d at step 3\d\n", printed)
    assert f"Weights: {RUN}/weights" in printed
    assert printed.endswith(f"Train further: crepa train --resume --output {RUN} --steps 10000\n")
    assert '    pipeline.load_lora_weights("weights")' in printed


def test_a_run_that_goes_on_shows_its_earlier_steps(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for event in recorded_events(schedule("cosine", end=0.1), 2001):
        if isinstance(event, StepDone):
            metrics(event)
    dashboard = Dashboard(Console(), schedule("cosine", end=0.1))
    dashboard(TrainingStarted(tmp_path, 1900, 5000, 399, 150, 1))
    assert dashboard.state.losses["total"].curve.steps == 1900
    assert phase(dashboard.state) == "cut off at step 1,774: similarity average 0.850 >= 0.85"
    assert dashboard.summary.lines()[1].startswith("Highest similarity: 0.87")


def test_a_run_of_an_older_version_shows_its_earlier_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for event in recorded_events(schedule("constant"), 5):
        if isinstance(event, StepDone):
            metrics(event)
    newer = {"crepa_weighted_loss", "crepa_self_similarity"}
    newer |= {f"{part}_seconds" for part in ("data", "forward", "backward", "optimizer")}
    older = [{key: value for key, value in line.items() if key not in newer} for line in read_metrics(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in older))
    dashboard = Dashboard(Console(), schedule("constant"))
    dashboard(TrainingStarted(tmp_path, 5, 5000, 399, 150, 1))
    assert dashboard.state.losses["total"].curve.steps == 5
    assert b"<svg" in draw_metrics(older, None)


def test_a_curve_is_bounded_and_keeps_the_means() -> None:
    curve = Curve()
    for step in range(100_000):
        curve.add(None if step < 50_000 else float(step))
    assert len(curve.buckets) <= BUCKETS
    columns = curve.columns(4)
    assert columns[0] is None
    assert columns[3] == pytest.approx(87_500, rel=0.02)
    assert sum(count for _, count in curve.buckets) == 50_000


def test_a_curve_reaches_both_edges_at_any_width() -> None:
    curve = Curve()
    curve.add(0.0)
    for step in range(1, 700):
        curve.add(float(step))
        for width in range(1 + step % 7, 120, 7):
            points = View(BRAILLE).line(curve, (0, step), width, "").points
            assert (points[0][0], points[-1][0]) == (0, 1)


def test_what_libraries_log_warn_and_print_becomes_one_event_each(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = []
    logging.captureWarnings(True)
    try:
        with prints_as_notices(events.append), records_as_notices(events.append, logging.WARNING):
            for _ in range(2):
                logging.getLogger("transformers.models").warning("a weight\nis %s", "new")
            logging.getLogger("transformers.models").info("not shown")
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("soon gone", DeprecationWarning, stacklevel=1)
            sys.stdout.write("printed, half\n")
            sys.stderr.write("and no more")
        logging.getLogger("transformers.models").warning("after the run")
    finally:
        logging.captureWarnings(False)
    expected = ["transformers.models: a weight is new", "DeprecationWarning: soon gone", "printed, half"]
    assert events == [Notice(message) for message in expected]
    assert capsys.readouterr().out == ""


def test_control_characters_do_not_reach_the_screen() -> None:
    console = Console(file=io.StringIO(), width=80, height=24, color_system=None, force_terminal=True)
    dashboard = dashboard_of("start", console)
    dashboard(Notice("one\x1b[2Jtwo\r\nthree\tfour"))
    with console.capture() as capture:
        console.print(dashboard)
    assert "one [2Jtwo three four" in capture.get()
    assert "\x1b[2J" not in capture.get()
