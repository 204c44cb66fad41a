"""Clips that are held out of the training, and the loss that is measured on them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCrepa
from rich.console import Console
from safetensors.torch import load_file
from test_dashboard import RUN, recorded_events, schedule
from test_trackers import tensorboard_runs

from crepa_cli import api
from crepa_cli.data.held_out import choose, divided, scan_all
from crepa_cli.demo.clips import write_demo_clips
from crepa_cli.doctor.clips import describe_held_out
from crepa_cli.errors import UserError
from crepa_cli.events import (
    CheckpointSaved,
    ClipSkipped,
    Event,
    HeldOutMeasured,
    Notice,
    Progress,
    StepDone,
    TrainingEnded,
    TrainingStarted,
    drained,
)
from crepa_cli.profile import Profile
from crepa_cli.report.dashboard import Dashboard
from crepa_cli.report.metrics import MetricsFile, read_held_out, read_metrics
from crepa_cli.report.plain import describe
from crepa_cli.report.plot import draw_metrics
from crepa_cli.report.trackers import Trackers
from crepa_cli.runs.checks import open_family
from crepa_cli.runs.folder import RunFolder
from crepa_cli.runs.resume import resume_mistakes
from crepa_cli.training.batches import MicroBatch
from crepa_cli.training.held_out import HeldOutLoss
from crepa_cli.training.trainer import Trainer

SETS = ["validation.every=2", "validation.steps=1", "checkpoints.every=2", "train.batch_size=1", "train.steps=3"]
SETS += ["validation.frames=5"]
RANDOM = ["adapter.dropout=0.2", "data.caption_dropout=0.5", "train.ema=0.9"]


@pytest.fixture(name="in_demo")
def _in_demo(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)


@pytest.fixture(scope="session", name="unseen")
def _unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of the demo's generator that the demo does not have."""
    folder = tmp_path_factory.mktemp("unseen")
    write_demo_clips(folder, count=2, seed=1)
    return folder


def settings(*sets: str) -> Profile:
    return api.resolve("t2v", {"model.family": "wan"}, [*SETS, *sets], demo=True).profile


def train(profile: Profile, output: Path, **options: Any) -> tuple[RunFolder, list[Event]]:
    events: list[Event] = []
    return api.train(profile, output=output, listeners=[events.append], **options), events


def measured(events: list[Event]) -> list[HeldOutMeasured]:
    return [event for event in events if isinstance(event, HeldOutMeasured)]


