"""`crepa watch`: the dashboard of a run from its files."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunCrepa
from rich.console import Console
from test_dashboard import LOADING, recorded_events, schedule

from crepa_cli.cli.watch import _Clock, _update
from crepa_cli.events import Event, RunOpened, StepDone, TrainingEnded, TrainingStarted
from crepa_cli.profile import Profile
from crepa_cli.report.dashboard import Dashboard
from crepa_cli.report.events_file import EventsFile, read_event
from crepa_cli.report.metrics import MetricsFile
from crepa_cli.report.state import RunState
from crepa_cli.report.watch import Tail, WatchedRun
from crepa_cli.runs.folder import RunFolder
from crepa_cli.settings import resolve

STEPS = 30


@pytest.fixture
def profile() -> Profile:
    return resolve("t2v", {"model.family": "wan"}, ["train.steps=30"], demo=True).profile


class Written:
    """A run whose files are written by the listeners of a training."""

    def __init__(self, path: Path, profile: Profile) -> None:
        path.mkdir()
        self.run = RunFolder(path)
        self.run.write_profile(profile)
        self.listeners: list[Callable[[Event], None]] = [MetricsFile(self.run.metrics), EventsFile(self.run.events)]

    def write(self, *events: Event) -> None:
        for event in events:
            for listener in self.listeners:
                listener(event)

    def session(self, start: int, stop: int) -> list[Event]:
        steps = [event for event in recorded_events(schedule("constant"), stop) if isinstance(event, StepDone)]
        opened = RunOpened(self.run.path, 8 * 10**9, LOADING, "tiny, t2v", "1 x CPU")
        return [opened, TrainingStarted(self.run.path, start, STEPS, 8, 2, 100, 10, 0), *steps[start:]]


def view() -> tuple[Dashboard, _Clock]:
    clock = _Clock()
    return Dashboard(Console(file=io.StringIO(), width=100, height=30), schedule("constant"), clock=clock), clock


def screen(dashboard: Dashboard) -> str:
    console = Console(file=io.StringIO(), width=100, height=30, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(dashboard, end="")
    return capture.get()


def test_a_copied_run_looks_as_it_did_where_it_was_trained(tmp_path: Path, profile: Profile) -> None:
    written = Written(tmp_path / "there", profile)
    there, clock = view()
    clock.moment = 0.0
    for event in [*written.session(0, STEPS), TrainingEnded(STEPS, written.run.weights)]:
        written.write(event)
        there(event)
    shutil.copytree(written.run.path, tmp_path / "here" / "there")
    shutil.rmtree(written.run.path)
    watched = WatchedRun(RunFolder(tmp_path / "here" / "there"), profile)
    here, clock = view()
    _update([watched], here, clock)
    assert watched.ended
    rows = [(a, b) for a, b in zip(screen(there).splitlines(), screen(here).splitlines(), strict=True) if a != b]
    assert all("elapsed" in a or "ETA" in a or "weights written" in a for a, _ in rows)
    assert here.summary.lines()[:2] == there.summary.lines()[:2]


def test_a_run_is_followed_step_by_step_and_read_again_when_it_is_resumed(tmp_path: Path, profile: Profile) -> None:
    written = Written(tmp_path / "run", profile)
    watched = WatchedRun(written.run, profile)
    dashboard, clock = view()
    _update([watched], dashboard, clock)
    session = written.session(0, 20)
    for index, event in enumerate(session):
        written.write(event)
        if index % 7 == 0:
            _update([watched], dashboard, clock)
    _update([watched], dashboard, clock)
    assert dashboard.state.latest == session[-1]
    assert dashboard.state.similarity.curve.steps == 20

    written.write(*written.session(10, STEPS), TrainingEnded(STEPS, written.run.weights))
    _update([watched], dashboard, clock)
    assert watched.ended
    assert dashboard.state.similarity.curve.steps == STEPS
    assert [text for text in dashboard.state.messages if text.startswith("training from step 10")]


def test_a_run_of_an_older_version_is_shown_without_its_events(tmp_path: Path, profile: Profile) -> None:
    written = Written(tmp_path / "run", profile)
    dashboard, clock = view()
    written.write(*written.session(0, STEPS))
    written.run.events.unlink()
    written.run.weights.mkdir()
    watched = WatchedRun(written.run, profile)
    _update([watched], dashboard, clock)
    assert watched.ended
    assert f"step {STEPS} of {STEPS}" in screen(dashboard)
    assert "run" in screen(dashboard).splitlines()[0]


def test_two_runs_are_drawn_into_one_chart(tmp_path: Path, profile: Profile) -> None:
    runs = [Written(tmp_path / name, profile) for name in ("first", "second")]
    for written, steps in zip(runs, (10, STEPS), strict=True):
        written.write(*written.session(0, steps))
    dashboard, clock = view()
    dashboard.others = [RunState(schedule("constant"), clock)]
    _update([WatchedRun(one.run, profile) for one in runs], dashboard, clock)
    assert "first at step 9   second at step 29" in screen(dashboard)
    assert dashboard.state.similarity.curve.steps == 10
    assert dashboard.others[0].similarity.curve.steps == STEPS


def test_every_event_comes_back_as_it_was_written(tmp_path: Path) -> None:
    events = list(recorded_events(schedule("constant", cutoff_step=600), 700))
    listener, tail = EventsFile(tmp_path / "events.jsonl"), Tail(tmp_path / "events.jsonl")
    for event in events:
        listener(event)
    kept = [event for event in events if type(event).__name__ not in {"StepDone", "Progress"}]
    assert [read_event(line) for line in tail.read()] == kept
    assert tail.read() == []
    assert read_event({"time": 0.0, "event": "OfALaterVersion"}) is None


def test_a_line_is_read_once_it_is_complete(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "lines")
    assert tail.read() == []
    tail.path.write_text('{"a": 1}\n{"a"')
    assert tail.read() == [{"a": 1}]
    with tail.path.open("a") as file:
        file.write(": 2}\n")
    assert tail.read() == [{"a": 2}]
    tail.path.write_text("{}\n")
    assert tail.shortened


def test_a_folder_without_a_run_is_a_mistake(
    tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_crepa("watch") == 2
    assert "crepa watch RUN" in capsys.readouterr().err


def test_half_a_line_of_a_killed_run_hides_nothing_of_the_session_that_resumes_it(
    tmp_path: Path, profile: Profile
) -> None:
    written = Written(tmp_path / "run", profile)
    written.write(*written.session(0, 20))
    with written.run.events.open("a", encoding="utf-8") as file:
        file.write('{"time": 1.0, "event": "CheckpointSa')
    written.write(*written.session(10, STEPS), TrainingEnded(STEPS, written.run.weights))
    watched = WatchedRun(written.run, profile)
    events = [event for _, event in watched.poll()]
    assert isinstance(events[0], RunOpened)
    assert [event.step for event in events if isinstance(event, TrainingStarted)] == [10]
    assert [event.step for event in events if isinstance(event, StepDone)] == list(range(10, STEPS))
    assert watched.ended
