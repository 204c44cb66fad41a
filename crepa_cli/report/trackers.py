"""TensorBoard, Weights & Biases and the other trackers that Accelerate supports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from crepa_cli.events import (
    Event,
    HeldOutMeasured,
    Notice,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingStarted,
    ValidationSampled,
)
from crepa_cli.files import remove_folder, write_whole
from crepa_cli.profile import Profile
from crepa_cli.report.metrics import read_held_out, read_metrics, read_validations
from crepa_cli.runs.folder import RunFolder

PROJECT = "crepa"


class Trackers:
    """A listener that sends settings, every `report.every`-th step, the last one, and validations: frames and measures.

    A tracker that fails is not used again in this session, and training continues.

    Args:
        profile: the resolved settings.
        run: the run's folder.
        listeners: receive a notice of each tracker that fails.
    """

    def __init__(self, profile: Profile, run: RunFolder, listeners: Sequence[Callable[[Event], None]]) -> None:
        self.profile = profile
        self.run = run
        self.listeners = listeners
        self.started: list[GeneralTracker] = []
        self.lacks: dict[GeneralTracker, int] = {}
        """The first step that each tracker in use does not have yet."""
        self.unsent: StepDone | None = None
        self.measured: HeldOutMeasured | None = None
        """A value of held-out clips that waits for the step that follows, as in the metrics file."""
        self.stack = ExitStack()
        """Undoes at the end what was set for the whole process."""

    def __call__(self, event: Event) -> None:
        """Open the trackers at the start, send them what they track, and close them at the end."""
        match event:
            case TrainingStarted(step=step):
                self._open(step)
            case StepDone(step=step):
                self.unsent = event
                if step % self.profile.report.every == 0:
                    self._send_step()
                self._send_measured()
            case HeldOutMeasured():
                self.measured = event
            case StepSkipped():
                self._send_measured()
            case ValidationSampled(step=step, paths=paths) if paths:
                self._each(lambda tracker: self._send_sheet(tracker, step))
                self._each(lambda tracker: self._send_measures(tracker, event))
            case TrainingEnded(weights=weights):
                self._send_step()
                if weights is not None:
                    self._send_measured()
                self.close()

    def close(self) -> None:
        """Finish the trackers, those that failed before as well."""
        started, self.started = self.started, []
        for tracker in started:
            if tracker in self.lacks:
                self._attempt(tracker, lambda tracker: tracker.finish())
            else:
                with suppress(Exception):
                    tracker.finish()
        self.lacks = {}
        self.stack.close()

    def _open(self, step: int) -> None:
        ids = _read_ids(self.run)
        for name in self.profile.report.trackers:
            try:
                self.run.trackers.mkdir(exist_ok=True)
                if name == "mlflow":
                    self.stack.enter_context(_mlflow_store(self.run))
                tracker = _tracker(name, self.run, ids.get(name), step)
                tracker.start()
            except Exception as error:
                self._say(name, error)
                continue
            self.started.append(tracker)
            self.lacks[tracker] = 0
            self._attempt(tracker, lambda tracker: self._catch_up(tracker, step, ids))

    def _catch_up(self, tracker: GeneralTracker, step: int, ids: dict[str, str]) -> None:
        """Send the settings to an empty run, and the steps before `step` to a run that lacks them."""
        if tracker.name in ids:
            self.lacks[tracker] = _first_lacking(tracker, step)
        if self.lacks[tracker] == 0:
            _store_settings(tracker, self.profile)
            ids |= _id(tracker)
            write_whole(self.run.tracker_ids, json.dumps(ids).encode())
        sampled = read_validations(self.run.metrics)
        measured = {one.step: one for one in read_held_out(self.run.metrics)}
        for line in read_metrics(self.run.metrics):
            done = line["step"] + 1
            if line["step"] in measured:
                self._send(tracker, _held_out(measured[line["step"]]))
            if line.pop("skipped") is None and line["step"] % self.profile.report.every == 0:
                self._send(tracker, line)
            if self.run.sheet(done).exists():
                self._send_sheet(tracker, done)
            for event in sampled:
                if max(1, event.step) == done:
                    self._send_measures(tracker, event)

    def _send_step(self) -> None:
        if self.unsent is not None:
            values = asdict(self.unsent)
            self._each(lambda tracker: self._send(tracker, values))
            self.unsent = None

    def _send_measured(self) -> None:
        if self.measured is not None:
            values = _held_out(self.measured)
            self._each(lambda tracker: self._send(tracker, values))
            self.measured = None

    def _send(self, tracker: GeneralTracker, values: dict[str, Any]) -> None:
        if values["step"] >= self.lacks[tracker]:
            numbers = {name: value for name, value in values.items() if not isinstance(value, str | None)}
            tracker.log(numbers, step=values["step"])

    def _send_sheet(self, tracker: GeneralTracker, done: int) -> None:
        """Send the frames sampled after `done` steps, as part of the last of them, which a resumed run keeps."""
        step = done - 1
        if step < self.lacks[tracker]:
            return
        sheet = self.run.sheet(done)
        if tracker.name == "mlflow":
            tracker.log_artifact(str(sheet), sheet.parent.name)
        elif tracker.name in ("tensorboard", "wandb", "swanlab"):
            with Image.open(sheet) as image:
                pixels = np.asarray(image.convert("RGB"))
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels[None]}, step=step, **layout)

    def _send_measures(self, tracker: GeneralTracker, event: ValidationSampled) -> None:
        """Send the measures of validation videos, as part of the same step as their frames; the base's at step 0."""
        step = max(0, event.step - 1)
        if event.measures and step >= self.lacks[tracker]:
            tracker.log({f"validation/{name}": value for name, value in event.measures.items()}, step=step)

    def _each(self, action: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.lacks):
            self._attempt(tracker, action)

    def _attempt(self, tracker: GeneralTracker, action: Callable[[GeneralTracker], None]) -> None:
        try:
            action(tracker)
        except Exception as error:
            del self.lacks[tracker]
            self._say(tracker.name, error)

    def _say(self, name: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".strip()
        notice = Notice(f"tracker {name} failed and receives nothing more; training continues: {reason}")
        for listener in self.listeners:
            listener(notice)


def _held_out(measured: HeldOutMeasured) -> dict[str, Any]:
    """The values of held-out clips, as trackers group them."""
    return {"step": measured.step, "held_out/loss": measured.loss, "held_out/similarity": measured.similarity}


def _tracker(name: str, run: RunFolder, identity: str | None, step: int) -> GeneralTracker:
    """A tracker that is not started, of the run with this identity or of a new one."""
    title = run.path.resolve().name
    options: dict[str, Any] = {}
    if name == "tensorboard":
        options = {"purge_step": 0 if identity is None else step}
    elif name == "wandb":
        options = {"name": title, "dir": str(run.trackers), "id": identity, "resume": "allow"}
    elif name == "mlflow":
        options = {"run_name": title, "run_id": identity, "logging_dir": _artifacts(run)}
    elif name == "trackio":
        options = {"name": title, "resume": "allow"}
    kind = LOGGER_TYPE_TO_CLASS[name]
    folder = [str(run.trackers)] if kind.requires_logging_directory else []
    return kind(PROJECT, *folder, **options)


@contextmanager
def _mlflow_store(run: RunFolder) -> Iterator[None]:
    """Within this context MLflow writes to the run's folder, if the user has named no other store."""
    import mlflow

    if mlflow.is_tracking_uri_set():
        yield
        return
    mlflow.set_tracking_uri(_mlflow_uri(run))
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)


