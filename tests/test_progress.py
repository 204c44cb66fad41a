"""Signs of life while clips are prepared and blocks are measured."""

from __future__ import annotations

import io
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import CREPA
from rich.console import Console

from crepa_cli import api
from crepa_cli.cli.view import open_view
from crepa_cli.events import (
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
from crepa_cli.report.dashboard import Dashboard
from crepa_cli.report.plain import PlainLines, describe
from crepa_cli.requests import Requests

RUN = Path("runs/wan-t2v-1")


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain_lines(clock: Clock) -> tuple[PlainLines, io.StringIO]:
    screen = io.StringIO()
    return PlainLines(Console(file=screen, width=200), 5, clock=clock), screen


def test_a_stage_has_a_line_at_its_start_at_its_end_and_every_10_seconds(clock: Clock) -> None:
    lines, screen = plain_lines(clock)
    lines(Progress("latents", 0, 20, "loading the VAE"))
    for done in range(20):
        lines(Progress("latents", done, 20, f"clip-{done}.mp4"))
        clock.now += 4
    lines(Progress("latents", 20, 20))
    assert screen.getvalue().splitlines() == [
        "latents: 0/20, loading the VAE",
        *(f"latents: {done}/20, clip-{done}.mp4, {left} left" for done, left in EVERY_THIRD),
        "latents: 20/20",
    ]


EVERY_THIRD = [(3, "68 s"), (6, "56 s"), (9, "44 s"), (12, "32 s"), (15, "20 s"), (18, "8 s")]


def test_an_item_that_takes_a_minute_has_a_line_every_10_seconds(clock: Clock) -> None:
    lines, screen = plain_lines(clock)
    lines(Progress("latents", 0, 20, "clip-0.mp4"))
    clock.now += 5
    lines(Progress("latents", 1, 20, "clip-1.mp4"))
    for _ in range(60):
        clock.now += 1
        lines.beat()
    lines(TrainingStarted(RUN, 0, 60, 20, 10, 1000))
    said = screen.getvalue().splitlines()
    assert said[0] == "latents: 0/20, clip-0.mp4"
    assert said[1] == "latents: 1/20, clip-1.mp4, 5 s so far, 90 s left"
    assert said[2:-1] == [
        f"latents: 1/20, clip-1.mp4, {seconds} s so far, {95 - seconds} s left" for seconds in (15, 25, 35, 45, 55)
    ]
    assert said[-1].startswith("training from step 0")


def test_a_step_and_a_validation_that_take_a_minute_have_a_line_every_10_seconds(clock: Clock) -> None:
    lines, screen = plain_lines(clock)
    waits: dict[Event, list[str]] = {
        TrainingStarted(RUN, 4, 60, 20, 10, 1000): ["step 4 of 60: 10 s so far", "step 4 of 60: 20 s so far"],
        step_done(4): ["step 5 of 60: 10 s so far", "step 5 of 60: 20 s so far"],
        Progress("validation", 0, 2, "sampling videos"): [
            "validation: 0/2, sampling videos, 10 s so far",
            "validation: 0/2, sampling videos, 20 s so far",
        ],
        ValidationSampled(5, (RUN / "00.mp4",)): ["step 5 of 60: 10 s so far", "step 5 of 60: 20 s so far"],
        TrainingEnded(5, None): [],
    }
    for event, said in waits.items():
        lines(event)
        printed = len(screen.getvalue().splitlines())
        for _ in range(20):
            clock.now += 1
            lines.beat()
        assert screen.getvalue().splitlines()[printed:] == said


def test_between_two_stages_the_finished_one_is_not_repeated(clock: Clock) -> None:
    lines, screen = plain_lines(clock)
    lines(Progress("scanning", 1, 1))
    clock.now += 12
    lines.beat()
    assert screen.getvalue().splitlines() == ["scanning: 1/1", "after scanning: preparing what comes next, 12 s so far"]


def test_the_first_and_the_last_step_have_a_line(clock: Clock) -> None:
    lines, screen = plain_lines(clock)
    lines(TrainingStarted(RUN, 3, 13, 20, 10, 1000))
    for step in range(3, 13):
        lines(step_done(step))
    assert printed_steps(screen) == [3, 5, 10, 12]


def test_a_step_says_how_many_there_are_and_how_long_the_rest_takes(clock: Clock) -> None:
    lines, screen = plain_lines(clock)
    lines(TrainingStarted(RUN, 10, 21, 20, 10, 1000))
    clock.now += 6
    lines(step_done(10))
    assert screen.getvalue().endswith(" steps=21 seconds_left=60\n")


def test_the_last_step_of_a_run_that_is_stopped_has_a_line(clock: Clock) -> None:
    lines, screen = plain_lines(clock)
    lines(TrainingStarted(RUN, 0, 60, 20, 10, 1000))
    for step in range(8):
        lines(step_done(step))
    lines(CheckpointSaved(8, RUN / "checkpoints/step-000008"))
    lines(TrainingEnded(8, None))
    assert printed_steps(screen) == [0, 5, 7]


def printed_steps(screen: io.StringIO) -> list[int]:
    return [int(line.split()[1]) for line in screen.getvalue().splitlines() if line.startswith("step ")]


def step_done(step: int) -> StepDone:
    values = dict.fromkeys((field.name for field in fields(StepDone)), 0.0)
    return StepDone(**(values | {"step": step}))  # type: ignore[arg-type]


@pytest.mark.parametrize("event", [Notice("the tracker failed"), ClipSkipped("clip.mp4", "too short")])
def test_quiet_prints_problems_on_standard_error(
    event: Event, demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    profile = api.resolve("t2v", {"model.family": "wan"}, demo=True).profile
    with open_view(profile, Console(), Requests(), plain=False, quiet=True, log_level="warning") as (listener,):
        for one in (RunOpened(RUN, 0, ""), Progress("scanning", 1, 1), event, step_done(0), TrainingEnded(1, RUN)):
            listener(one)
    printed = capsys.readouterr()
    assert printed.err == f"{describe(event)}\n"
    assert not printed.out


def test_lines_come_by_themselves_while_no_event_does() -> None:
    written = threading.Event()

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if "clip-1.mp4, 0 s so far" in text:
                written.set()
            return super().write(text)

    lines = PlainLines(Console(file=Screen(), width=200), 5, quiet=0.01)
    with lines:
        lines(Progress("latents", 1, 20, "clip-1.mp4"))
        assert written.wait(30)
    assert not lines.thread.is_alive()


def test_names_are_shortened_and_cannot_steer_the_terminal(clock: Clock) -> None:
    lines, screen = plain_lines(clock)
    lines(Progress("latents", 0, 1, "\x1b[2J" + "long " * 50))
    (line,) = screen.getvalue().splitlines()
    assert line.startswith("latents: 0/1, [2Jlong")
    assert line.endswith("...")
    assert len(line) < 80


def test_the_dashboard_shows_the_item_and_its_time(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=80, height=24, color_system=None, force_terminal=True)
    dashboard = Dashboard(console, None, clock=clock)
    dashboard(Progress("latents", 1, 20, "clip-1.mp4"))
    clock.now += 40
    with console.capture() as capture:
        console.print(dashboard)
    assert "1/20" in capture.get()
    assert "clip-1.mp4, 40 s so far" in capture.get()


def test_the_dashboard_shows_a_validation_at_work_and_a_stop(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=80, height=24, color_system=None, force_terminal=True)
    dashboard = Dashboard(console, None, clock=clock)
    dashboard(TrainingStarted(RUN, 0, 100, 8, 2, 100))
    dashboard(step_done(0))
    dashboard(Progress("validation", 0, 4, "sampling videos"))
    clock.now += 30

    def screen() -> str:
        with console.capture() as capture:
            console.print(dashboard)
        return capture.get()

    assert "validation: sampling videos, 30 s so far" in screen()
    assert "Ctrl-C" not in screen()
    dashboard.stop()
    assert "saving a checkpoint; Ctrl-C once more to stop now" in screen()
    dashboard(step_done(1))
    assert "sampling videos" not in screen()


def test_plain_lines_acknowledge_a_stop_once(clock: Clock) -> None:
    lines, screen = plain_lines(clock)
    lines.stop()
    lines.beat()
    lines.beat()
    assert screen.getvalue() == "stopping: saving a checkpoint; Ctrl-C once more to stop now\n"


@pytest.mark.usefixtures("fresh_accelerate")
def test_every_stage_names_its_items_before_it_works_on_them(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    sets = [f"data.cache={(tmp_path / 'cache').as_posix()}"]
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    events: list[Event] = []
    api.fill_cache(profile, listeners=[events.append])
    clips = [f"clip-{index:02d}.mp4" for index in range(8)]
    assert list(stage(events, "scanning")) == named("scanning", clips)
    for name, model in {"latents": "the VAE", "features": "the teacher"}.items():
        assert list(stage(events, name)) == [Progress(name, 0, 8, f"loading {model}"), *named(name, clips)]
    prompts = list(stage(events, "prompts"))
    assert prompts[0] == Progress("prompts", 0, 10, "loading the text encoder")
    assert [event.done for event in prompts] == [0, *range(11)]


def stage(events: list[Event], name: str) -> Iterator[Progress]:
    return (event for event in events if isinstance(event, Progress) and event.stage == name)


def named(name: str, items: list[str]) -> list[Progress]:
    return [Progress(name, done, len(items), item) for done, item in enumerate([*items, ""])]


@pytest.mark.slow
def test_a_measurement_for_a_script_says_on_standard_error_what_it_does(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo / "crepa-demo", tmp_path / "crepa-demo")
    done = subprocess.run(
        [*CREPA, "probe-blocks", "wan", "--profile", "t2v", "--demo", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("{")
    for said in ("scanning: 0/8, clip-00.mp4", "blocks: 0/32, loading the transformer", "projectors: 0/"):
        assert said in done.stderr
