"""The evaluation in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crepa_cli.evaluate.result import Column, Evaluation
from crepa_cli.measures import FACTS

COLORS = {"better": "green", "worse": "red"}


def show(evaluation: Evaluation, console: Console) -> None:
    """Print the measures of all columns, the differences from the base, and what to beware of."""
    console.print(_means(evaluation))
    for column in evaluation.others:
        console.print()
        console.print(_differences(evaluation, column))
    reference = [evaluation.reference] if evaluation.reference else []
    for column in (*evaluation.columns, *reference):
        for flag in evaluation.flags(column):
            console.print(Text(f"{column.name}: {flag}", style="bold red"))
    for note in evaluation.notes:
        console.print(Text(note, style="dim"))


def _means(evaluation: Evaluation) -> Table:
    columns = [*evaluation.columns, *([evaluation.reference] if evaluation.reference else [])]
    prompts = len({row.prompt for row in evaluation.rows})
    title = f"{len(evaluation.rows)} videos each, {prompts} prompts: means"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("measure", no_wrap=True)
    for column in columns:
        table.add_column(Text(column.name), justify="right", overflow="fold")
    for name in evaluation.measures:
        values = [column.means.get(name) for column in columns]
        table.add_row(FACTS[name].label, *("-" if value is None else f"{value:.4f}" for value in values))
    return table


def _differences(evaluation: Evaluation, column: Column) -> Table:
    title = f"{column.name} minus {evaluation.base.name}, with 95 % intervals over prompts"
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("measure", no_wrap=True)
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("interval", no_wrap=True)
    table.add_column("")
    for name, one in evaluation.differences[column.name].items():
        judged = evaluation.judgement(column, name)
        verdict = Text(f"{one.verdict}{f', {judged}' if judged else ''}", style=COLORS.get(judged, ""))
        table.add_row(FACTS[name].label, f"{one.mean:+.4f}", f"{one.low:+.4f} to {one.high:+.4f}", verdict)
    return table
