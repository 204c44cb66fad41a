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
from crepa_cli.profile.describe import PRESET_DESCRIPTION, description, examples, json_schema
from crepa_cli.profile.files import (
    PRESET,
    PROJECT_FILE,
    find_profile,
    parse_toml,
    preset_tables,
    presets,
    read_text,
    without_preset,
)
from crepa_cli.profile.layers import (
    FAMILY,
    NO_FAMILY,
    Key,
    Setting,
    check_settings,
    flag_settings,
    known_settings,
    merged,
    nested,
)
from crepa_cli.profile.settings import LISTED_TABLES, Profile

SCHEMA_FILE = "crepa.schema.json"
HEADER = f"""\
#:schema ./{SCHEMA_FILE}

# Settings that differ from the defaults, and in comments the defaults of those that are changed most often.
# `crepa train --print-profile` shows all settings and their sources.
"""
KNOBS = {
    "adapter": ("rank",),
    "train": ("steps",),
    "validation": ("prompts",),
    "crepa": ("block_index", "lambda", "encoder"),
}
"""Settings that are changed most often, by table."""
LIGHTER_CLIPS: tuple[tuple[float, dict[str, dict[str, object]]], ...] = (
    (24, {}),
    (12, {"data": {"frames": 49}}),
    (0, {"data": {"frames": 33}, "crepa": {"encoder": "dinov2_vits14", "encoder_image_size": 224}}),
)
"""Smallest GPU memory in GB, and settings that differ from the defaults; the first of a GPU's size is used."""


def lighter_clips(gigabytes: float) -> Mapping[str, Mapping[str, object]]:
    """Shorter clips and a smaller teacher for a GPU on which those of the defaults do not fit.

    | GPU memory      | settings                                           |
    | --------------- | -------------------------------------------------- |
    | 24 GB and more  | none                                               |
    | 12 to 24 GB     | 49 frames                                          |
    | below 12 GB     | 33 frames, dinov2_vits14 at 224 pixels as teacher  |
    """
    return next((settings for limit, settings in LIGHTER_CLIPS if gigabytes >= limit), LIGHTER_CLIPS[-1][1])


def project_settings(
    *,
    profile: str | None,
    imported: Sequence[Setting],
    flags: Mapping[str, object],
    folder: Path,
    families: Collection[str],
) -> dict[str, Any]:
    """The contents of a new crepa.toml: the name of its preset, if any, and the settings that differ from it.

    The layers are a preset or TOML file, imported settings and flags.

    Raises:
        UserError: lists all mistakes.
    """
    mistakes: list[str] = []
    tables, label = _read_profile(profile, folder)
    preset = list(known_settings(preset_tables(tables, label) or {}, label, mistakes))
    settings = list(known_settings(without_preset(tables), label, mistakes))
    settings += [*imported, *flag_settings(flags, mistakes)]
    named = [one for one in (*preset, *settings) if one.name == FAMILY]
    if not named:
        mistakes.append(NO_FAMILY)
    elif named[-1].value not in families:
        mistakes.append(f"{named[-1]}: must be one of {', '.join(families)}, which support CREPA")
    changed = _changed(merged(preset), check_settings([*preset, *settings], mistakes))
    return {PRESET: tables[PRESET], **changed} if PRESET in tables else changed


def _read_profile(profile: str | None, folder: Path) -> tuple[dict[str, object], str]:
    """The content of the file that `--profile` names, or the name of its preset, and its name in messages."""
    if profile is None:
        return {}, ""
    if profile in presets():
        return {PRESET: profile}, f"preset {profile}"
    path, label = find_profile(profile, folder)
    return parse_toml(read_text(path, label), label), label


def _changed(preset: Mapping[Key, Setting], settings: Mapping[Key, Setting]) -> dict[str, dict[str, Any]]:
    """The values of checked settings by table and key, without those of the preset and of the built-in defaults."""
    before, after = (_dumped(layer) for layer in (preset, settings))
    stated = {name for name in settings if name not in preset and name in examples()}
    values = {name: value for name, value in after.items() if name in stated or value != before[name]}
    # Without a default of its own, a setting that is back at the family's default is not among the settings.
    return nested({name: "none" if name not in settings or value is None else value for name, value in values.items()})


def _dumped(settings: Mapping[Key, Setting]) -> dict[Key, Any]:
    """The value of every setting but those that only a family knows, in the order of the tables."""
    values = {name: one.value for name, one in settings.items()}
    profile = Profile.model_validate(nested({FAMILY: "?", **examples(), **values}))
    return {(table, key): value for table, keys in profile.model_dump().items() for key, value in keys.items()}


def commented_toml(contents: Mapping[str, Any], profile: Profile) -> str:
    """The contents of `project_settings` as TOML, each setting below its description, and the `KNOBS` as comments.

    Args:
        contents: the name of a preset, if any, and settings by table and key.
        profile: what they mean for their family; it has the values of the knobs.
    """
    defaults = profile.model_dump(mode="json", by_alias=True)
    parts = [HEADER]
    if PRESET in contents:
        parts.append(f"\n# {PRESET_DESCRIPTION}\n{tomli_w.dumps({PRESET: contents[PRESET]})}")
    settings = without_preset(contents)
    for table in dict.fromkeys([*settings, *KNOBS]):
        values = settings.get(table, {})
        parts.append(f"\n[{table}]\n")
        tables = {key: values[key] for key in values if f"{table}.{key}" in LISTED_TABLES}
        parts += [_commented(table, key, value) for key, value in values.items() if key not in tables]
        open_ = (key for key in KNOBS.get(table, ()) if key not in values)
        parts += [_commented(table, key, defaults[table][key], mark="# ") for key in open_]
        # Behind a list of tables, keys would belong to the last of them.
        parts += [f"\n[[{table}.{key}]]\n{tomli_w.dumps(one)}" for key, value in tables.items() for one in value]
    return "".join(parts)


def _commented(table: str, key: str, value: object, mark: str = "") -> str:
    """A setting below its description; with the mark of a comment, it does not count."""
    comment = textwrap.fill(
        description(table, key), width=100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
    return f"{comment}\n{textwrap.indent(tomli_w.dumps({key: value}), mark)}"


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


def write_project(contents: Mapping[str, Any], profile: Profile, folder: Path) -> None:
    """Write crepa.toml and its schema, replacing existing files; see `commented_toml`.

    Raises:
        UserError: if a file cannot be written.
    """
    write_whole(folder / SCHEMA_FILE, _schema_text().encode())
    write_whole(folder / PROJECT_FILE, commented_toml(contents, profile).encode())


def _schema_text() -> str:
    return json.dumps(json_schema(), indent=2) + "\n"
