"""`metrics.jsonl`: one JSON object for each optimizer step."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from crepa_cli.events import Event, StepDone, StepSkipped, TrainingStarted
from crepa_cli.files import write_whole


class MetricsFile:
    """A listener that appends a line for every step.

    When a run resumes from a checkpoint, the lines of later steps are removed first: those steps run again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, event: Event) -> None:
        """Write the event, if it is a step; truncate the file when a run resumes."""
        if isinstance(event, TrainingStarted):
            self._keep_until(event.step)
        elif isinstance(event, StepDone):
            self._append(asdict(event) | {"skipped": None})
        elif isinstance(event, StepSkipped):
            nothing = dict.fromkeys(field.name for field in fields(StepDone))
            self._append(nothing | {"step": event.step, "skipped": event.reason})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _keep_until(self, step: int) -> None:
        kept = [line for line in read_metrics(self.path) if line["step"] < step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a killed run may have left an incomplete line at the end."""
    metrics = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics
