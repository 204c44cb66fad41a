"""The panels of the dashboard: lines of text that show the state of runs at a given size.

Of several runs, the first one has the figures, and each has curves in a color of its own.
"""

from __future__ import annotations

from collections.abc import Reversible, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from crepa_cli.errors import counted
from crepa_cli.events import HeldOutMeasured, TrainingStarted
from crepa_cli.report.chart import Line, Signs, beside, draw_bar, draw_chart, fitting, level, packed, spread, widths
from crepa_cli.report.curves import Curve
from crepa_cli.report.plain import STOPPING, duration, number
from crepa_cli.report.state import RunState, Series, phase

BORDER = 2
MARGIN = 4
TITLE_MARGIN = 6
LOSS_WIDTH = 18
"""The least width of a chart of a loss."""
GB = 10**9
STYLES = ("cyan", "magenta", "green", "blue")
"""Of the curves of several runs, in turn."""


@dataclass(frozen=True)
class View:
    """How charts are drawn: with which characters, and of how much of the run: half, a quarter, and so on per zoom."""

    signs: Signs
    zoom: int = 0

    def window(self, runs: Sequence[RunState]) -> tuple[int, int]:
        """The first and the last step of the charts."""
        last = max((run.latest.step for run in runs if run.latest), default=0)
        return last + 1 - max(1, (last + 1) >> self.zoom), last

    def line(self, curve: Curve, window: tuple[int, int], width: int, style: str, *, dashed: bool = False) -> Line:
        """The part of a curve inside a window of steps."""
        values = curve.columns((width * self.signs.dots[0]) << self.zoom)
        first, last = window
        if len(values) < 2:
            return Line(spread(values, end=1.0 if first == last else 0.0), style, dashed)
        span, step, gaps = max(1, last - first), curve.steps - 1, len(values) - 1
        # Multiplied first: rounding must not put the last point beyond the edge.
        points = [((index * step / gaps - first) / span, value) for index, value in enumerate(values)]
        return Line([(share, value) for share, value in points if 0 <= share <= 1], style, dashed)


def titled(title: str, lines: Sequence[Text], *, hint: str = "") -> Panel:
    """A panel of lines without wrapping, with a hint in its lower border."""
    text = Text("\n", no_wrap=True, overflow="crop", end="").join(lines)
    below = Text(hint) if hint else None
    return Panel(
        text,
        title=Text(title),
        title_align="left",
        subtitle=below,
        subtitle_align="right",
        border_style="dim",
    )


def style_of(index: int) -> str:
    """The color of a run's curves."""
    return STYLES[index % len(STYLES)]


def header(runs: Sequence[RunState], work: str, width: int) -> str:
    """The title of the first panel: the work, with the run's name, model and device as far as they fit."""
    opened = runs[0].opened
    if opened is None:
        return work
    name = f"{work} {opened.output.name}"
    if not opened.model:
        return fitting(width, name, work)
    place, model = f" on {opened.device}", opened.model.rsplit("/", 1)[-1]
    return fitting(width, f"{name}: {opened.model}{place}", f"{name}: {model}{place}", f"{name}: {model}", name, work)


def now_lines(state: RunState, question: str, requests: Sequence[str], width: int) -> list[Text]:
    """One line, if the run is being stopped, a key asks a question, or requests wait for the end of the step."""
    if state.stopping:
        texts = [STOPPING, "stopping"]
    elif question:
        texts = [question, question.partition(" within")[0]]
    elif requests:
        texts = [f"{' and '.join(requests)} after this step", "after this step"]
    else:
        return []
    return [Text(fitting(width, *texts), style="bold yellow")]


def progress_lines(
    state: RunState, started: TrainingStarted, view: View, now: Sequence[Text], width: int, height: int
) -> list[Text]:
    """The bar of the run's steps, and below it `now` and facts, the most important first, in `height` lines at most."""
    latest = state.latest
    done = started.step if latest is None else latest.step + 1
    left = "-" if state.seconds_left is None else str(timedelta(seconds=round(state.seconds_left)))
    share = done / started.steps
    before, after = f"step {done:,} of {started.steps:,} ", f" {share:4.0%}  ETA {left}"
    bar = draw_bar(share, max(0, width - len(before) - len(after)), view.signs)
    line = Text.assemble((before, "bold"), (bar, "green"), (after, "bold"))
    parts = packed(_facts(state, started, done), width, height - len(now))
    return [line, *now, *(Text(part) for part in parts)]


def _facts(state: RunState, started: TrainingStarted, done: int) -> list[str]:
    epochs, latest = started.batches_per_epoch, state.latest
    work = [state.work_text] if state.work_text else []
    facts = [f"epoch {done / epochs:.1f} of {started.steps / epochs:.1f}"] if epochs else []
    if latest is None:
        facts.append("waiting for the first step")
    else:
        memory = state.opened.device_memory if state.opened else 0
        of = f" of {memory / GB:.2f}" if memory else ""
        facts += [
            f"{latest.step_seconds:.3f} s per step",
            f"{latest.samples_per_second:.2f} clips per second",
            *([state.parts_text] if state.parts_text else []),
            f"memory {latest.peak_memory_bytes / GB:.2f}{of} GB",
            *([state.gpu] if state.gpu else []),
            f"learning rate {latest.learning_rate:.2e}",
            f"gradient norm {latest.grad_norm:.3f}",
        ]
    facts.append(f"elapsed {duration(state.elapsed)}")
    for name, every in (("checkpoint", started.checkpoint_every), ("validation", started.validation_every)):
        following = done - done % every + every if every else 0
        if done < following <= started.steps:
            facts.append(f"{name} at step {following:,}")
    return [*work, *facts]


