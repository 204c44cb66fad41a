"""The result of a run, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from crepa_cli.events import (
    Event,
    HeldOutMeasured,
    RunOpened,
    StepDone,
    TrainingEnded,
    TrainingStarted,
    ValidationSampled,
)
from crepa_cli.report.metrics import read_held_out, read_metrics, read_validations, step_done
from crepa_cli.report.state import Series
from crepa_cli.runs.folder import RunFolder


class Summary:
    """A listener that sums up a run: the best values, and how to load the weights or to resume."""

    def __init__(self) -> None:
        self.loading = ""
        self.started: TrainingStarted | None = None
        self.ended: TrainingEnded | None = None
        self.loss = Series()
        self.lowest_loss: tuple[float, int] | None = None
        self.highest_similarity: tuple[float, int] | None = None
        self.held_out: list[HeldOutMeasured] = []

    def __call__(self, event: Event) -> None:
        """Update the summary with an event."""
        match event:
            case RunOpened():
                self.loading = event.loading
            case TrainingStarted():
                self.started = event
                for step in steps_before(event):
                    self._compare(step)
                self.held_out += held_out_before(event)
            case HeldOutMeasured():
                self.held_out.append(event)
            case StepDone():
                self._compare(event)
            case TrainingEnded():
                self.ended = event

    def _compare(self, step: StepDone) -> None:
        self.loss.add(step.diffusion_loss)
        smoothed, similarity = self.loss.smoothed, step.crepa_similarity
        if smoothed is not None and (self.lowest_loss is None or smoothed < self.lowest_loss[0]):
            self.lowest_loss = smoothed, step.step
        if similarity is not None and (self.highest_similarity is None or similarity > self.highest_similarity[0]):
            self.highest_similarity = similarity, step.step

    def lines(self) -> list[str]:
        """The lines of the summary; empty if no training took place."""
        lines = []
        if self.lowest_loss is not None:
            lines.append("Lowest diffusion loss (smoothed): {:.4f} at step {:,}".format(*self.lowest_loss))
        if self.highest_similarity is not None:
            lines.append("Highest similarity: {:.4f} at step {:,}".format(*self.highest_similarity))
        if self.held_out:
            lines.append(f"Held-out loss: {held_out_words(self.held_out)}")
        if self.ended is not None and self.ended.weights is not None:
            lines += [f"Weights: {self.ended.weights}", "Load them with:", ""]
            lines += [f"    {line}".rstrip() for line in self.loading.splitlines()]
            run, more = self.ended.weights.parent, 2 * self.ended.step
            lines += ["", f"Compare them with the base model: crepa eval {run}"]
            lines.append(f"Train further: crepa train --resume --output {run} --steps {more}")
        elif self.started is not None:
            lines.append(f"Resume with: crepa train --resume --output {self.started.output}")
        return lines


def held_out_words(held_out: Sequence[HeldOutMeasured]) -> str:
    """The first, the last and the lowest loss of held-out clips."""
    first, last, lowest = held_out[0], held_out[-1], min(held_out, key=lambda one: one.loss)
    return (
        f"{first.loss:.4f} at step {first.step:,}, {last.loss:.4f} at step {last.step:,}, "
        f"lowest {lowest.loss:.4f} at step {lowest.step:,}"
    )


def held_out_before(started: TrainingStarted) -> list[HeldOutMeasured]:
    """The values of held-out clips of earlier sessions; that of the first step comes as an event."""
    if not started.step:
        return []
    return [one for one in read_held_out(RunFolder(started.output).metrics) if one.step < started.step]


def steps_before(started: TrainingStarted) -> Iterator[StepDone]:
    """The steps of earlier sessions, so that curves and best values cover the whole run."""
    for line in read_metrics(RunFolder(started.output).metrics) if started.step else ():
        if line["step"] < started.step and (step := step_done(line)) is not None:
            yield step


def validations_before(started: TrainingStarted) -> list[ValidationSampled]:
    """The validation videos of earlier sessions, with their measures."""
    run = RunFolder(started.output)
    found = read_validations(run.metrics) if started.step else []
    return [replace(event, paths=run.videos(event.step)) for event in found if event.step <= started.step]
