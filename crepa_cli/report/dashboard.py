"""The live dashboard of a training run in a terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from rich import progress as bars
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from crepa_cli.alignment import CoefficientSchedule
from crepa_cli.events import Event, Progress, RunOpened, TrainingStarted
from crepa_cli.report.chart import fitting, signs_for
from crepa_cli.report.gpu import GpuUse
from crepa_cli.report.keyboard import Keyboard
from crepa_cli.report.keys import Action, Keys
from crepa_cli.report.panels import (
    BORDER,
    MARGIN,
    TITLE_MARGIN,
    View,
    coefficient_lines,
    header,
    held_out_lines,
    legend_lines,
    losses_lines,
    message_lines,
    now_lines,
    progress_lines,
    sampled_lines,
    similarity_lines,
    similarity_title,
    titled,
)
from crepa_cli.report.plain import StageClock, amount, duration, item_text
from crepa_cli.report.state import RunState
from crepa_cli.report.strip import LEAST_LINES, Strips, shows_pixels
from crepa_cli.report.summary import Summary, held_out_before, steps_before, validations_before
from crepa_cli.requests import Requests
from crepa_cli.signals import Stopped

STOPPED_EARLY = "Stopped in the preparation: what it made is kept, and the next start goes on from there"
HEIGHT = 24
LOSSES = "losses: total = diffusion + lambda x alignment, which falls below 0"
FACTS = 4
"""Lines of facts below the bar of the steps."""
MESSAGES = 2
"""Lines of messages in a window of 24 lines."""
STRIPS = 2 * LEAST_LINES + BORDER
"""The fewest lines of the panel with frames of videos, for which a window needs so many lines beyond 24."""
HINT = "? keys"
ENTER, LEAVE = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"
"""The sequences that Rich writes to open and to close the view."""


class Screen(Live):
    """A view that fills the window, and is not drawn while it is `hidden`."""

    hidden = False

    def refresh(self) -> None:
        """Draw the view."""
        if not self.hidden:
            super().refresh()


class Dashboard:
    """A listener that shows a live view of the run on the screen; use it as a context manager.

    It fills the whole window while it is open, so that resizing leaves no remains, and prints its last view and a
    summary when it closes.

    Args:
        console: a terminal.
        schedule: the planned coefficient (lambda); None for a run without alignment.
        clock: returns the time in seconds.
        others: states of further runs, whose curves are drawn beside those of this one.
        actions: what keys of the terminal do beside changing the view; None if no keys are read.
        requests: shown until they are served.
    """

    def __init__(
        self,
        console: Console,
        schedule: CoefficientSchedule | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        others: Sequence[RunState] = (),
        actions: Mapping[str, Action] | None = None,
        requests: Requests | None = None,
    ) -> None:
        self.others = list(others)
        self.entered = self.opened = False
        self.keys = Keys(actions or {}, clock)
        self.keyboard = None if actions is None else Keyboard(self.press, self.show)
        self.requests = requests or Requests()
        self.gpu = GpuUse(clock)
        self.state = RunState(schedule, clock)
        self.summary = Summary()
        self.strips = Strips()
        self.progress = bars.Progress(
            bars.TextColumn("{task.description:<10}"),
            # Its own colors do not follow the terminal's scheme.
            bars.BarColumn(bar_width=None, style="dim", complete_style="green", finished_style="green"),
            bars.TextColumn("{task.fields[amount]}"),
            bars.TextColumn("ETA"),
            bars.TimeRemainingColumn(),
            console=console,
            get_time=clock,
            expand=True,
        )
        self.stages: dict[str, bars.TaskID] = {}
        self.stage = StageClock(clock)
        self.live = Screen(
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
        try:
            if self.keyboard is not None:
                self.keyboard.__exit__(kind, error, trace)
        finally:
            self.live.stop()
        self.state.stopping = False
        self.keys, self.requests = Keys({}, self.keys.clock), Requests()
        console = self.live.console
        console.print(self, height=HEIGHT)
        for line in self.summary.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, Stopped) and self.state.started is None:
            console.print(STOPPED_EARLY, soft_wrap=True)

    def stop(self) -> None:
        """Show from the next drawing on that a signal has asked for a stop; it may be called from a signal handler."""
        self.state.stopping = True

    def press(self, key: str) -> None:
        """Do what a key stands for, and show it at once."""
        self.keys(key)
        self.live.refresh()

    def show(self, visible: bool) -> None:
        """Give the screen to a shell, or take it back; it may be called from a signal handler."""
        if visible == self.live.hidden:
            self.live.hidden = not visible
            # Rich would wait for a lock.
            os.write(self.live.console.file.fileno(), ENTER if visible else LEAVE)

    def __call__(self, event: Event) -> None:
        """Update the view with an event."""
        if isinstance(event, RunOpened):
            if self.opened:
                # A run that is watched was resumed.
                self.summary = Summary()
            elif self.entered:
                self.live.start()
                if self.keyboard is not None:
                    self.keyboard.__enter__()
            self.opened = True
        if isinstance(event, Progress):
            self._advance(event)
        self.state = advanced(self.state, event)
        self.summary(event)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the current view."""
        width, height = options.max_width, options.height or options.size.height
        # The stream may have fewer characters than the console, which knows only of Unicode or not.
        view = View(signs_for(console.encoding), self.keys.zoom)
        if self.state.started is not None:
            # A layout inside of other output would take the height of the window.
            layout = self._training(self.state.started, view, console, width, height)
            yield from console.render(layout, options.update_height(height))
            return
        rest = height
        if self.stages:
            work = [Text(self._item(), no_wrap=True, overflow="crop"), *self._now(width - MARGIN)]
            title = Text(header([self.state], "preparation", width - TITLE_MARGIN))
            yield Panel(Group(self.progress, *work), title=title, title_align="left", border_style="dim")
            rest -= len(self.stages) + len(work) + BORDER
        if rest > BORDER and self.keys.help:
            yield self._help()
        elif rest > BORDER and self.state.messages:
            yield self._events(message_lines(self.state.messages, console, width - MARGIN, rest - BORDER))

    def _item(self) -> str:
        """The current item of the preparation, and the time since it began."""
        latest = self.stage.latest
        if latest is None or not latest.item:
            return ""
        return f"{item_text(latest.item)}, {self.stage.speed or f'{duration(self.stage.item_seconds)} so far'}"

    def _now(self, width: int) -> list[Text]:
        return now_lines(self.state, self.keys.question, self.requests.waiting, width)

    def _training(self, started: TrainingStarted, view: View, console: Console, width: int, height: int) -> Layout:
        """The panels during training; of a window's lines beyond 24, messages take a quarter and charts the rest."""
        state, runs = self.state, [self.state, *self.others]
        state.gpu = self.gpu()
        strips = self._strips(view, console, width, height)
        height -= strips[0].size or 0 if strips else 0
        inner, left, extra = width - MARGIN, width // 2, max(0, height - HEIGHT)
        progress = [
            *progress_lines(state, started, view, self._now(inner), inner, FACTS),
            *sampled_lines(state, inner),
            *legend_lines(runs),
        ]
        below = held_out_lines(state, inner)
        free = height - len(progress) - BORDER
        messages = message_lines(state.messages, console, inner, min(MESSAGES + extra // 4, max(1, free - 4 * BORDER)))
        free -= len(messages) + BORDER
        losses = max(BORDER + 1, free // 2)
        charts = max(BORDER + 1, free - losses)
        lines = losses_lines(runs, view, inner, losses - BORDER - len(below))
        coefficient = coefficient_lines(runs, view, console, left - MARGIN, charts - BORDER)
        similarity = similarity_lines(runs, view, width - left - MARGIN, charts - BORDER)
        title = header(runs, "training", width - TITLE_MARGIN)
        top = Layout(titled(title, progress), size=len(progress) + BORDER)
        layout = Layout()
        if self.keys.help:
            layout.split_column(top, Layout(self._help()))
            return layout
        row = Layout(size=charts)
        row.split_row(
            Layout(titled("lambda (coefficient)", coefficient), size=left),
            Layout(titled(similarity_title(state, width - left - TITLE_MARGIN), similarity)),
        )
        layout.split_column(
            top,
            Layout(titled(fitting(width - TITLE_MARGIN, LOSSES, "losses"), [*lines, *below]), size=losses),
            row,
            *strips,
            Layout(self._events(messages)),
        )
        return layout

    def _strips(self, view: View, console: Console, width: int, height: int) -> list[Layout]:
        """The panel with frames of videos, in a window that has room for it, if its terminal can show them."""
        extra = height - HEIGHT
        if self.state.opened is None or extra < STRIPS or not shows_pixels(console, view.signs):
            return []
        room = STRIPS + (extra - STRIPS) // 2
        panel = self.strips.panel(self.state.opened.output, self.state.sampled, width, room)
        return [] if panel is None else [Layout(panel, size=panel.height)]

    def _events(self, lines: Sequence[Text]) -> Panel:
        reads = self.keyboard is not None and self.keyboard.reading
        return titled("events", lines, hint=HINT if reads else "")

    def _help(self) -> Panel:
        return titled("keys", [Text(line) for line in self.keys.lines()])

    def _advance(self, event: Progress) -> None:
        if event.stage not in self.stages:
            self.stages[event.stage] = self.progress.add_task(event.stage, total=event.total, amount="")
        self.progress.update(self.stages[event.stage], completed=event.done, total=event.total, amount=amount(event))
        self.stage(event)


def advanced(state: RunState, event: Event) -> RunState:
    """The state of a run after an event: a new one if the run is opened again, with its earlier steps if it goes on."""
    if isinstance(event, RunOpened) and state.opened is not None:
        state = RunState(state.schedule, state.clock)
    if isinstance(event, TrainingStarted):
        for step in steps_before(event):
            state(step)
        state.sampled += validations_before(event)
        state.held_out += held_out_before(event)
    state(event)
    return state
