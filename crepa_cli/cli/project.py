"""Settings that a command has found, written to the user's crepa.toml."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import typer

from crepa_cli.errors import UserError


def project_file(family: str | None) -> Path:
    """The crepa.toml that runs in this folder read.

    Args:
        family: that the settings are for; None for the one in the file.

    Raises:
        UserError: if there is none, or it is for another family.
    """
    from crepa_cli.profile.files import find_project_file, parse_toml, read_text

    path = find_project_file(Path())
    if path is None:
        raise UserError("--write: there is no crepa.toml here; create one with crepa init")
    path = Path(os.path.relpath(path))
    model = parse_toml(read_text(path, str(path)), str(path)).get("model")
    named = model.get("family", family) if isinstance(model, dict) else family
    if family is not None and named != family:
        raise UserError(f"--write: {path} is for the family {named!r}, and the command for {family}")
    return path


def write_settings(path: Path, family: str, values: Mapping[str, object]) -> None:
    """Change settings in a crepa.toml, say so on stderr, and keep everything else in it.

    Args:
        path: from `project_file`.
        family: that the settings are for.
        values: by "table.key".

    Raises:
        UserError: if the file would not be valid, or cannot be edited.
    """
    from crepa_cli.files import write_whole
    from crepa_cli.profile.describe import shown
    from crepa_cli.profile.edit import with_value
    from crepa_cli.profile.files import parse_toml, read_text
    from crepa_cli.profile.layers import Setting, check_settings, known_settings

    text = read_text(path, str(path))
    for name, value in values.items():
        table, key = name.split(".")
        text = with_value(text, str(path), table, key, value)
    mistakes: list[str] = []
    settings = [*known_settings(parse_toml(text, str(path)), str(path), mistakes)]
    check_settings([*settings, Setting("model", "family", family, "FAMILY")], mistakes)
    write_whole(path, text.encode())
    for name, value in values.items():
        typer.echo(f"Wrote {name} = {shown(value)} to {path}.", err=True)
