"""`events.jsonl`: every event of a run but steps and progress, with its time, as one JSON object per line."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from crepa_cli import events
from crepa_cli.events import Event, Progress, RunOpened, StepDone

KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        events.RunOpened,
        events.ClipSkipped,
        events.Notice,
        events.TrainingStarted,
        events.StepSkipped,
        events.AlignmentDropped,
        events.CheckpointSaved,
        events.ValidationSampled,
        events.HeldOutMeasured,
        events.TrainingEnded,
    )
}
PATHS = {"output", "path", "weights"}


class EventsFile:
    """A listener that appends events; each session of a run begins with `RunOpened`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, event: Event) -> None:
        """Write the event, unless it is a step, which `metrics.jsonl` has, or progress."""
        if not isinstance(event, StepDone | Progress):
            line = {"time": round(time.time(), 3), "event": type(event).__name__, **asdict(event)}
            # A killed run may have left half a line, which must not take the first one of this session with it.
            start = "\n" if isinstance(event, RunOpened) and self.path.exists() else ""
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{start}{json.dumps(line, default=_text)}\n")


def _text(value: object) -> str:
    return value.as_posix() if isinstance(value, Path) else str(value)


def read_event(line: dict[str, Any]) -> Event | None:
    """The event of a line; None if a later version wrote a kind of event that is not known here."""
    kind = KINDS.get(line["event"])
    if kind is None:
        return None
    names = {field.name for field in fields(kind)}
    values = {name: value for name, value in line.items() if name in names}
    for name in PATHS & values.keys():
        values[name] = None if values[name] is None else Path(values[name])
    if "paths" in values:
        values["paths"] = tuple(Path(path) for path in values["paths"])
    return kind(**values)
