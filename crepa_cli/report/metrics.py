"""`metrics.jsonl`: one JSON object for each optimizer step.

Values of held-out clips after some steps are part of the line of the step that follows; those after the last step have
a line of their own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from crepa_cli.events import Event, HeldOutMeasured, StepDone, StepSkipped, TrainingEnded, TrainingStarted
from crepa_cli.files import write_whole

HELD_OUT = "held_out_"
"""The beginning of the keys of values of held-out clips."""


class MetricsFile:
    """A listener that appends a line for every step.

    When a run resumes from a checkpoint, the lines of later steps are removed first: those steps run again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.measured: dict[str, Any] = {}
        """Values that wait for the line of the next step."""

    def __call__(self, event: Event) -> None:
        """Write the event, if it is a step; truncate the file when a run resumes."""
        if isinstance(event, TrainingStarted):
            self._keep_until(event.step)
        elif isinstance(event, HeldOutMeasured):
            self.measured = {f"{HELD_OUT}{key}": value for key, value in asdict(event).items() if key != "step"}
        elif isinstance(event, StepDone):
            self._append(asdict(event) | {"skipped": None})
        elif isinstance(event, StepSkipped):
            nothing = dict.fromkeys(field.name for field in fields(StepDone))
            self._append(nothing | {"step": event.step, "skipped": event.reason})
        elif isinstance(event, TrainingEnded) and event.weights is not None and self.measured:
            self._append({"step": event.step})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | self.measured) + "\n")
        self.measured = {}

    def _keep_until(self, step: int) -> None:
        kept = [line for line in _lines(self.path) if line["step"] < step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of the steps in a metrics file, without the values of held-out clips."""
    steps = (line for line in _lines(path) if "loss" in line)
    return [{key: value for key, value in line.items() if not key.startswith(HELD_OUT)} for line in steps]


def read_held_out(path: Path) -> list[HeldOutMeasured]:
    """The values of held-out clips in a metrics file."""
    keys = [field.name for field in fields(HeldOutMeasured) if field.name != "step"]
    measured = (line for line in _lines(path) if f"{HELD_OUT}loss" in line)
    return [HeldOutMeasured(line["step"], **{key: line[f"{HELD_OUT}{key}"] for key in keys}) for line in measured]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a killed run may have left an incomplete line at the end."""
    metrics = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics
