"""`crepa watch`."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crepa_cli.cli.terminal import interactive

if TYPE_CHECKING:
    from rich.console import Console

    from crepa_cli.report.dashboard import Dashboard
    from crepa_cli.report.watch import WatchedRun
    from crepa_cli.runs.folder import RunFolder

POLL_SECONDS = 1.0


def watch(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs; by default the run in runs/ that was written to last.")
    ] = None,
) -> None:
    """Show the dashboard of a run that is going on, or over; several runs in one chart."""
    from rich.console import Console

    from crepa_cli.report.watch import WatchedRun
    from crepa_cli.settings import resolve

    folders = _folders(runs or [])
    watched = [WatchedRun(folder, resolve(str(folder.profile)).profile) for folder in folders]
    _show(watched, Console())


def _folders(runs: list[Path]) -> list[RunFolder]:
    """The folders of the runs.

    Raises:
        UserError: if there is no run.
    """
    from crepa_cli.errors import UserError
    from crepa_cli.runs.folder import RUNS, RunFolder

    if not runs and not list(RUNS.glob("*/profile.toml")):
        raise UserError("nothing to watch: there is no run in runs/; name its folder: crepa watch RUN")
    return [RunFolder.existing(run) for run in runs] or [RunFolder.to_resume(None)]


class _Clock:
    """The time of the event that is replayed, and the present in between."""

    def __init__(self) -> None:
        self.moment: float | None = None

    def __call__(self) -> float:
        return time.time() if self.moment is None else self.moment


def _show(watched: list[WatchedRun], console: Console) -> None:
    """Show the runs until all of them have ended, or Ctrl-C; elsewhere than in a terminal, as they are now."""
    from crepa_cli.report.dashboard import Dashboard
    from crepa_cli.report.keys import Action
    from crepa_cli.report.state import RunState
    from crepa_cli.training.build import coefficient_schedule

    clock = _Clock()
    plans = [coefficient_schedule(one.profile) if one.profile.crepa.enabled else None for one in watched]
    others = [RunState(plan, clock) for plan in plans[1:]]
    live, left = interactive(console), threading.Event()
    actions = {"q": Action("leave; the run goes on", left.set, asks=False)} if live else None
    dashboard = Dashboard(console, plans[0], clock=clock, others=others, actions=actions)
    with suppress(KeyboardInterrupt), dashboard:
        while True:
            _update(watched, dashboard, clock)
            if not live or all(one.ended for one in watched):
                break
            clock.moment = None
            if left.wait(POLL_SECONDS):
                break


def _update(watched: list[WatchedRun], dashboard: Dashboard, clock: _Clock) -> None:
    from crepa_cli.report.dashboard import advanced

    for index, one in enumerate(watched[1:]):
        for clock.moment, event in one.poll():
            dashboard.others[index] = advanced(dashboard.others[index], event)
    for clock.moment, event in watched[0].poll():
        dashboard(event)
