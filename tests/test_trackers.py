"""Trackers, against the clients of TensorBoard, Weights & Biases (offline) and MLflow (files)."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker
from conftest import RunCrepa
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from crepa_cli.report.metrics import read_metrics, read_validations
from crepa_cli.runs.checks import missing_trackers
from crepa_cli.settings import resolve

TRAIN = ["train", "--profile", "t2v", "--model", "wan", "--demo", "--plain"]
ALL = ["--set", "report.trackers=['tensorboard', 'wandb', 'mlflow']"]
BLOCK, HEADER = 32768, 7


@pytest.fixture(name="in_demo")
def _in_demo(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's folder, and services that need no network."""
    monkeypatch.chdir(demo)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    # The light client has no database.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def wandb_records(path: Path) -> Iterator[Record]:
    """The records of an offline run: a log of blocks in the format of LevelDB."""
    data, position, parts = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        # 1 is a whole record, 4 is the last part of one.
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def wandb_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """By identity: title, settings and the step of every row, of all files together."""
    runs: dict[str, dict[str, Any]] = {}
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        run = runs.setdefault(path.stem.removeprefix("run-"), {"steps": [], "settings": {}, "samples": 0})
        for record in wandb_records(path):
            if record.HasField("run"):
                run |= {"title": record.run.display_name, "project": record.run.project}
            for item in record.run.config.update or record.config.update:
                run["settings"][item.key] = json.loads(item.value_json)
            row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            run["samples"] += "samples" in row
            if "loss" in row:
                run["steps"].append(json.loads(row["step"]))
    return runs


def tensorboard_runs(folder: Path) -> dict[str, EventAccumulator]:
    found = {}
    for parent in {path.parent for path in folder.rglob("events.out.tfevents.*")}:
        found[str(parent.relative_to(folder))] = EventAccumulator(str(parent)).Reload()
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("in_demo")
def test_a_run_that_was_killed_and_resumed_is_one_run_with_every_step_once(tmp_path: Path, run_crepa: RunCrepa) -> None:
    """Without its last checkpoints, a run of 5 steps looks as if it had been killed after the checkpoint of step 2."""
    run = tmp_path / "run"
    flags = [*TRAIN, *ALL, "--set", "report.every=1", "--set", "checkpoints.every=2", "--output", run]
    flags += ["--set", "validation.every=2", "--set", "validation.steps=1"]
    assert run_crepa(*flags, "--steps", 5) == 0
    for step in (4, 5):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    identities = (run / "trackers/runs.json").read_text()
    assert run_crepa(*flags, "--steps", 6, "--resume") == 0
    assert (run / "trackers/runs.json").read_text() == identities

    steps = list(range(6))
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    (board,) = tensorboard_runs(run / "trackers").values()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in zip(steps, losses, strict=True)
    ]
    assert [event.step for event in board.Images("samples")] == [1, 3, 5]
    assert [event.step for event in board.Scalars("validation/motion")] == [0, 1, 3, 5]
    assert "_hparams_/session_start_info" in board.summary_metadata

    (wandb,) = wandb_runs(run / "trackers").values()
    assert wandb["steps"] == steps
    assert wandb["samples"] == 3
    assert (wandb["project"], wandb["title"]) == ("crepa", "run")
    assert wandb["settings"]["train.learning_rate"] == pytest.approx(
        resolve(str(run / "profile.toml")).profile.train.learning_rate
    )

    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'crepa'")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert (tracked.info.run_name, tracked.info.status) == ("run", "FINISHED")
    history = client.get_metric_history(tracked.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == list(zip(steps, losses, strict=True))
    motion = client.get_metric_history(tracked.info.run_id, "validation/motion")
    assert [metric.value for metric in motion] == [
        event.measures["motion"] for event in read_validations(run / "metrics.jsonl")
    ]
    folders = [file.path for file in client.list_artifacts(tracked.info.run_id)]
    assert folders == ["step-000002", "step-000004", "step-000006"]


@pytest.mark.usefixtures("in_demo")
def test_trackers_that_fail_end_no_run_and_give_one_notice_each(
    tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One fails at the start, one in the middle and one at the very end."""

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(WandBTracker, "start", fail)
    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    monkeypatch.setattr(MLflowTracker, "finish", fail)
    run = tmp_path / "run"
    flags = ["--set", "report.every=3", "--set", "validation.every=0", "--steps", 5, "--output", run]
    try:
        assert run_crepa(*TRAIN, *ALL, *flags) == 0
    finally:
        mlflow.end_run()
    printed = capsys.readouterr()
    for name in ("wandb", "tensorboard", "mlflow"):
        assert printed.out.count(f"tracker {name} failed") == 1
    assert printed.out.count("ConnectionError: no route to host") == 3
    assert "Traceback" not in printed.out + printed.err
    assert (run / "README.md").is_file()
    (tracked,) = mlflow.search_runs(experiment_names=["crepa"], output_format="list")
    # Every third step and the last one.
    history = mlflow.MlflowClient().get_metric_history(tracked.info.run_id, "loss")
    assert [metric.step for metric in history] == [0, 3, 4]


@pytest.mark.usefixtures("in_demo")
@pytest.mark.parametrize("command", [[*TRAIN, "--output", "runs/refused"], ["doctor", *TRAIN[1:-1], "--json"]])
def test_a_tracker_that_is_not_installed_is_refused_before_any_work(
    command: list[str], run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The prediction has its own tests and would take half a minute here.
    monkeypatch.setattr("crepa_cli.doctor.plan.check_memory", lambda *_: None)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("trackio")
    assert run_crepa(*command, "--set", "report.trackers=['trackio']") == 2
    printed = capsys.readouterr()
    assert "report.trackers: trackio is not installed" in printed.out + printed.err
    assert "pip install trackio" in printed.out + printed.err
    assert not Path("runs/refused").exists()


def test_installed_trackers_are_not_missing() -> None:
    trackers = ["report.trackers=['tensorboard', 'wandb', 'mlflow', 'aim']"]
    profile = resolve("t2v", {"model.family": "wan"}, trackers, demo=True).profile
    assert missing_trackers(profile) == {"report.trackers: aim is not installed": "pip install aim"}
