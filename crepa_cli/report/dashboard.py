"""The live dashboard: what training looks like in a terminal."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from rich import progress as bars
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from crepa_cli.events import AlignmentDropped, Event, Progress, StepDone, TrainingStarted
from crepa_cli.profile import Crepa
from crepa_cli.report.plain import describe, number

BARS = "▁▂▃▄▅▆▇█"
MESSAGES = 5


class Sparkline:
    """A curve of one line over the whole run, as wide as its place allows.

    Args:
        values: one per step so far.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Average the values into as many columns as there are, lowest to highest bar."""
        width = min(options.max_width, len(self.values))
        edges = [index * len(self.values) // width for index in range(width + 1)] if width else []
        means = [sum(self.values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        low, high = min(means, default=0.0), max(means, default=0.0)
        scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
        yield Text("".join(BARS[round((mean - low) * scale)] for mean in means), style="cyan", no_wrap=True)


class Dashboard:
    """A listener that keeps a live view of the run on the screen; use it as a context.

    Args:
        console: a terminal.
        crepa: for the similarity's threshold.
    """

    def __init__(self, console: Console, crepa: Crepa) -> None:
        self.crepa = crepa
        self.latest: StepDone | None = None
        self.dropped: AlignmentDropped | None = None
        self.curves: dict[str, list[float]] = {"loss": [], "diffusion": [], "alignment": [], "similarity": []}
        self.messages: deque[str] = deque(maxlen=MESSAGES)
        self.progress = bars.Progress(
            bars.TextColumn("{task.description:<10}"),
            bars.BarColumn(bar_width=None),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self.tasks: dict[str, bars.TaskID] = {}
        self.live = Live(self, console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Dashboard:
        """Show the view."""
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last view on the screen."""
        self.live.stop()

    def __call__(self, event: Event) -> None:
        """Take an event into the view."""
        match event:
            case Progress(stage, done, total):
                self._advance(stage, done, total)
            case StepDone():
                self.latest = event
                self._record(event)
                self.progress.update(self.tasks["training"], completed=event.step + 1)
            case TrainingStarted(_, step, steps):
                self._advance("training", step, steps)
            case AlignmentDropped():
                self.dropped = event
        if not isinstance(event, Progress | StepDone):
            self.messages.append(describe(event))

    def __rich__(self) -> RenderableType:
        """The view as it is now."""
        parts: list[RenderableType] = [self.progress]
        if self.latest is not None:
            parts.append(Panel(self._values(self.latest), title="training", title_align="left"))
        if self.messages:
            lines = [Text(message, no_wrap=True, overflow="ellipsis") for message in self.messages]
            parts.append(Panel(Group(*lines), title="events", title_align="left"))
        return Group(*parts)

    def _advance(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=total)
        self.progress.update(self.tasks[stage], completed=done, total=total)

    def _record(self, step: StepDone) -> None:
        self.curves["loss"].append(step.loss)
        self.curves["diffusion"].append(step.diffusion_loss)
        if step.crepa_loss is not None and step.crepa_similarity is not None:
            self.curves["alignment"].append(step.crepa_loss)
            self.curves["similarity"].append(step.crepa_similarity)

    def _values(self, step: StepDone) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(ratio=1, no_wrap=True)
        values = {
            "loss": step.loss,
            "diffusion": step.diffusion_loss,
            "alignment": step.crepa_loss,
            "similarity": step.crepa_similarity,
        }
        for name, value in values.items():
            table.add_row(name, number(value), Sparkline(self.curves[name]))
        threshold = self.crepa.similarity_threshold
        goal = "" if threshold is None else f"cutoff at {threshold}"
        table.add_row("average", number(step.crepa_similarity_ema), goal)
        table.add_row("coefficient", number(step.crepa_coefficient), self.dropped.reason if self.dropped else "")
        table.add_row("step time", f"{step.step_seconds:.3f} s", f"{step.samples_per_second:.2f} clips per second")
        table.add_row("memory", f"{step.peak_memory_bytes / 2**30:.2f} GiB", "peak so far")
        return table
