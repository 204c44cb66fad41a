"""Shows the answer in a terminal: the facts, and a bar for each block."""

from __future__ import annotations

from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crepa_cli.errors import counted
from crepa_cli.probe.answer import Answer
from crepa_cli.probe.measure import HeldOut, Measurement

STYLE: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "caption_justify": "left"}


def show(answer: Answer, console: Console) -> None:
    """Print the answer as tables that fit 80 columns."""
    console.print(_facts(answer))
    if answer.measurement is None:
        console.print(
            Text("\nTo measure every block on your clips, add --data DIR; to try it out, add --demo.", style="dim")
        )
        return
    console.print()
    console.print(_blocks(answer, answer.measurement))


def _facts(answer: Answer) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "checkpoint": f"{answer.checkpoint} ({answer.family}, {answer.task})",
        "blocks": f"{answer.blocks} of width {answer.hidden_size:,}, {answer.parameters_per_block:,} parameters each",
        "crepa.block_index": f"0 to {answer.blocks - 1}",
        "default": f"block {answer.default.block}: {answer.default.reason}",
    }
    if answer.configured != answer.default.block:
        rows["in your settings"] = f"block {answer.configured}"
    if answer.recommended:
        rows["recommended"] = f"block {answer.recommended.block}: {answer.recommended.reason}"
    for name, value in rows.items():
        table.add_row(name, Text(value, style="green" if name == "recommended" else ""))
    return table


def _blocks(answer: Answer, measurement: Measurement) -> Table:
    """Means over noise levels, with a bar from 0 to 1 for the projector's cosine, or for CKNNA if there is none."""
    projector, cknna = measurement.projector, measurement.cknna.mean(1)
    cosines = projector.cosines.mean((0, 2)) if projector else None
    table = Table(
        title=_title(measurement), caption=_caption(projector), box=None, padding=(0, 1, 0, 0), expand=True, **STYLE
    )
    table.add_column("block", justify="right")
    table.add_column("CKNNA" if cosines is None else "projector", ratio=1, no_wrap=True)
    for heading in ("cosine", "CKNNA", "CKA", "drift"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for block in range(answer.blocks):
        length = float((cknna if cosines is None else cosines)[block])
        figures = [cknna[block], measurement.cka[block].mean(), measurement.drift[block].mean()]
        table.add_row(
            str(block),
            Bar(1.0, 0.0, max(0.0, length), color="cyan"),
            "-" if cosines is None else f"{cosines[block]:.3f}",
            *(f"{figure:.3f}" for figure in figures),
            _mark(answer, block),
            style="bold" if answer.recommended and block == answer.recommended.block else "",
        )
    return table


def _title(measurement: Measurement) -> str:
    levels = ", ".join(f"{sigma:g}" for sigma in measurement.sigmas)
    return f"{counted(measurement.clips, 'clip')}; means over the noise levels {levels}"


def _caption(projector: HeldOut | None) -> str:
    lines = [
        "CKNNA, CKA: similarity of hidden states and features, at most 1.",
        "drift: change of the states from frame to frame, relative to the features'.",
    ]
    if projector:
        lines = [
            "cosine: between a clip's features and a linear projector's prediction of them,",
            f"fitted on the other clips (predicting their mean: {projector.constant.mean():.3f}).",
            *lines,
        ]
    return "\n".join(lines)


def _mark(answer: Answer, block: int) -> str:
    marks = {"recommended": answer.recommended and answer.recommended.block, "default": answer.default.block}
    return " ".join(mark for mark, marked in marks.items() if marked == block)
