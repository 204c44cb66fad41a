"""`curves.svg`: losses, coefficient (lambda) and similarity over the steps of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from crepa_cli.events import Event, HeldOutMeasured, TrainingEnded, TrainingStarted
from crepa_cli.files import write_whole
from crepa_cli.report.curves import BUCKETS, Curve
from crepa_cli.report.metrics import read_held_out, read_metrics
from crepa_cli.runs.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHARTS = {
    "losses": {"loss": "total", "diffusion_loss": "diffusion", "crepa_loss": "alignment"},
    "lambda (coefficient)": {"crepa_coefficient": "lambda"},
    "similarity": {"crepa_similarity": "similarity", "crepa_similarity_ema": "average", "crepa_self_similarity": "own"},
}


class CurvesFile:
    """A listener that plots a run's `metrics.jsonl` when training resumes, ends or is stopped.

    Args:
        run: the run's folder.
        threshold: of the similarity; drawn as a line if given.
    """

    def __init__(self, run: RunFolder, threshold: float | None) -> None:
        self.run = run
        self.threshold = threshold

    def __call__(self, event: Event) -> None:
        """Draw the curves if the event is such a moment."""
        if isinstance(event, TrainingEnded) or (isinstance(event, TrainingStarted) and event.step):
            metrics = read_metrics(self.run.metrics)
            write_whole(self.run.curves, draw_metrics(metrics, self.threshold, read_held_out(self.run.metrics)))


def draw_metrics(
    metrics: Sequence[dict[str, Any]], threshold: float | None, held_out: Sequence[HeldOutMeasured] = ()
) -> bytes:
    """An SVG of the lines of a metrics file; the same lines give the same bytes.

    Args:
        metrics: from `read_metrics`.
        threshold: of the similarity; drawn as a line if given.
        held_out: from `read_held_out`, drawn beside loss and similarity.
    """
    import matplotlib
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "crepa", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 9), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(len(CHARTS), sharex=True), CHARTS.items(), strict=True):
            for key, label in keys.items():
                _draw_line(axes, metrics, key, label)
            if points := _held_out_points(title, held_out):
                axes.plot(*zip(*points, strict=True), label="held out", marker=".", color="black", linewidth=1.2)
            axes.set_ylabel(title)
            axes.grid(alpha=0.3)
        if threshold is not None:
            axes.axhline(threshold, color="gray", linestyle="--", label=f"threshold {threshold}")
        axes.set_xlabel("step")
        for axes in figure.axes:
            if axes.lines:
                axes.legend(loc="best")
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def _held_out_points(chart: str, held_out: Sequence[HeldOutMeasured]) -> list[tuple[int, float]]:
    """Steps and values of held-out clips that belong into a chart."""
    value = {"losses": lambda one: one.loss, "similarity": lambda one: one.similarity}.get(chart)
    return [(one.step, value(one)) for one in held_out if value(one) is not None] if value else []


def _draw_line(axes: Axes, metrics: Sequence[dict[str, Any]], key: str, label: str) -> None:
    """Draw the values that exist; long runs are averaged so that the file stays small."""
    points = curve_points([(line["step"], line.get(key)) for line in metrics])
    if points:
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)


def curve_points(values: Sequence[tuple[int, float | None]]) -> list[tuple[float, float]]:
    """Steps and values to draw: means over equal stretches, each at the middle of its stretch, between exact ends."""
    if len(values) <= BUCKETS:
        return [(step, value) for step, value in values if value is not None]
    curve = Curve()
    for _, value in values:
        curve.add(value)
    middle = values[0][0] + (curve.steps_per_bucket - 1) / 2
    means = [(middle + index * curve.steps_per_bucket, mean) for index, mean in enumerate(curve.columns(BUCKETS))]
    exact = [(step, value) for step, value in values if value is not None]
    inner = [(step, mean) for step, mean in means if mean is not None and exact[0][0] < step < exact[-1][0]]
    return [exact[0], *inner, exact[-1]] if exact else []
