"""Run the demo and draw its dashboard: `python tests/draw_dashboard.py .github/dashboard.svg`."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

import psutil
from rich.console import Console

from crepa_cli.models import load_family
from crepa_cli.profile import resolve_profile
from crepa_cli.report.card import loading_lines
from crepa_cli.report.dashboard import HEIGHT, Dashboard
from crepa_cli.runs.checks import open_family
from crepa_cli.runs.folder import RunFolder
from crepa_cli.training import run
from crepa_cli.training.build import coefficient_schedule
from crepa_cli.training.demo import demo_settings, write_demo


def draw(path: Path, width: int = 100) -> None:
    """Write the dashboard as it stands after a demo of Wan, as an SVG."""
    resolved = resolve_profile(
        profile="t2v",
        flags={"model.family": "wan"},
        sets=(),
        folder=Path(),
        family_defaults=lambda family, task: load_family(family).defaults(task),
        demo=demo_settings,
    )
    profile = resolved.profile
    write_demo(profile)
    output = RunFolder.new(profile).path
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    family, accelerator = open_family(profile), run.make_accelerator(profile, output)
    dashboard = Dashboard(
        console,
        coefficient_schedule(profile),
        memory=psutil.virtual_memory().total,
        loading=loading_lines(family, profile, output / "weights"),
    )
    for event in run.train(
        profile, family, output, accelerator, resume=False, cache_only=False, should_stop=lambda: False
    ):
        dashboard(event)
    console.print(dashboard, height=HEIGHT)
    for line in dashboard.summary.lines():
        console.print(line, markup=False, highlight=False)
    console.save_svg(str(path), title="crepa train --profile t2v --model wan --demo")


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        draw(target)
