"""Keys of the dashboard, pressed in a pseudo-terminal, and the requests that they make."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file
from test_dashboard import recorded_events, schedule

from crepa_cli import api
from crepa_cli.events import CheckpointSaved, Event, HeldOutMeasured, Notice, StepDone, ValidationSampled
from crepa_cli.report.dashboard import Dashboard
from crepa_cli.report.keys import AGAIN_SECONDS, NARROWEST, Action, Keys
from crepa_cli.requests import Requests


class Pressed:
    """Keys whose actions are recorded, at a time that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: list[str] = []
        actions = {
            "q": Action("stop", lambda: self.done.append("q")),
            "c": Action("save", lambda: self.done.append("c")),
            "l": Action("leave", lambda: self.done.append("l"), asks=False),
        }
        self.keys = Keys(actions, lambda: self.now)

    def press(self, keys: str) -> list[str]:
        for key in keys:
            self.keys(key)
        return self.done


@pytest.mark.parametrize(
    ("keys", "done"),
    [
        ("q", ""),
        ("qq", "q"),
        ("qcq", ""),
        ("q?q", ""),
        ("cqcc", "c"),
        ("qqq", "q"),
        ("qqqq", "qq"),
        ("l", "l"),
        ("x", ""),
    ],
)
def test_an_action_takes_the_same_key_twice_in_a_row(keys: str, done: str) -> None:
    assert Pressed().press(keys) == list(done)


def test_a_question_is_asked_for_some_seconds() -> None:
    pressed = Pressed()
    pressed.press("q")
    assert pressed.keys.question == "press q again within 5 s to stop"
    pressed.now += AGAIN_SECONDS + 1
    assert not pressed.keys.question
    assert pressed.press("q") == []
    pressed.now += AGAIN_SECONDS - 1
    assert pressed.press("q") == ["q"]
    assert not pressed.keys.question


def test_the_range_of_the_curves_has_bounds() -> None:
    pressed = Pressed()
    pressed.press("+" * 50)
    assert pressed.keys.zoom == NARROWEST
    pressed.press("-" * 49)
    assert pressed.keys.zoom == 0
    pressed.press("++-")
    assert pressed.keys.zoom == 1


def screen_of(dashboard: Dashboard, width: int, height: int) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(dashboard, end="")
    return capture.get()


@pytest.mark.parametrize(("width", "height"), [(60, 24), (80, 24), (120, 40)])
@pytest.mark.parametrize("steps", [-1, 700])
def test_help_question_and_requests_are_shown(steps: int, width: int, height: int) -> None:
    requests = Requests()
    actions = {"q": Action("save and stop", lambda: None), "v": Action("validate", requests.validation)}
    dashboard = Dashboard(Console(file=io.StringIO()), schedule("constant"), actions=actions, requests=requests)
    for event in recorded_events(schedule("constant"), max(0, steps)):
        if steps < 0 and not isinstance(event, StepDone) and len(dashboard.state.messages) > 1:
            break
        dashboard(event)
    plain = screen_of(dashboard, width, height)
    dashboard.press("?")
    assert "q q  save and stop" in screen_of(dashboard, width, height)
    dashboard.press("q")
    asking = screen_of(dashboard, width, height)
    assert "press q again within 5 s to save and stop" in asking
    assert "q q  save and stop" not in asking
    dashboard.press("v")
    dashboard.press("v")
    assert requests.waiting == ("validation",)
    assert "validation after this step" in screen_of(dashboard, width, height)
    assert requests.take() == (False, True)
    assert screen_of(dashboard, width, height) == plain
    if steps > 0:
        dashboard.press("+")
        nearer = screen_of(dashboard, width, height)
        assert " 350 " in nearer
        assert " 350 " not in plain


SETS = ["validation.every=100", "validation.steps=1", "validation.frames=5", "train.batch_size=1", "train.steps=4"]
SETS += ["checkpoints.every=3", "train.ema=0.9", "adapter.dropout=0.2", "data.validation_share=0.2"]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_what_is_asked_for_comes_after_the_step_and_changes_no_bit(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    requests = Requests()
    events: list[Event] = []

    def ask(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.step == 1:
            requests.checkpoint()
            requests.validation()
        if isinstance(event, StepDone) and event.step == 2:
            requests.checkpoint()

    profile = api.resolve("t2v", {"model.family": "wan"}, SETS, demo=True).profile
    plain = api.train(profile, output=tmp_path / "plain")
    asked = api.train(profile, output=tmp_path / "asked", listeners=[ask], requests=requests)
    served = [
        (type(event).__name__, event.step)
        for event in events
        if isinstance(event, StepDone | HeldOutMeasured | CheckpointSaved | ValidationSampled)
    ]
    before, after = [("HeldOutMeasured", 0), ("ValidationSampled", 0)], [("HeldOutMeasured", 4), ("CheckpointSaved", 4)]
    assert served == [
        *before,
        ("StepDone", 0),
        ("StepDone", 1),
        *(("HeldOutMeasured", 2), ("CheckpointSaved", 2), ("ValidationSampled", 2)),
        *(("StepDone", 2), ("CheckpointSaved", 3)),
        ("StepDone", 3),
        *after,
    ]
    assert (asked.path / "weights/step-000002").is_dir()
    for name in ("model", "optimizer", "average"):
        first, second = (load_file(run.checkpoints / f"step-000004/{name}.safetensors") for run in (plain, asked))
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_validation_that_is_off_is_answered(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    requests = Requests()
    requests.validation()
    sets = ["validation.every=0", "train.batch_size=1", "train.steps=1"]
    events: list[Event] = []
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    api.train(profile, output=tmp_path / "run", listeners=[events.append], requests=requests)
    assert [event for event in events if isinstance(event, Notice) and "validation.every = 0" in event.message]
