"""The live dashboard of a training run in a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich import progress as bars
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from crepa_cli.alignment import CoefficientSchedule
from crepa_cli.events import Event, Progress, RunOpened, TrainingStarted
from crepa_cli.report.panels import (
    BORDER,
    MARGIN,
    coefficient_lines,
    held_out_line,
    losses_lines,
    message_lines,
    progress_lines,
    sampled_lines,
    similarity_lines,
    titled,
)
from crepa_cli.report.plain import StageClock, amount, duration, item_text
from crepa_cli.report.state import RunState
from crepa_cli.report.summary import Summary, held_out_before, steps_before, validations_before

HEIGHT = 24
LOSSES = "losses: total = diffusion + lambda x alignment, which falls below 0"
PROGRESS_HEIGHT = 5
CHART_HEIGHT = 7


class Dashboard:
    """A listener that shows a live view of the run on the screen; use it as a context manager.

    It fills the whole window while it is open, so that resizing leaves no remains, and prints its last view and a
    summary when it closes.

    Args:
        console: a terminal.
        schedule: the planned coefficient (lambda); None for a run without alignment.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        console: Console,
        schedule: CoefficientSchedule | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memory = 0
        self.entered = self.opened = False
        self.state = RunState(schedule, clock)
        self.summary = Summary()
        self.progress = bars.Progress(
            bars.TextColumn("{task.description:<10}"),
            bars.BarColumn(bar_width=None),
            bars.TextColumn("{task.fields[amount]}"),
            bars.TextColumn("ETA"),
            bars.TimeRemainingColumn(),
            console=console,
            get_time=clock,
            expand=True,
        )
        self.stages: dict[str, bars.TaskID] = {}
        self.stage = StageClock(clock)
        self.live = Live(
            self, console=console, screen=True, refresh_per_second=1, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> Dashboard:
        """Open the view at the first event, so that mistakes found earlier leave the screen untouched."""
        self.entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last view and the summary on the screen."""
        if not self.opened:
            return
        self.live.stop()
        console = self.live.console
        console.print(self, height=HEIGHT)
        for line in self.summary.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, event: Event) -> None:
        """Update the view with an event."""
        if isinstance(event, RunOpened):
            if self.entered:
                self.live.start()
            self.memory, self.opened = event.device_memory, True
        if isinstance(event, Progress):
            self._advance(event)
        if isinstance(event, TrainingStarted):
            for step in steps_before(event):
                self.state(step)
            self.state.sampled += validations_before(event)
            self.state.held_out += held_out_before(event)
        self.state(event)
        self.summary(event)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the current view."""
        width, height = options.max_width, options.height or options.size.height
        if self.state.started is not None:
            yield self._training(self.state.started, console, width, height)
            return
        if self.stages:
            work = Text(self._item(), no_wrap=True, overflow="ellipsis")
            yield Panel(Group(self.progress, work), title="preparation", title_align="left", border_style="dim")
        rest = height - (len(self.stages) + 1 + BORDER if self.stages else 0)
        if self.state.messages:
            yield self._messages(console, width, rest)

    def _item(self) -> str:
        """The current item of the preparation, and the time since it began."""
        latest = self.stage.latest
        if latest is None or not latest.item:
            return ""
        return f"{item_text(latest.item)}, {self.stage.speed or f'{duration(self.stage.item_seconds)} so far'}"

    def _training(self, started: TrainingStarted, console: Console, width: int, height: int) -> Layout:
        """The panels during training; of a window's lines beyond 24, charts take a part and messages the rest."""
        state, extra = self.state, max(0, height - HEIGHT)
        rows, chart = 1 + extra // 8, CHART_HEIGHT + extra // 4
        held_out = [held_out_line(state.held_out)] if state.held_out else []
        losses = BORDER + len(state.losses) * rows + len(held_out)
        inner, left = width - MARGIN, width // 2
        progress = progress_lines(started, state.latest, state.seconds_left, self.memory, inner)
        sampled = sampled_lines(state, inner)
        coefficient = coefficient_lines(state, console, left - MARGIN, chart - BORDER)
        similarity = similarity_lines(state, width - left - MARGIN, chart - BORDER)
        messages = self._messages(console, width, height - PROGRESS_HEIGHT - len(sampled) - losses - chart)
        charts = Layout(size=chart)
        charts.split_row(
            Layout(titled("lambda (coefficient)", coefficient), size=left), Layout(titled("similarity", similarity))
        )
        layout = Layout()
        layout.split_column(
            Layout(titled("training", progress + sampled), size=PROGRESS_HEIGHT + len(sampled)),
            Layout(titled(LOSSES, [*losses_lines(state, inner, rows), *held_out]), size=losses),
            charts,
            Layout(messages),
        )
        return layout

    def _messages(self, console: Console, width: int, height: int) -> RenderableType:
        return titled("events", message_lines(list(self.state.messages), console, width - MARGIN, height - BORDER))

    def _advance(self, event: Progress) -> None:
        if event.stage not in self.stages:
            self.stages[event.stage] = self.progress.add_task(event.stage, total=event.total, amount="")
        self.progress.update(self.stages[event.stage], completed=event.done, total=event.total, amount=amount(event))
        self.stage(event)
