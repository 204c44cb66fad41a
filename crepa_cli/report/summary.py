"""The result of a run, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator

from crepa_cli.events import Event, RunOpened, StepDone, TrainingEnded, TrainingStarted
from crepa_cli.report.metrics import read_metrics
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

    def __call__(self, event: Event) -> None:
        """Update the summary with an event."""
        match event:
            case RunOpened():
                self.loading = event.loading
            case TrainingStarted():
                self.started = event
                for step in steps_before(event):
                    self._compare(step)
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
        if self.ended is not None and self.ended.weights is not None:
            lines += [f"Weights: {self.ended.weights}", "Load them with:", ""]
            lines += [f"    {line}".rstrip() for line in self.loading.splitlines()]
            lines += ["", f"Compare them with the base model: crepa eval {self.ended.weights.parent}"]
        elif self.started is not None:
            lines.append(f"Resume with: crepa train --resume --output {self.started.output}")
        return lines


def steps_before(started: TrainingStarted) -> Iterator[StepDone]:
    """The steps of earlier sessions, so that curves and best values cover the whole run."""
    for line in read_metrics(RunFolder(started.output).metrics) if started.step else ():
        if line["step"] < started.step and not line.pop("skipped", None):
            yield StepDone(**line)
