"""The panels of the dashboard: lines of text that show the state of a run at a given size."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from crepa_cli.errors import counted
from crepa_cli.events import HeldOutMeasured, StepDone, TrainingStarted
from crepa_cli.report.curves import draw_bars, draw_curve, draw_gauge
from crepa_cli.report.plain import number
from crepa_cli.report.state import RunState, phase

BORDER = 2
MARGIN = 4
GB = 10**9


def titled(title: str, lines: Sequence[Text]) -> Panel:
    """A panel of lines without wrapping."""
    text = Text("\n", no_wrap=True, overflow="crop", end="").join(lines)
    return Panel(text, title=title, title_align="left", border_style="dim")


def progress_lines(
    started: TrainingStarted, latest: StepDone | None, seconds_left: float | None, memory: int, width: int
) -> list[Text]:
    """Progress, speed and memory of the run."""
    done = started.step if latest is None else latest.step + 1
    left = "-" if seconds_left is None else str(timedelta(seconds=round(seconds_left)))
    share = done / started.steps
    before, after = f"step {done:,} of {started.steps:,} ", f" {share:4.0%}  ETA {left}"
    bar = draw_gauge(share, None, max(0, width - len(before) - len(after)))
    lines = [Text.assemble((before, "bold"), (bar, "green"), (after, "bold"))]
    epochs = started.batches_per_epoch
    epoch = f"epoch {done / epochs:.1f} of {started.steps / epochs:.1f}"
    if latest is None:
        return [*lines, Text(epoch), Text("waiting for the first step", style="dim")]
    used = f"memory {latest.peak_memory_bytes / GB:.2f} of {memory / GB:.2f} GB"
    speed = f"{latest.step_seconds:.3f} s per step   {latest.samples_per_second:.2f} clips per second"
    rate = f"learning rate {latest.learning_rate:.2e}   gradient norm {latest.grad_norm:.3f}"
    return [*lines, Text(f"{epoch}   {speed}"), Text(f"{used}   {rate}")]


def losses_lines(state: RunState, width: int, height: int) -> list[Text]:
    """Each loss: the value, the smoothed value, and its curve in `height` lines."""
    lines = []
    for name, series in state.losses.items():
        head = f"{name:<10}{number(series.now):>9}  smoothed {number(series.smoothed):>9}  "
        curve = draw_curve(series.curve, width - len(head), height)
        heads = [*[" " * len(head)] * (height - 1), head]
        lines += [Text.assemble(head, (row, "cyan")) for head, row in zip(heads, curve, strict=True)]
    return lines


SHOWN = {
    "temporal_flickering": "steadiness",
    **{name: name for name in ("motion", "saturation", "contrast", "stripes")},
}
"""Names of the measures of validation videos, in the order of their importance."""


def sampled_lines(state: RunState, width: int) -> list[Text]:
    """One line, once videos are measured: the newest validation, and the first one in parentheses, as much as fits."""
    if not state.sampled:
        return []
    first, newest = state.sampled[0], state.sampled[-1]
    still = int(newest.measures["still"])
    line = counted(still, "still video") if still else "videos"
    line += f" (step {first.step:,}):" if newest is not first else f" at step {first.step:,}:"
    for name, label in SHOWN.items():
        part = f"  {label} {number(newest.measures.get(name))}"
        part += f" ({number(first.measures.get(name))})" if newest is not first else ""
        line += part if len(line + part) <= width else ""
    return [Text(line, style="yellow" if still else "")]


def held_out_line(measured: Sequence[HeldOutMeasured]) -> Text:
    """The newest loss and similarity of held-out clips, the lowest loss, and that of the first measurement."""
    first, newest = measured[0], measured[-1]
    best = min(measured, key=lambda one: one.loss)
    similarity = "" if newest.similarity is None else f"  similarity {newest.similarity:.3f}"
    return Text(
        f"held out  {number(newest.loss):>9}  step {first.step:,} {number(first.loss)}  "
        f"best {number(best.loss)} at {best.step:,}{similarity}"
    )


def coefficient_lines(state: RunState, console: Console, width: int, height: int) -> list[Text]:
    """The coefficient, its phase, and its planned curve with a mark at the current step."""
    value = "" if state.latest is None else f"{state.latest.crepa_coefficient:.4f}  "
    lines = list(Text.assemble((value, "bold"), phase(state)).wrap(console, width))
    schedule, started = state.schedule, state.started
    if schedule is None or started is None:
        return lines
    last = max(1, started.steps - 1)
    planned = [schedule.planned(column * last // max(1, width - 1)) for column in range(width)]
    rows = draw_bars(planned, max(1, height - len(lines) - 1), 0.0, max(planned))
    step = started.step if state.latest is None else state.latest.step
    mark = " " * round(step * (width - 1) / last) + "▲"
    return [*lines, *(Text(row, style="magenta") for row in rows), Text(mark, style="bold")]


def similarity_lines(state: RunState, width: int, height: int) -> list[Text]:
    """The similarity, its average, that with the own frame alone, a gauge against the threshold, and its curve."""
    latest = state.latest
    average, own = (None, None) if latest is None else (latest.crepa_similarity_ema, latest.crepa_self_similarity)
    threshold = None if state.schedule is None else state.schedule.similarity_threshold
    gauge = draw_gauge(average or 0.0, threshold, width)
    style = "green" if threshold is None or (average or 0.0) < threshold else "yellow"
    curve = draw_curve(state.similarity.curve, width, max(1, height - 3))
    return [
        Text.assemble((f"{number(state.similarity.now)}", "bold"), f"  average {number(average)}  own {number(own)}"),
        Text(gauge, style=style),
        Text(_distance(average, threshold), style="dim"),
        *(Text(row, style="cyan") for row in curve),
    ]


def _distance(average: float | None, threshold: float | None) -> str:
    if threshold is None:
        return "no threshold"
    if average is None:
        return f"threshold {threshold}"
    side = "below" if average < threshold else "above"
    return f"{abs(threshold - average):.3f} {side} the threshold {threshold}"


def message_lines(messages: Sequence[str], console: Console, width: int, height: int) -> list[Text]:
    """The newest messages that fit, newest last; long ones take several lines."""
    lines: list[Text] = []
    for message in reversed(messages):
        wrapped = list(Text(message).wrap(console, width))
        if lines and len(wrapped) + len(lines) > height:
            break
        lines[:0] = wrapped
    return lines[:height]