def test_a_clip_is_held_out_by_its_own_content_and_the_seed() -> None:
    clips = [f"{number:064x}" for number in range(2000)]
    chosen = choose(clips, 0.1, 42)
    assert len(chosen) == pytest.approx(200, abs=40)
    assert choose(clips[:1000], 0.1, 42) == chosen & set(clips[:1000]), "clips that are added change nothing"
    assert chosen < choose(clips, 0.2, 42)
    assert chosen != choose(clips, 0.1, 43)
    (only,) = choose(clips[:5], 1e-9, 42)
    assert only in choose(clips[:5], 0.7, 42), "the first that a larger share chooses"


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_measuring_changes_nothing_in_the_training_and_repeats_to_the_bit(
    tmp_path: Path, unseen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout of captions and in the adapter, whose random numbers must stay, and an average of the weights."""
    plain, _ = train(settings(*RANDOM), tmp_path / "plain")
    measure = HeldOutLoss.measure
    again: list[HeldOutMeasured | None] = []

    def measure_twice(*arguments: Any) -> HeldOutMeasured | None:
        torch.manual_seed(len(again))
        again.append(measure(*arguments))
        return measure(*arguments)

    monkeypatch.setattr(HeldOutLoss, "measure", measure_twice)
    run, events = train(settings(*RANDOM, f"data.validation_path={unseen}"), tmp_path / "measured")
    assert measured(events) == again
    assert [(one.step, one.clips) for one in measured(events)] == [(0, 2), (2, 2), (3, 2)]
    assert len({one.loss for one in measured(events)}) == 3, "the weights change"
    for name in ("model", "optimizer", "average"):
        first, second = (load_file(one.checkpoints / f"step-000003/{name}.safetensors") for one in (plain, run))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert timeless(run) == timeless(plain)
    assert read_held_out(run.metrics) == measured(events)
    assert read_held_out(plain.metrics) == []
    assert b"held out" in run.curves.read_bytes()
    assert "Diffusion loss of 2 clips that the training has not seen" in run.card.read_text()


def timeless(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of the metrics without what differs between equal runs."""
    return [
        {key: value for key, value in line.items() if "second" not in key and "memory" not in key}
        for line in read_metrics(run.metrics)
    ]


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_held_out_clips_never_reach_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Trainer._backward
    drawn: list[str] = []

    def watch(trainer: Trainer, batch: MicroBatch, *rest: Any) -> Any:
        drawn.extend(batch.clips)
        return backward(trainer, batch, *rest)

    monkeypatch.setattr(Trainer, "_backward", watch)
    profile = settings("data.validation_share=0.3", "train.gradient_accumulation=12", "train.steps=2")
    run, events = train(profile, tmp_path / "run")
    trained, held_out = divided(drained(scan_all(open_family(profile), profile), lambda _: None), profile)
    assert 0 < len(held_out) < len(trained)
    assert {clip.clip.path.name for clip in trained} == set(drawn)
    assert {one.clips for one in measured(events)} == {len(held_out)}
    started = next(event for event in events if isinstance(event, TrainingStarted))
    assert started.clips == len(trained)
    assert f"- {len(trained)} clips" in run.card.read_text()


class KilledError(BaseException):
    """Ends a run at an event, as a kill would."""


@pytest.mark.slow
@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
@pytest.mark.parametrize("moment", ["after the checkpoint", "in a measurement", "before the checkpoint"])
def test_an_interrupted_run_has_every_value_once(moment: str, tmp_path: Path, unseen: Path) -> None:
    profile = settings("validation.every=1", f"data.validation_path={unseen}")
    whole, _ = train(profile, tmp_path / "whole")
    events: list[Event] = []

    def kill(event: Event) -> None:
        events.append(event)
        if moment == "after the checkpoint" and event == CheckpointSaved(2, tmp_path / "cut/checkpoints/step-000002"):
            raise KilledError
        if moment == "before the checkpoint" and isinstance(event, HeldOutMeasured) and event.step == 3:
            raise KilledError

    def should_stop() -> bool:
        done = any(isinstance(event, StepDone) and event.step == 1 for event in events)
        return moment == "in a measurement" and done and isinstance(events[-1], Progress)

    cut = tmp_path / "cut"
    if moment == "in a measurement":
        api.train(profile, output=cut, listeners=[kill], should_stop=should_stop)
        assert events[-1] == TrainingEnded(2, None)
        assert [one.step for one in measured(events)] == [0, 1]
    else:
        with pytest.raises(KilledError):
            api.train(profile, output=cut, listeners=[kill])
    run, _ = train(profile, cut, resume=True)
    assert read_held_out(run.metrics) == read_held_out(whole.metrics)
    assert timeless(run) == timeless(whole)
    # A finished run keeps its last value, and goes on with it.
    run, _ = train(profile, cut, resume=True)
    assert read_held_out(run.metrics) == read_held_out(whole.metrics)
    longer, resumed = train(
        settings("validation.every=1", f"data.validation_path={unseen}", "train.steps=4"), cut, resume=True
    )
    assert read_held_out(longer.metrics)[:4] == read_held_out(whole.metrics)
    assert [one.step for one in measured(resumed)] == [3, 4]
    assert not [event for event in resumed if isinstance(event, Notice) and "held-out" in event.message]


@pytest.mark.usefixtures("in_demo")
def test_clips_in_both_folders_are_named_and_unusable_ones_skipped(tmp_path: Path, unseen: Path, demo: Path) -> None:
    for source in (unseen / "clip-00.mp4", demo / "crepa-demo/clips/clip-03.mp4"):
        (tmp_path / f"other-{source.name}").write_bytes(source.read_bytes())
        (tmp_path / f"other-{source.stem}.txt").write_text("a caption")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.txt").write_text("a caption")
    profile = settings(f"data.validation_path={tmp_path}")
    events: list[Event] = []
    trained, held_out = divided(drained(scan_all(open_family(profile), profile), events.append), profile)
    (notice,) = (event.message for event in events if isinstance(event, Notice) and "validation_path" in event.message)
    assert notice.startswith("1 clip of data.validation_path is in the training folder as well, with the same content")
    assert "other-clip-03.mp4" in notice
    assert [event.name for event in events if isinstance(event, ClipSkipped)] == ["broken.mp4"]
    assert [clip.clip.path.name for clip in held_out] == ["other-clip-00.mp4", "other-clip-03.mp4"]
    assert len(trained) == 8
    line = f"2 clips in data.validation_path = {tmp_path}, never trained on"
    assert describe_held_out(2, 10, profile.data) == line


@pytest.mark.usefixtures("in_demo")
def test_settings_that_leave_nothing_are_refused(
    tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("crepa_cli.doctor.plan.check_memory", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("doctor", "train"):
        flags = ["--profile", "t2v", "--model", "wan", "--demo", "--set", "data.validation_share=0.999"]
        assert run_crepa(command, *flags) == 2
        message = "no clip is left to train on: data.validation_share = 0.999 holds out all of the 8 usable clips"
        assert message in " ".join("".join(capsys.readouterr()).split())
    with pytest.raises(UserError, match=f"No clips in {re.escape(str(tmp_path))}"):
        api.check(settings(f"data.validation_path={tmp_path}"))
    with pytest.raises(UserError, match=r"data\.validation_share.*: choose one"):
        settings("data.validation_share=0.5", f"data.validation_path={tmp_path}")


@pytest.mark.usefixtures("in_demo")
def test_a_resumed_run_keeps_the_clips_that_it_trains_on(unseen: Path) -> None:
    none, share, folder = settings(), settings("data.validation_share=0.3"), settings(f"data.validation_path={unseen}")
    assert resume_mistakes(none, folder) == resume_mistakes(folder, none) == resume_mistakes(share, share) == []
    for saved, wanted in ((none, share), (share, none), (share, folder)):
        (mistake,) = resume_mistakes(saved, wanted)
        assert mistake.startswith("data.validation_share = ")
    (mistake,) = resume_mistakes(share, settings("data.validation_share=0.3", "train.seed=7"))
    assert "train.seed = 7: the run was started with 42, and the seed chooses the held-out clips" in mistake
    assert resume_mistakes(folder, settings(f"data.validation_path={unseen}", "train.seed=7")) == []


def recorded(steps: int) -> Iterator[Event]:
    """A run whose held-out loss is measured every 100 steps: it is lowest after 200."""
    for event in recorded_events(schedule("constant"), steps):
        if isinstance(event, StepDone) and event.step % 100 == 0:
            yield HeldOutMeasured(event.step, 0.5 + abs(event.step - 200) / 1000, 0.4, 3)
        yield event


def test_the_dashboard_has_a_row_and_the_summary_a_line(tmp_path: Path) -> None:
    console = Console(width=80, height=24, file=io.StringIO(), force_terminal=True)
    dashboard = Dashboard(console, schedule("constant"))
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for event in recorded(501):
        for listener in (dashboard, metrics):
            listener(event)
    row = "held out     0.8000  step 0 0.7000  best 0.5000 at 200  similarity 0.400"
    with console.capture() as capture:
        console.print(dashboard, height=24)
    assert row in capture.get()
    summary = "Held-out loss: 0.7000 at step 0, 0.8000 at step 500, lowest 0.5000 at step 200"
    assert summary in dashboard.summary.lines()

    resumed = Dashboard(Console(), schedule("constant"))
    resumed(TrainingStarted(tmp_path, 500, 5000, 399, 150, 1))
    assert [one.step for one in resumed.state.held_out] == [0, 100, 200, 300, 400]
    resumed(HeldOutMeasured(500, 0.8, 0.4, 3))
    assert summary in resumed.summary.lines()


def test_the_plain_line() -> None:
    event = HeldOutMeasured(20, 0.51234, 0.4, 1)
    assert describe(event) == "held-out loss=0.5123 similarity=0.4000 of 1 clip at step 20"
    assert describe(replace(event, similarity=None, clips=2)).endswith("similarity=- of 2 clips at step 20")


def test_the_values_are_part_of_the_line_that_follows_or_come_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    events: list[Event] = [event for event in recorded(101) if isinstance(event, StepDone | HeldOutMeasured)]
    last = HeldOutMeasured(101, 0.3, None, 3)
    for event in (*events, last, TrainingEnded(101, RUN)):
        metrics(event)
    assert [one.step for one in read_held_out(path)] == [0, 100, 101]
    assert read_held_out(path)[-1] == last
    assert [line["step"] for line in read_metrics(path)] == list(range(101))
    assert len(path.read_text().splitlines()) == 102
    drawn = draw_metrics(read_metrics(path), None, read_held_out(path))
    assert drawn.count(b"held out") > 0
    assert b"held out" not in draw_metrics(read_metrics(path), None)
    # A run that resumes repeats the step after the checkpoint, and the value that its checkpoint holds.
    for event in (TrainingStarted(tmp_path, 100, 5000, 399, 150, 1), *events[-2:], last, TrainingEnded(101, RUN)):
        metrics(event)
    assert [one.step for one in read_held_out(path)] == [0, 100, 101]


@pytest.mark.usefixtures("in_demo")
def test_trackers_get_every_value_once_at_any_step(tmp_path: Path) -> None:
    """Those at steps of which the other values are not sent, too."""
    run = RunFolder(tmp_path)
    metrics = MetricsFile(run.metrics)

    def track(profile: Profile, events: list[Event]) -> None:
        trackers = Trackers(profile, run, [])
        for event in events:
            metrics(event)
            trackers(event)

    def started(step: int) -> TrainingStarted:
        return TrainingStarted(tmp_path, step, 5000, 399, 150, 1)

    profile = settings("report.trackers=tensorboard", "report.every=7")
    events: list[Event] = [event for event in recorded(301) if isinstance(event, StepDone | HeldOutMeasured)]
    cut = next(index for index, event in enumerate(events) if event == HeldOutMeasured(200, 0.5, 0.4, 3))
    track(profile, [started(0), *events[: cut + 30], TrainingEnded(229, None)])
    track(profile, [started(200), *events[cut:], HeldOutMeasured(301, 0.9, 0.4, 3), TrainingEnded(301, RUN)])
    (board,) = tensorboard_runs(run.trackers).values()
    sent = {event.step: event.value for event in board.Scalars("held_out/loss")}
    assert sent == pytest.approx({one.step: one.loss for one in read_held_out(run.metrics)})
    assert [event.step for event in board.Scalars("held_out/similarity")] == [0, 100, 200, 300, 301]
    assert {event.step % 7 for event in board.Scalars("loss")[:-1]} == {0}
