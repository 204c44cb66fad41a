"""The command line. No heavy library is imported before a command runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from crepa_cli import __version__
from crepa_cli.cli.completion import family_names, preset_names
from crepa_cli.cli.doctor import doctor
from crepa_cli.cli.encoding import print_any_text
from crepa_cli.cli.eval import evaluate
from crepa_cli.cli.export import export
from crepa_cli.cli.init import init
from crepa_cli.cli.probe import probe_blocks
from crepa_cli.cli.push import push
from crepa_cli.cli.terminal import in_notebook, write_plain_text
from crepa_cli.cli.train import train
from crepa_cli.cli.watch import watch
from crepa_cli.errors import RunError, UserError

app = typer.Typer(
    name="crepa",
    help="Fine-tune video diffusion transformers with Cross-frame Representation Alignment.",
    epilog=f"Model families: {', '.join(family_names())}. Presets: {', '.join(preset_names())}.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(init)
app.command()(train)
app.command()(probe_blocks)
app.command()(doctor)
app.command(name="eval")(evaluate)
app.command()(watch)
app.command()(export)
app.command()(push)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crepa {__version__}")
        raise typer.Exit


@app.callback()
def _crepa(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; a user's mistake exits with code 2, a failure of the run with 1."""
    print_any_text()
    _let_segments_grow()
    if in_notebook():
        write_plain_text()
    try:
        app()
    except UserError as error:
        _fail(error, code=2)
    except RunError as error:
        _fail(error, code=1)


def _let_segments_grow() -> None:
    """Let CUDA's allocator extend its segments, unless the user configured it: clips of several shapes fragment them.

    Torch reads the variable once, when it is imported. On Windows it has no such segments and would warn.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _fail(error: Exception, code: int) -> NoReturn:
    console = Console(stderr=True, highlight=False)
    rank = os.environ.get("RANK", "0")
    console.print("[bold red]error:[/]" if rank == "0" else f"[bold red]error in process {rank}:[/]", end=" ")
    console.print("\n".join([str(error), *getattr(error, "__notes__", ())]), markup=False, soft_wrap=True)
    sys.exit(code)
