"""Clips that are held out of the training, and the loss that is measured on them."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import OpenTiny, RunCrepa
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
    ValidationSampled,
    drained,
)
from crepa_cli.models import FAMILIES
from crepa_cli.profile import Profile
from crepa_cli.report.dashboard import Dashboard
from crepa_cli.report.metrics import MetricsFile, read_held_out, read_metrics
from crepa_cli.report.plain import describe
from crepa_cli.report.plot import draw_metrics
from crepa_cli.report.trackers import Trackers
from crepa_cli.runs.checks import open_family
from crepa_cli.runs.facts import read_facts
from crepa_cli.runs.folder import RunFolder
from crepa_cli.runs.resume import resume_mistakes
from crepa_cli.training.held_out import HeldOutLoss
from crepa_cli.training.trainer import Trainer
from crepa_cli.training.validator import Validator

SETS = ["validation.every=2", "validation.steps=1", "validation.frames=5", "checkpoints.every=2", "train.batch_size=1"]


@pytest.fixture(name="in_demo")
def _in_demo(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)


@pytest.fixture(scope="session", name="known")
def _known(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    """Copies of two of the demo's clips, whose latents and features are in its cache."""
    folder = tmp_path_factory.mktemp("known")
    for path in (demo / "crepa-demo/scenes").glob("clip-0[36].*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(name="again")
def _again(monkeypatch: pytest.MonkeyPatch) -> list[HeldOutMeasured | None]:
    """Another measurement of the same weights beside each that a run takes, from another state of torch's generator."""
    measure = HeldOutLoss.measure
    again: list[HeldOutMeasured | None] = []

    def measure_twice(*arguments: Any) -> HeldOutMeasured | None:
        torch.manual_seed(len(again))
        again.append(measure(*arguments))
        return measure(*arguments)

    monkeypatch.setattr(HeldOutLoss, "measure", measure_twice)
    return again


@pytest.fixture(name="no_videos")
def _no_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations sample nothing, which takes longer than to measure."""
    monkeypatch.setattr(Validator, "sample", lambda _self, _learner, step, _should_stop: ValidationSampled(step, ()))


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


ON_HOST = ["memory.stream_weights=true", "memory.offload_activations=true", "memory.finer_recompute=true"]


@pytest.mark.usefixtures("in_demo", "fresh_accelerate", "no_videos")
@pytest.mark.parametrize("memory", [[], pytest.param(ON_HOST, marks=pytest.mark.slow)], ids=["resident", "on the host"])
def test_measuring_changes_nothing_in_the_training_and_repeats_to_the_bit(
    memory: list[str], tmp_path: Path, known: Path, again: list[HeldOutMeasured | None]
) -> None:
    """With dropout of captions and in the adapter, whose random numbers must stay, and an average of the weights."""
    sets = ["adapter.dropout=0.2", "data.caption_dropout=0.5", "train.ema=0.9", "train.steps=2"]
    sets += memory
    plain, _ = train(settings(*sets, "validation.every=0"), tmp_path / "plain")
    assert not again
    one = shutil.copytree(known, tmp_path / "one", ignore=shutil.ignore_patterns("clip-06*"))
    sets += ["validation.every=3", f"data.validation_path={one}"]
    run, events = train(settings(*sets), tmp_path / "measured")
    assert measured(events) == again
    assert [(one.step, one.clips) for one in measured(events)] == [(0, 1), (2, 1)]
    assert again[0] != again[1], "the weights change"
    for name in ("model", "optimizer", "average"):
        first, second = (load_file(one.checkpoints / f"step-000002/{name}.safetensors") for one in (plain, run))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert timeless(run) == timeless(plain)
    assert read_held_out(run.metrics) == measured(events)
    assert read_held_out(plain.metrics) == []
    assert b"held out" in run.curves.read_bytes()
    assert "Diffusion loss of 1 clip that the training has not seen" in run.card.read_text()


def timeless(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of the metrics without what differs between equal runs."""
    return [
        {key: value for key, value in line.items() if "second" not in key and "memory" not in key}
        for line in read_metrics(run.metrics)
    ]


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_held_out_clips_never_reach_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: set[str] = set()

    def draw_alone(trainer: Trainer, _should_stop: object, _requests: object) -> Iterator[Event]:
        batches = trainer.batches.starting_at(0)
        for batch in itertools.islice(batches, 3 * trainer.batches.steps_per_epoch):
            drawn.update(batch.clips)
        yield TrainingEnded(0, None)

    monkeypatch.setattr(Trainer, "train", draw_alone)
    profile = settings("data.validation_share=0.01")
    run, _ = train(profile, tmp_path / "run")
    trained, held_out = divided(drained(scan_all(open_family(profile), profile), lambda _: None), profile)
    assert 0 < len(held_out) < len(trained)
    assert drawn == {clip.clip.path.name for clip in trained}
    assert read_facts(run)["clips"] == len(trained)
    assert describe_held_out(len(held_out), 8, profile.data).startswith(f"{len(held_out)} of 8 clips by data.valid")


class KilledError(BaseException):
    """Ends a run at an event, as a kill would."""


@pytest.mark.slow
@pytest.mark.usefixtures("in_demo", "fresh_accelerate", "no_videos")
def test_an_interrupted_run_has_every_value_once(tmp_path: Path, known: Path) -> None:
    """It is stopped in a measurement, killed after a checkpoint, resumed when it is over, and made longer."""
    steady = ["crepa.scheduler=constant", "train.steps=4", f"data.validation_path={known}"]
    profile = settings(*steady)
    whole, _ = train(profile, tmp_path / "whole")
    expected = read_held_out(whole.metrics)
    assert [one.step for one in expected] == [0, 2, 4]

    output, events = tmp_path / "cut", list[Event]()

    def in_second_measurement() -> bool:
        measures = Progress("validation", 0, 2, "measuring the held-out loss")
        return events.count(measures) == 2

    api.train(profile, output=output, listeners=[events.append], should_stop=in_second_measurement)
    assert events[-1] == TrainingEnded(2, None)
    assert [one.step for one in measured(events)] == [0]

    def kill(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 4:
            raise KilledError

    with pytest.raises(KilledError):
        api.train(profile, output=output, resume=True, listeners=[kill])
    run, resumed = train(profile, output, resume=True)
    assert measured(resumed) == expected[-1:]
    assert read_held_out(run.metrics) == expected
    assert timeless(run) == timeless(whole)

    run, resumed = train(settings(*steady, "train.steps=5"), output, resume=True)
    assert read_held_out(run.metrics)[:3] == expected
    assert [one.step for one in measured(resumed)] == [4, 5]
    assert not [event for event in resumed if isinstance(event, Notice) and "held-out" in event.message]


@pytest.mark.slow
@pytest.mark.usefixtures("in_demo", "fresh_accelerate", "no_videos")
def test_other_held_out_clips_are_announced(tmp_path: Path, known: Path) -> None:
    """Also without alignment, and with features computed in every step."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, clip in ((first, "clip-03"), (second, "clip-06")):
        folder.mkdir()
        for path in known.glob(f"{clip}.*"):
            shutil.copy(path, folder)
    sets = ["train.steps=1", "crepa.enabled=false"]
    _, events = train(settings(*sets, f"data.validation_path={first}"), tmp_path / "run")
    assert [one.similarity for one in measured(events)] == [None, None]
    _, events = train(settings(*sets, f"data.validation_path={second}"), tmp_path / "run", resume=True)
    assert any(isinstance(event, Notice) and "measured on other clips" in event.message for event in events)
    assert [one.step for one in measured(events)] == [1]


@pytest.mark.slow
@pytest.mark.usefixtures("in_demo", "fresh_accelerate", "no_videos")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_measures(
    family: str,
    tmp_path: Path,
    known: Path,
    open_tiny: OpenTiny,
    tiny_dinov2: Path,
    again: list[HeldOutMeasured | None],
) -> None:
    flags = {
        "model.family": family,
        "model.checkpoint": open_tiny(family, "t2v").base.name,
        "crepa.encoder": str(tiny_dinov2),
        "crepa.encoder_image_size": 56,
    }
    sets = [*SETS, "train.steps=1", "data.validation_share=1e-6", f"data.path={known}", "validation.steps=2"]
    profile = api.resolve("t2v", flags, [*sets, "validation.frames=none"], demo=True).profile
    _, events = train(profile, tmp_path / "run")
    before, after = measured(events)
    assert [before, after] == again
    assert (before.clips, after.clips) == (1, 1)
    assert math.isfinite(before.loss)
    assert before.loss != after.loss
    assert before.similarity != after.similarity


@pytest.mark.slow
@pytest.mark.usefixtures("in_demo", "fresh_accelerate", "no_videos")
def test_the_loss_rises_once_a_clip_is_learned_by_heart(tmp_path: Path, open_tiny: OpenTiny) -> None:
    """The loss of the training goes on falling. Weights are random at first: the trained Wan has much to lose."""
    write_demo_clips(tmp_path / "one", count=1)
    write_demo_clips(tmp_path / "unseen", count=3, seed=1)
    sets = [
        f"model.checkpoint={open_tiny('wan', 't2v').base.name}",
        f"data.path={tmp_path}/one",
        f"data.validation_path={tmp_path}/unseen",
        "validation.every=30",
    ]
    sets += ["data.width=48", "data.height=48", "data.frames=5", "data.caption_dropout=0", "crepa.enabled=false"]
    sets += ["adapter.kind=full", "train.learning_rate=3e-3", "train.batch_size=4", "train.steps=150"]
    run, events = train(
        settings(*sets, "checkpoints.every=0", "train.activation_checkpointing=false"), tmp_path / "run"
    )
    held_out = {one.step: one.loss for one in measured(events)}
    lowest = min(held_out, key=lambda step: held_out[step])
    assert held_out[lowest] < 0.5 * held_out[0], "it generalizes at first"
    assert held_out[150] > 1.05 * held_out[lowest]
    losses = [line["diffusion_loss"] for line in read_metrics(run.metrics)]
    assert fmean(losses[-20:]) < fmean(losses[lowest - 20 : lowest])


@pytest.mark.usefixtures("in_demo")
def test_clips_in_both_folders_are_named_and_unusable_ones_skipped(tmp_path: Path, demo: Path) -> None:
    write_demo_clips(tmp_path, count=1, seed=1)
    shutil.copy(demo / "crepa-demo/scenes/clip-03.mp4", tmp_path / "copy.mp4")
    (tmp_path / "copy.txt").write_text("a caption")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.txt").write_text("a caption")
    profile = settings(f"data.validation_path={tmp_path}")
    events: list[Event] = []
    trained, held_out = divided(drained(scan_all(open_family(profile), profile), events.append), profile)
    (notice,) = (event.message for event in events if isinstance(event, Notice) and "validation_path" in event.message)
    assert notice.startswith("1 clip of data.validation_path is in the training folder as well, with the same content")
    assert "copy.mp4" in notice
    assert [event.name for event in events if isinstance(event, ClipSkipped)] == ["broken.mp4"]
    assert [clip.clip.path.name for clip in held_out] == ["clip-00.mp4", "copy.mp4"]
    assert len(trained) == 8
    line = f"2 clips in data.validation_path = {tmp_path}, never trained on"
    assert describe_held_out(2, 10, profile.data) == line


@pytest.mark.usefixtures("in_demo")
def test_doctor_says_how_many_clips_are_held_out(
    run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("crepa_cli.doctor.plan.check_memory", lambda *_: None)
    flags = ["--profile", "t2v", "--model", "wan", "--demo", "--set", "data.validation_share=1e-6"]
    assert run_crepa("doctor", "--json", *flags) == 0
    report = json.loads(capsys.readouterr().out)
    (line,) = (check["message"] for check in report["checks"] if check["name"] == "held-out clips")
    assert line == "1 of 8 clips by data.validation_share = 1e-06, never trained on"
    assert sum(bucket["clips"] for bucket in report["plan"]["buckets"]) == 7


@pytest.mark.usefixtures("in_demo")
def test_settings_that_leave_nothing_are_refused(
    tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("crepa_cli.doctor.plan.check_memory", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("doctor", "train"):
        flags = ["--profile", "t2v", "--model", "wan", "--demo", "--set", "data.validation_share=0.999999"]
        assert run_crepa(command, *flags) == 2
        message = "no clip is left to train on: data.validation_share = 0.999999 holds out all of the 8 usable clips"
        assert message in " ".join("".join(capsys.readouterr()).split())
    with pytest.raises(UserError, match=f"No clips in {re.escape(str(tmp_path))}"):
        api.check(settings(f"data.validation_path={tmp_path}"))
    with pytest.raises(UserError, match=r"data\.validation_share.*: choose one"):
        settings("data.validation_share=0.5", f"data.validation_path={tmp_path}")


@pytest.mark.usefixtures("in_demo")
def test_a_resumed_run_keeps_the_clips_that_it_trains_on(known: Path) -> None:
    none, share, folder = settings(), settings("data.validation_share=0.3"), settings(f"data.validation_path={known}")
    assert resume_mistakes(none, folder) == resume_mistakes(folder, none) == resume_mistakes(share, share) == []
    for saved, wanted in ((none, share), (share, none), (share, folder)):
        (mistake,) = resume_mistakes(saved, wanted)
        assert mistake.startswith("data.validation_share = ")
    (mistake,) = resume_mistakes(share, settings("data.validation_share=0.3", "train.seed=7"))
    assert "train.seed = 7: the run was started with 42, and the seed chooses the held-out clips" in mistake
    assert resume_mistakes(folder, settings(f"data.validation_path={known}", "train.seed=7")) == []


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
    row = "held out 0.8000   best 0.5000 at step 200   first 0.7000   similarity 0.400"
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
