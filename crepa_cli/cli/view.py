"""The display of `crepa train`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from rich.console import Console

    from crepa_cli.events import Event
    from crepa_cli.models.family import Family
    from crepa_cli.profile import Profile
    from crepa_cli.report.dashboard import Dashboard

Listener = Callable[["Event"], None]


@contextmanager
def open_view(
    profile: Profile,
    family: Family,
    output: Path,
    accelerator: Accelerator,
    console: Console,
    *,
    plain: bool,
    quiet: bool,
    log_level: str,
) -> Iterator[list[Listener]]:
    """Open the dashboard in a terminal, plain lines elsewhere, and only errors if `quiet`; yields the listeners.

    With several processes, only the main one has a display; the others are quiet.

    Log records of libraries at `log_level` or above are shown in the same place.
    """
    from rich.console import Console

    from crepa_cli.report.plain import PlainLines
    from crepa_cli.report.records import prints_as_notices, records_as_notices

    level = logging.getLevelNamesMapping()[log_level.upper()]
    with ExitStack() as stack:
        if quiet or not accelerator.is_main_process:
            errors = PlainLines(Console(stderr=True), profile.report.every)
            stack.enter_context(records_as_notices(errors, logging.ERROR))
            yield []
        elif plain or not console.is_interactive or os.environ.get("CI"):
            lines = PlainLines(console, profile.report.every)
            stack.enter_context(records_as_notices(lines, level))
            yield [lines]
        else:
            dashboard = stack.enter_context(_dashboard(profile, family, output, accelerator.device, console))
            stack.enter_context(prints_as_notices(dashboard))
            stack.enter_context(records_as_notices(dashboard, level))
            yield [dashboard]


def _dashboard(profile: Profile, family: Family, output: Path, device: torch.device, console: Console) -> Dashboard:
    from crepa_cli.report.card import loading_lines
    from crepa_cli.report.dashboard import Dashboard
    from crepa_cli.training.build import coefficient_schedule

    return Dashboard(
        console,
        coefficient_schedule(profile) if profile.crepa.enabled else None,
        memory=_memory(device),
        loading=loading_lines(family, profile, output / "weights"),
    )


def _memory(device: torch.device) -> int:
    """The total memory of a device in bytes."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return int(psutil.virtual_memory().total)