def _mlflow_uri(run: RunFolder) -> str:
    return f"sqlite:///{run.trackers.resolve().as_posix()}/mlflow.db"


def _artifacts(run: RunFolder) -> str | None:
    """The folder of MLflow's artifacts; None if the user's store decides."""
    import mlflow

    return (run.trackers.resolve() / "mlflow").as_uri() if mlflow.get_tracking_uri() == _mlflow_uri(run) else None


def _read_ids(run: RunFolder) -> dict[str, str]:
    """The identity of each tracker's run; none if the file is damaged."""
    try:
        ids: dict[str, str] = json.loads(run.tracker_ids.read_text())
    except (OSError, ValueError):
        return {}
    return ids


def _id(tracker: GeneralTracker) -> dict[str, str]:
    """The identity by which a later session continues the tracker's run, if it can."""
    match tracker.name:
        case "tensorboard":
            return {"tensorboard": PROJECT}
        case "wandb":
            return {"wandb": tracker.tracker.id}
        case "mlflow":
            return {"mlflow": tracker.tracker.info.run_id}
    return {}


def _first_lacking(tracker: GeneralTracker, step: int) -> int:
    """The first step that a continued run does not have.

    No service can delete values, and a resumed run repeats its steps exactly: those that were sent are not sent again.
    """
    if tracker.name == "mlflow":
        import mlflow

        history = mlflow.MlflowClient().get_metric_history(tracker.tracker.info.run_id, "loss")
        return max((metric.step + 1 for metric in history), default=0)
    if tracker.name == "wandb":
        if not tracker.tracker.offline:
            return int(tracker.tracker.starting_step)
        # A killed run leaves an incomplete file, and two files of one run would be uploaded over one another.
        here = Path(tracker.tracker.dir).parent
        for folder in here.parent.glob(f"offline-run-*-{tracker.tracker.id}"):
            if folder != here:
                remove_folder(folder)
        return 0
    return step


def _store_settings(tracker: GeneralTracker, profile: Profile) -> None:
    """Numbers stay numbers; lists become text, as most trackers know no lists."""
    tables = profile.model_dump(by_alias=True)
    settings = {
        f"{table}.{key}": ", ".join(map(str, value)) if isinstance(value, tuple) else value
        for table, keys in tables.items()
        for key, value in keys.items()
    }
    if tracker.name == "tensorboard":
        from torch.utils.tensorboard.summary import hparams

        # `store_init_configuration` would show a second run, of the settings alone.
        for summary in hparams(settings, {}):
            tracker.tracker.file_writer.add_summary(summary)
    else:
        tracker.store_init_configuration(settings)
