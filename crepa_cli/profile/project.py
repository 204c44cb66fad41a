"""The files of a new project: crepa.toml and its JSON schema."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from crepa_cli.errors import UserError
from crepa_cli.files import write_whole
from crepa_cli.profile.describe import description, examples, json_schema
from crepa_cli.profile.files import PROJECT_FILE, find_profile, parse_toml, read_text
from crepa_cli.profile.layers import (
    FAMILY,
    NO_FAMILY,
    Key,
    Setting,
    check_settings,
    flag_settings,
    known_settings,
    nested,
)
from crepa_cli.profile.settings import Profile

SCHEMA_FILE = "crepa.schema.json"
HEADER = f"""\
#:schema ./{SCHEMA_FILE}

# Settings that differ from the defaults. `crepa train --print-profile` shows all settings and their sources.
"""
MEMORY_SETTINGS: tuple[tuple[float, dict[str, dict[str, object]]], ...] = (
    (24, {}),
    (12, {"data": {"frames": 49}}),
    (0, {"data": {"frames": 33}, "crepa": {"encoder": "dinov2_vits14", "encoder_image_size": 224}}),
)
"""Smallest GPU memory in GB, and the settings for it that differ from the defaults; the first that fits is used."""


def memory_settings(gigabytes: float) -> Mapping[str, Mapping[str, object]]:
    """A first guess at settings that fit a GPU; `crepa doctor` checks them.

    | GPU memory      | settings                                           |
    | --------------- | -------------------------------------------------- |
    | 24 GB and more  | the defaults, which checkpoint activations         |
    | 12 to 24 GB     | 49 frames                                          |
    | below 12 GB     | 33 frames, dinov2_vits14 at 224 pixels as teacher  |
    """
    return next((settings for limit, settings in MEMORY_SETTINGS if gigabytes >= limit), MEMORY_SETTINGS[-1][1])


def project_settings(
    *,
    profile: str | None,
    vram: float | None,
    imported: Sequence[Setting],
    flags: Mapping[str, object],
    folder: Path,
    families: Collection[str],
) -> dict[str, dict[str, Any]]:
    """The settings of a new crepa.toml by table and key: those that differ from the built-in defaults.

    The layers are a preset or TOML file, settings for the GPU's memory, imported settings and flags.

    Raises:
        UserError: lists all mistakes.
    """
    mistakes: list[str] = []
    settings: list[Setting] = []
    if profile is not None:
        path, label = find_profile(profile, folder)
        settings += known_settings(parse_toml(read_text(path, label), label), label, mistakes)
    if vram is not None:
        settings += known_settings(memory_settings(vram), "--vram", mistakes)
    settings += [*imported, *flag_settings(flags, mistakes)]
    named = [one for one in settings if one.name == FAMILY]
    if not named:
        mistakes.append(NO_FAMILY)
    elif named[-1].value not in families:
        mistakes.append(f"{named[-1]}: must be one of {', '.join(families)}, which support CREPA")
    return _without_defaults(check_settings(settings, mistakes))


def _without_defaults(settings: Mapping[Key, Setting]) -> dict[str, dict[str, Any]]:
    """The values of checked settings, without those that are built-in defaults."""
    values = {name: one.value for name, one in settings.items()}
    profile = Profile.model_validate(nested({**examples(), **values}))
    return {
        table: kept
        for table, keys in profile.model_dump(exclude_defaults=True).items()
        if (kept := {key: value for key, value in keys.items() if (table, key) in values})
    }


def commented_toml(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The settings of `project_settings` as TOML, each below its description."""
    parts = [HEADER]
    for table, values in settings.items():
        parts.append(f"\n[{table}]\n")
        for key, value in values.items():
            comment = textwrap.fill(
                description(table, key), width=100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
            )
            parts.append(f"{comment}\n{tomli_w.dumps({key: value})}")
    return "".join(parts)


def refuse_to_overwrite(folder: Path) -> None:
    """Check that `write_project` would replace no file of the user's.

    Raises:
        UserError: if there is a crepa.toml or another schema.
    """
    schema = folder / SCHEMA_FILE
    # git on Windows may have given it CRLF.
    changed = schema.exists() and read_text(schema, SCHEMA_FILE).replace("\r\n", "\n") != _schema_text()
    existing = [PROJECT_FILE] * (folder / PROJECT_FILE).exists() + [SCHEMA_FILE] * changed
    if existing:
        raise UserError(f"{' and '.join(existing)}: already exists; use --force to overwrite it")


def write_project(settings: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write crepa.toml and its schema, replacing existing files.

    Raises:
        UserError: if a file cannot be written.
    """
    write_whole(folder / SCHEMA_FILE, _schema_text().encode())
    write_whole(folder / PROJECT_FILE, commented_toml(settings).encode())


def _schema_text() -> str:
    return json.dumps(json_schema(), indent=2) + "\n"
