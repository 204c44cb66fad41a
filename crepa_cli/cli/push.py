"""`crepa push`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from crepa_cli.cli.flags import RunArgument

if TYPE_CHECKING:
    from crepa_cli.runs.folder import RunFolder

STDERR = 2


def push(
    run: RunArgument,
    name: Annotated[
        str | None,
        typer.Argument(help="Repository: owner/name, or a name of your own; by default that of the run's folder."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Push a run to the Hub: weights, model card, samples, curves, metrics and settings.

    The model card is README.md in the run's folder; edit it first if you like.
    Pushing again adds a commit. After Ctrl-C or an error, the same command starts again.
    """
    from crepa_cli.libraries import silence_libraries
    from crepa_cli.runs.folder import RunFolder

    silence_libraries()
    folder = RunFolder.existing(run)
    push_run(folder, name or folder.name, private=private, say=typer.echo)


def push_run(run: RunFolder, name: str, *, private: bool, say: Callable[[str], None]) -> None:
    """Push a run, and say what is pushed where; a signal ends the process at once.

    Raises:
        UserError: if the run cannot be pushed under this name.
        RunError: if the upload failed.
    """
    from huggingface_hub.utils import enable_progress_bars
    from rich.console import Console

    from crepa_cli.cli.terminal import interactive
    from crepa_cli.publish import push
    from crepa_cli.signals import handled

    def stop(number: int, _frame: object) -> NoReturn:
        # The threads of the upload would keep the process until their files have arrived.
        os.write(STDERR, f"\nStopped; nothing was changed on the Hub. To push: crepa push {run.path} {name}\n".encode())
        os._exit(128 + number)

    if interactive(Console(stderr=True)):
        enable_progress_bars()
    with handled(stop):
        say(f"pushed to {push(run, name, private=private, report=say)}")
