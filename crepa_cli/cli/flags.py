"""Flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crepa_cli.cli.completion import family_names, preset_names, profile_names, settings, task_names
from crepa_cli.errors import UserError

FAMILY_HELP = f"Model family: {', '.join(family_names())}."
PROFILE_HELP = f"Preset ({', '.join(preset_names())}), recipe (such as {family_names()[0]}-24gb), or a TOML file."
ProfileFlag = Annotated[str | None, typer.Option("--profile", help=PROFILE_HELP, autocompletion=profile_names)]
ModelFlag = Annotated[str | None, typer.Option("--model", help=FAMILY_HELP, autocompletion=family_names)]
CheckpointFlag = Annotated[str | None, typer.Option("--checkpoint", help="Hub id or local folder of the base model.")]
TaskFlag = Annotated[
    str | None,
    typer.Option("--task", help="t2v (text to video) or i2v (image to video).", autocompletion=task_names),
]
DataFlag = Annotated[list[str] | None, typer.Option("--data", metavar="FOLDER", help="Folder of clips with captions.")]
SetFlag = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, as table.key=value; repeatable.", autocompletion=settings),
]
RunArgument = Annotated[Path, typer.Argument(help="Folder of the run, such as runs/wan-t2v-1.", show_default=False)]


def one_folder(data: list[str] | None) -> str | None:
    """The folder of clips.

    Raises:
        UserError: if `--data` was given more than once.
    """
    if data and len(data) > 1:
        raise UserError(
            f"--data is given {len(data)} times ({', '.join(data)}), and a run has one folder of clips: put them "
            "together in one; its subfolders are read too"
        )
    return data[0] if data else None
