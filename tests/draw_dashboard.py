"""Run the demo and draw its dashboard: `python tests/draw_dashboard.py docs/dashboard.svg`."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from crepa_cli import api
from crepa_cli.demo import write_demo
from crepa_cli.report.dashboard import Dashboard
from crepa_cli.training.build import coefficient_schedule


def draw(path: Path, width: int = 100, height: int = 36) -> None:
    """Write the dashboard after a demo run of Wan as an SVG."""
    profile = api.resolve("t2v", {"model.family": "wan"}, demo=True).profile
    write_demo(profile)
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor", no_color=False
    )
    dashboard = Dashboard(console, coefficient_schedule(profile))
    # Without its context the view stays closed, so that only its last state is recorded.
    api.train(profile, listeners=[dashboard])
    console.print(dashboard, height=height)
    for line in dashboard.summary.lines():
        console.print(line, markup=False, highlight=False)
    console.save_svg(str(path), title="crepa train --profile t2v --model wan --demo")


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        draw(target)
