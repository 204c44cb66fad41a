"""The display of `crepa train`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

from crepa_cli.cli.terminal import interactive

if TYPE_CHECKING:
    from rich.console import Console

    from crepa_cli.events import Event
    from crepa_cli.profile import Profile, ResolvedProfile
    from crepa_cli.requests import Requests

Listener = Callable[["Event"], None]
View = AbstractContextManager[list[Listener]]
LogLevel = Literal["debug", "info", "warning", "error"]
VALUE_WIDTH = 24
"""Room for a value in the list of settings; longer ones are not cut."""


@contextmanager
def open_view(
    profile: Profile, console: Console, requests: Requests, *, plain: bool, quiet: bool, log_level: LogLevel
) -> Iterator[list[Listener]]:
    """Open the dashboard in a terminal, plain lines elsewhere, and only problems if `quiet`; yields the listeners.

    Keys of the dashboard make `requests`. With several processes, only the first one has a display. Log messages of
    libraries at `log_level` or above are shown in the same place.
    """
    from rich.console import Console

    from crepa_cli.report.dashboard import Dashboard
    from crepa_cli.report.keys import Action
    from crepa_cli.report.plain import PlainLines
    from crepa_cli.report.records import prints_as_notices, records_as_notices
    from crepa_cli.report.summary import Summary
    from crepa_cli.signals import acknowledged, press_ctrl_c
    from crepa_cli.training.build import coefficient_schedule

    level = logging.getLevelNamesMapping()[log_level.upper()]
    with ExitStack() as stack:
        first = os.environ.get("RANK", "0") == "0"
        if quiet or not first:
            problems = PlainLines(Console(stderr=True), profile.report.every)
            stack.enter_context(records_as_notices(problems, logging.ERROR))
            yield [_problems_alone(problems)] if first else []
        elif plain or console.is_dumb_terminal or not interactive(console):
            summary = Summary()
            stack.callback(lambda: _print_lines(console, summary.lines()))
            lines = stack.enter_context(PlainLines(console, profile.report.every))
            stack.enter_context(acknowledged(lines.stop))
            stack.enter_context(records_as_notices(lines, level))
            yield [lines, summary]
        else:
            schedule = coefficient_schedule(profile) if profile.crepa.enabled else None
            actions = {
                "q": Action("save a checkpoint and stop, as Ctrl-C does", press_ctrl_c),
                "c": Action("save a checkpoint after this step", requests.checkpoint),
                "v": Action("validate after this step", requests.validation),
            }
            dashboard = stack.enter_context(Dashboard(console, schedule, actions=actions, requests=requests))
            stack.enter_context(acknowledged(dashboard.stop))
            stack.enter_context(prints_as_notices(dashboard))
            stack.enter_context(records_as_notices(dashboard, level))
            yield [dashboard]


def _problems_alone(listener: Listener) -> Listener:
    """Passes on what is a problem, but does not end the run."""
    from crepa_cli.events import ClipSkipped, Notice, StepSkipped

    def listen(event: Event) -> None:
        if isinstance(event, ClipSkipped | Notice | StepSkipped):
            listener(event)

    return listen


def _print_lines(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_settings(resolved: ResolvedProfile, console: Console) -> None:
    """Print every setting with its value and where that comes from."""
    rows = [(f"{section}.{key}", value, source) for section, key, value, source in resolved.rows()]
    width = max(len(name) for name, _, _ in rows)
    for name, value, source in [("setting", "value", "from"), *rows]:
        line = f"{name:<{width}}  {value:<{VALUE_WIDTH}}  {source}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