def legend_lines(runs: Sequence[RunState]) -> list[Text]:
    """One line with the names of several runs, each in the color of its curves, and their steps."""
    if len(runs) == 1:
        return []
    names = [
        (f"{run.opened.output.name if run.opened else '-'} at step {run.latest.step if run.latest else 0:,}   ", style)
        for run, style in zip(runs, map(style_of, range(len(runs))), strict=True)
    ]
    return [Text.assemble(*names)]


def losses_lines(runs: Sequence[RunState], view: View, width: int, height: int) -> list[Text]:
    """A chart of each loss, side by side, as many as fit, below its last and its smoothed value."""
    state = runs[0]
    names = [name for name, series in state.losses.items() if state.latest is None or series.smoothed is not None]
    window, blocks = view.window(runs), []
    sizes = widths(width, min(len(names), max(1, width // LOSS_WIDTH)))
    for name, size in zip(names, sizes, strict=False):
        lines = [
            view.line(run.losses[name].curve, window, size, style_of(index))
            for index, run in enumerate(runs)
            if name in run.losses
        ]
        if name == "diffusion":
            lines += [_held_out_points(run.held_out, window) for run in runs]
        head = _loss_head(name, state.losses[name], size)
        blocks.append(([head, *draw_chart(lines, size, height - 1, view.signs, steps=window)], size))
    return beside(blocks)


def _loss_head(name: str, series: Series, width: int) -> Text:
    now, smoothed = number(series.now), number(series.smoothed)
    values = fitting(
        width - len(name),
        f" {now}  smoothed {smoothed}",
        f" {now}, smoothed {smoothed}",
        f" {now} {smoothed}",
        f" {now}",
    )
    return Text.assemble((name, "cyan"), values)


def _held_out_points(measured: Sequence[HeldOutMeasured], window: tuple[int, int]) -> Line:
    first, last = window
    points = [((one.step - first) / max(1, last - first), one.loss) for one in measured if first <= one.step]
    return Line([(min(1.0, share), loss) for share, loss in points], "yellow")


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


def held_out_lines(state: RunState, width: int) -> list[Text]:
    """One line, once there is a held-out loss: the newest, the lowest, the first, and the similarity, as they fit."""
    if not state.held_out:
        return []
    first, newest = state.held_out[0], state.held_out[-1]
    best = min(state.held_out, key=lambda one: one.loss)
    parts = [
        f"held out {number(newest.loss)}",
        f"best {number(best.loss)} at step {best.step:,}",
        f"first {number(first.loss)}",
        *([] if newest.similarity is None else [f"similarity {newest.similarity:.3f}"]),
    ]
    return [Text(line, style="yellow") for line in packed(parts, width, 1)]


def coefficient_lines(runs: Sequence[RunState], view: View, console: Console, width: int, height: int) -> list[Text]:
    """The coefficient and its phase, above its planned curve (dashed) and its values so far."""
    state = runs[0]
    value = "" if state.latest is None else f"lambda {state.latest.crepa_coefficient:.4f}  "
    lines = list(Text.assemble((value, "bold"), phase(state)).wrap(console, width))
    schedule, started = state.schedule, state.started
    if schedule is None or started is None:
        return lines
    last = max(1, started.steps - 1)
    columns = width * view.signs.dots[0]
    planned = [schedule.planned(column * last // max(1, columns - 1)) for column in range(columns)]
    drawn = [Line(spread(planned), "dim", dashed=True)]
    # The whole plan is shown, whatever part of the other curves is.
    whole = View(view.signs)
    drawn += [whole.line(run.coefficient.curve, (0, last), width, style_of(index)) for index, run in enumerate(runs)]
    step = started.step if state.latest is None else state.latest.step
    chart = draw_chart(
        drawn, width, max(2, height - len(lines)), view.signs, steps=(0, last), zero=True, mark=step / last
    )
    return [*lines, *chart]


def similarity_lines(runs: Sequence[RunState], view: View, width: int, height: int) -> list[Text]:
    """The similarity, its average and that with the own frame alone, above a chart with the threshold."""
    latest, window = runs[0].latest, view.window(runs)
    average, own = (None, None) if latest is None else (latest.crepa_similarity_ema, latest.crepa_self_similarity)
    now, threshold = number(runs[0].similarity.now), _threshold(runs[0])
    lines = [] if threshold is None else [level(threshold)]
    for index, run in enumerate(runs):
        lines.append(view.line(run.similarity.curve, window, width, style_of(index)))
        if len(runs) == 1:
            lines.append(view.line(run.average.curve, window, width, "bold green"))
    head = fitting(
        width, f"{now}  average {number(average)}  own {number(own)}", f"{now}  average {number(average)}", now
    )
    chart = draw_chart(lines, width, height - 1, view.signs, steps=window, named=threshold)
    return [Text(head), *chart]


def similarity_title(state: RunState, width: int) -> str:
    """The title of the similarity's panel, with the distance to the threshold if it fits."""
    average, threshold = state.latest.crepa_similarity_ema if state.latest else None, _threshold(state)
    if threshold is None or average is None:
        return "similarity"
    side = "below" if average < threshold else "above"
    distance = f"{abs(threshold - average):.3f} {side}"
    return fitting(
        width,
        f"similarity: average {distance} the threshold {threshold}",
        f"similarity: {distance} {threshold}",
        "similarity",
    )


def _threshold(state: RunState) -> float | None:
    return None if state.schedule is None else state.schedule.similarity_threshold


def message_lines(messages: Reversible[str], console: Console, width: int, height: int) -> list[Text]:
    """The newest messages that fit, newest last; long ones take several lines."""
    lines: list[Text] = []
    for message in reversed(messages):
        wrapped = list(Text(message).wrap(console, width))
        if lines and len(wrapped) + len(lines) > height:
            break
        lines[:0] = wrapped
    return lines[:height]
