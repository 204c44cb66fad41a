"""`metrics.jsonl`: one JSON object for each optimizer step.

What a validation finds, the measures of its videos and the loss of held-out clips, is part of the line of the step that
follows. It has a line of its own if no step follows, and the measures of videos if a run resumes from that moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from crepa_cli.events import (
    Event,
    HeldOutMeasured,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingStarted,
    ValidationSampled,
)
from crepa_cli.files import write_whole

VALIDATION = "validation_"
"""The beginning of the keys of measures of validation videos."""
HELD_OUT = "held_out_"
"""The beginning of the keys of values of held-out clips."""


class MetricsFile:
    """A listener that appends a line for every step.

    When a run resumes from a checkpoint, the lines of later steps are removed first: those steps run again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: dict[str, Any] = {}
        """Values of a validation that wait for the line of the next step."""

    def __call__(self, event: Event) -> None:
        """Write the event, if it is a step; truncate the file when a run resumes."""
        if isinstance(event, TrainingStarted):
            self._keep_until(event.step)
        elif isinstance(event, HeldOutMeasured):
            self.waiting |= {f"{HELD_OUT}{key}": value for key, value in asdict(event).items() if key != "step"}
        elif isinstance(event, StepDone):
            self._append(asdict(event) | {"skipped": None})
        elif isinstance(event, StepSkipped):
            nothing = dict.fromkeys(field.name for field in fields(StepDone))
            self._append(nothing | {"step": event.step, "skipped": event.reason})
        elif isinstance(event, ValidationSampled):
            self.waiting |= _columns(event)
        elif isinstance(event, TrainingEnded) and self.waiting:
            self._append({"step": event.step})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | self.waiting) + "\n")
        self.waiting = {}

    def _keep_until(self, step: int) -> None:
        kept = [line for line in _lines(self.path) if line["step"] < step]
        # A run samples again if it starts from the beginning, and not if it resumes from a checkpoint. The loss of
        # held-out clips comes again, from the checkpoint.
        sampled = [event for event in read_validations(self.path) if 0 < event.step == step]
        kept += [{"step": step, **_columns(event)} for event in sampled]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of the steps in a metrics file, without what validations found."""
    steps = (line for line in _lines(path) if "loss" in line)
    return [{key: value for key, value in line.items() if not key.startswith((VALIDATION, HELD_OUT))} for line in steps]


def step_done(line: Mapping[str, Any]) -> StepDone | None:
    """The event of a line; None if it has no step, or one that was skipped."""
    if "loss" not in line or line.get("skipped"):
        return None
    return StepDone(**{field.name: line[field.name] for field in fields(StepDone) if field.name in line})


def read_validations(path: Path) -> list[ValidationSampled]:
    """The measures of the validation videos in a metrics file, without the paths of the videos."""
    found = [ValidationSampled(line["step"], (), _measures(line)) for line in _lines(path)]
    return [event for event in found if event.measures]


def read_held_out(path: Path) -> list[HeldOutMeasured]:
    """The values of held-out clips in a metrics file."""
    keys = [field.name for field in fields(HeldOutMeasured) if field.name != "step"]
    measured = (line for line in _lines(path) if f"{HELD_OUT}loss" in line)
    return [HeldOutMeasured(line["step"], **{key: line[f"{HELD_OUT}{key}"] for key in keys}) for line in measured]


def _columns(event: ValidationSampled) -> dict[str, float]:
    """The measures of validation videos by their keys in a metrics file."""
    return {f"{VALIDATION}{name}": value for name, value in event.measures.items()}


def _measures(line: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix(VALIDATION): value for key, value in line.items() if key.startswith(VALIDATION)}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a killed run may have left an incomplete line at the end."""
    metrics = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics
