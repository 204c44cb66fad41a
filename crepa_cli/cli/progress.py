"""The progress of a command that prints its result on standard output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from crepa_cli.cli.terminal import interactive

if TYPE_CHECKING:
    from rich.progress import TaskID

    from crepa_cli.events import Event


@contextmanager
def stage_progress() -> Iterator[Callable[[Event], None]]:
    """A listener that shows progress and skipped clips on stderr, because scripts read stdout.

    In a terminal each stage has a bar; elsewhere plain lines appear.
    """
    from rich.console import Console
    from rich.progress import Progress as ProgressBars
    from rich.progress import TimeElapsedColumn
    from rich.text import Text

    from crepa_cli.events import ClipSkipped, Notice, Progress
    from crepa_cli.report.plain import PlainLines, item_text

    stages: dict[str, TaskID] = {}
    console = Console(stderr=True)
    if not interactive(console):
        with PlainLines(console, every=1) as lines:
            yield lines
        return
    with ProgressBars(
        *ProgressBars.get_default_columns(), TimeElapsedColumn(), console=console, transient=True
    ) as bars:

        def listen(event: Event) -> None:
            if isinstance(event, ClipSkipped):
                console.print(f"skipped {event.name}: {event.reason}", markup=False)
            elif isinstance(event, Notice):
                console.print(event.message, markup=False)
            elif isinstance(event, Progress):
                if event.stage not in stages:
                    stages[event.stage] = bars.add_task(event.stage, total=event.total)
                what = Text(f"{event.stage} {item_text(event.item)}").markup
                bars.update(stages[event.stage], completed=event.done, description=what)

        yield listen
