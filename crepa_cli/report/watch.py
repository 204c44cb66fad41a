"""A run that is going on or over, as events read from its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from crepa_cli.events import Event, RunOpened, StepDone, TrainingEnded, TrainingStarted, ValidationSampled
from crepa_cli.profile import Profile
from crepa_cli.report.events_file import read_event
from crepa_cli.report.metrics import read_held_out, read_validations, step_done
from crepa_cli.runs.facts import read_facts
from crepa_cli.runs.folder import RunFolder

Timed = tuple[float, Event]


class Tail:
    """The lines of a JSON Lines file, each read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    @property
    def shortened(self) -> bool:
        """Whether the file has lost lines that were read."""
        return self._size() < self.position

    def read(self) -> list[dict[str, Any]]:
        """The lines that were completed since the last call."""
        if self._size() <= self.position:
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            whole, _, _ = file.read().rpartition(b"\n")
        self.position += len(whole) + 1 if whole else 0
        return [line for text in whole.splitlines() if (line := _parsed(text)) is not None]

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The object in a line; None for the rest of one that a killed run has left."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


class WatchedRun:
    """The events of a run's newest session, in the order in which a view needs them.

    Args:
        run: the folder; it may be a copy.
        profile: its settings.
    """

    def __init__(self, run: RunFolder, profile: Profile) -> None:
        self.run = run
        self.profile = profile
        self.started: TrainingStarted | None = None
        self._begin()

    def poll(self) -> list[Timed]:
        """The events since the last call, with their times; from `RunOpened` on if the run was started again."""
        if self.events.shortened or self.metrics.shortened:
            self._begin()
        if not self.run.events.exists():
            return self._without_events()
        lines = self.events.read()
        # The lines of steps that were read may have been written again.
        if any(line["event"] == "RunOpened" for line in lines):
            self._restart_steps()
        timed = [(line["time"], event) for line in lines if (event := read_event(line)) is not None]
        start = max((index for index, (_, event) in enumerate(timed) if isinstance(event, RunOpened)), default=0)
        return list(self._with_steps([(moment, self._here(event)) for moment, event in timed[start:]]))

    def _begin(self) -> None:
        self.events = Tail(self.run.events)
        self._restart_steps()

    def _restart_steps(self) -> None:
        self.metrics = Tail(self.run.metrics)
        self.started, self.ended = None, False

    def _here(self, event: Event) -> Event:
        """An event with the folder of the run on this machine."""
        if isinstance(event, RunOpened | TrainingStarted):
            return replace(event, output=self.run.path)
        if isinstance(event, ValidationSampled):
            return replace(event, paths=tuple(self.run.samples(event.step) / path.name for path in event.paths))
        return event

    def _with_steps(self, timed: list[Timed]) -> Iterator[Timed]:
        """Events with the steps among them: after the start of the training, and before everything later."""
        later = []
        for moment, event in timed:
            if self.started is not None:
                later.append((moment, event))
                continue
            yield moment, event
            if isinstance(event, TrainingStarted):
                self.started = event
        yield from self._steps()
        yield from later
        self.ended = any(isinstance(event, TrainingEnded) for _, event in later) or (self.ended and not timed)

    def _steps(self) -> Iterator[tuple[float, StepDone]]:
        if self.started is None or not self.run.metrics.exists():
            return
        moment = self.run.metrics.stat().st_mtime
        for line in self.metrics.read():
            step = step_done(line)
            if step is not None and step.step >= self.started.step:
                yield moment, step

    def _without_events(self) -> list[Timed]:
        """The events of a run of a version that wrote none to a file, as far as its other files tell them."""
        profile, run = self.profile, self.run
        found: list[Event] = []
        if self.started is None:
            facts = read_facts(run)
            started = TrainingStarted(run.path, 0, profile.train.steps, facts.get("clips", 0), 0, 0)
            model = f"{profile.model.checkpoint}, {profile.model.task}"
            found = [RunOpened(run.path, 0, "", model, facts.get("device", "-")), started]
            self.started = started
            found += [replace(one, paths=run.videos(one.step)) for one in read_validations(run.metrics)]
            found += read_held_out(run.metrics)
        steps = list(self._steps())
        events: list[Event] = [step for _, step in steps]
        moment = steps[-1][0] if steps else run.profile.stat().st_mtime
        begin = moment - sum(step.step_seconds for _, step in steps)
        last = profile.train.steps - 1
        if any(step.step == last for _, step in steps) and run.weights.is_dir():
            self.ended = True
            events.append(TrainingEnded(last + 1, run.weights))
        return [*((begin, event) for event in found), *((moment, event) for event in events)]
