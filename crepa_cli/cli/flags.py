"""Flags that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from crepa_cli.cli.completion import family_names, preset_names, settings, task_names

ProfileFlag = Annotated[
    str | None, typer.Option("--profile", help="Name of a preset, or a TOML file.", autocompletion=preset_names)
]
ModelFlag = Annotated[
    str | None, typer.Option("--model", help="Model family, such as wan.", autocompletion=family_names)
]
CheckpointFlag = Annotated[str | None, typer.Option("--checkpoint", help="Hub id or local folder of the base model.")]
TaskFlag = Annotated[
    str | None,
    typer.Option("--task", help="t2v (text to video) or i2v (image to video).", autocompletion=task_names),
]
DataFlag = Annotated[str | None, typer.Option("--data", help="Folder of clips with captions.")]
SetFlag = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, as table.key=value; repeatable.", autocompletion=settings),
]
