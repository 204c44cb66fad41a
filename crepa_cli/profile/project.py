"""The crepa.toml of a folder: the settings that start it, and the file with its schema."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import tomli_w

from crepa_cli.errors import UserError
from crepa_cli.files import write_whole
from crepa_cli.profile.describe import description, json_schema
from crepa_cli.profile.files import PROJECT_FILE, find_profile, parse_toml, read_text
from crepa_cli.profile.layers import FAMILY, NO_FAMILY, Setting, checked_profile, flag_settings, known_settings
from crepa_cli.profile.settings import Profile

SCHEMA_FILE = "crepa.schema.json"
HEADER = f"""\
#:schema ./{SCHEMA_FILE}

# What differs from the defaults. `crepa train --print-profile` shows all settings and where each comes from.
"""
MEMORY_SETTINGS: tuple[tuple[float, dict[str, dict[str, object]]], ...] = (
    (24, {}),
    (12, {"data": {"frames": 49}}),
    (0, {"data": {"frames": 33}, "crepa": {"encoder": "dinov2_vits14", "encoder_image_size": 224}}),
)
"""From this many GiB of GPU memory on, the settings that differ from the defaults."""


def memory_settings(gibibytes: float) -> Mapping[str, Mapping[str, object]]:
    """A first guess at settings that fit a GPU; `crepa doctor` then says what does.

    | GPU memory      | settings                                           |
    | --------------- | -------------------------------------------------- |
    | 24 GiB and more | the defaults, which checkpoint activations         |
    | 12 to 24 GiB    | 49 frames                                          |
    | below 12 GiB    | 33 frames, dinov2_vits14 at 224 pixels as teacher  |
    """
    return next((settings for limit, settings in MEMORY_SETTINGS if gibibytes >= limit), MEMORY_SETTINGS[-1][1])


def project_profile(
    *,
    profile: str | None,
    vram: float | None,
    imported: Sequence[Setting],
    flags: Mapping[str, object],
    folder: Path,
    families: Collection[str],
) -> Profile:
    """The settings that start a folder: a preset or TOML file, then memory, then imported ones, then flags.

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
    named = [one for one in settings if (one.table, one.key) == FAMILY]
    if not named:
        mistakes.append(NO_FAMILY)
    elif named[-1].value not in families:
        mistakes.append(f"{named[-1]}: must be one of {', '.join(families)}, which have CREPA support")
    return checked_profile(settings, mistakes).profile


def commented_toml(profile: Profile) -> str:
    """The settings that differ from the built-in defaults, each under its description."""
    parts = [HEADER]
    for table, values in profile.model_dump(exclude_defaults=True).items():
        parts.append(f"\n[{table}]\n")
        for key, value in values.items():
            comment = textwrap.fill(
                description(table, key), width=100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
            )
            parts.append(f"{comment}\n{tomli_w.dumps({key: value})}")
    return "".join(parts)


def refuse_to_overwrite(folder: Path) -> None:
    """Looks for files of the user's that `write_project` would replace.

    Raises:
        UserError: there is a crepa.toml already, or another schema.
    """
    schema = folder / SCHEMA_FILE
    changed = schema.exists() and read_text(schema, SCHEMA_FILE) != _schema_text()
    existing = [PROJECT_FILE] * (folder / PROJECT_FILE).exists() + [SCHEMA_FILE] * changed
    if existing:
        raise UserError(f"{' and '.join(existing)}: already there; --force writes a new one")


def write_project(profile: Profile, folder: Path) -> None:
    """Writes crepa.toml and the schema that it names, over what is there.

    Raises:
        UserError: a file cannot be written.
    """
    write_whole(folder / SCHEMA_FILE, _schema_text().encode())
    write_whole(folder / PROJECT_FILE, commented_toml(profile).encode())


def _schema_text() -> str:
    return json.dumps(json_schema(), indent=2) + "\n"
