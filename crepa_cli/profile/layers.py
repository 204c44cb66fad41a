"""The layers of a run's settings, later over earlier, and where each value came from."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from crepa_cli.errors import UserError
from crepa_cli.profile.describe import allowed_values, known_keys, shown, unknown_key, unknown_table
from crepa_cli.profile.files import (
    RESOLVED_MARK,
    exists,
    find_profile,
    find_project_file,
    parse_toml,
    read_text,
)
from crepa_cli.profile.settings import Profile

Defaults = Callable[[str, str], Mapping[str, Mapping[str, object]]]
"""Takes a model family and a task, gives settings for them by table and key."""
Key = tuple[str, str]

BUILT_IN = "built-in default"
FAMILY: Key = ("model", "family")
TASK: Key = ("model", "task")
FLAGS = {"model.family": "--model", "data.path": "--data"}
NO_FAMILY = "no model family is chosen: give --model, for example --model wan"
LARGEST_INTEGER = 2**63 - 1
PATHS = {("data", "path"), ("data", "cache"), ("train", "output"), ("validation", "images")}
PATHS_OR_NAMES = {("model", "checkpoint"), ("crepa", "encoder")}


class Setting(NamedTuple):
    """One value, and the layer that gave it."""

    table: str
    key: str
    value: object
    source: str

    def __str__(self) -> str:
        return f"{self.source}: {self.table}.{self.key} = {shown(self.value)}"


class _File(NamedTuple):
    tables: Mapping[str, object]
    label: str
    base: Path = Path()


@dataclass(frozen=True)
class ResolvedProfile:
    """The settings of a run, and for each "table.key" the layer that it came from."""

    profile: Profile
    sources: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Table, key, value in words and source of every setting, in the order of the tables."""
        for table, values in self.profile.model_dump().items():
            for key, value in values.items():
                yield table, key, shown(value), self.sources[f"{table}.{key}"]


def resolve_profile(
    *,
    profile: str | None,
    flags: Mapping[str, object],
    sets: Sequence[str],
    folder: Path,
    family_defaults: Defaults,
    demo: Defaults | None = None,
) -> ResolvedProfile:
    """Layers a run's settings: built-in, family, `profile`, crepa.toml, `demo`, `flags`, `sets`; the last one wins.

    Args:
        profile: name of a preset or path of a TOML file. One that `dump_toml` wrote takes the place of the family's
            defaults and of crepa.toml, so that it repeats its run.
        flags: values by "table.key"; None means that the flag was not given.
        sets: "table.key=value", the value as TOML or else a bare string.
        folder: where crepa.toml is looked for, then in its parents.
        family_defaults: raises `UserError` for a family that it does not know.
        demo: settings of the demo, where it is on.

    Raises:
        UserError: lists all mistakes, each with where it was made and what is allowed there.
    """
    mistakes: list[str] = []
    files, repeats_run = _read_files(profile, folder, mistakes)
    unreadable = bool(mistakes)
    written = [
        _anchored(setting, file.base, folder)
        for file in files
        for setting in known_settings(file.tables, file.label, mistakes)
    ]
    given = [*flag_settings(flags, mistakes), *_from_sets(sets, mistakes)]

    stated = _merged([*written, *given])
    if FAMILY not in stated and not unreadable:
        mistakes.append(NO_FAMILY)
    defaults, demo_settings = _defaults(stated, None if repeats_run else family_defaults, demo, mistakes)
    return checked_profile([*defaults, *written, *demo_settings, *given], mistakes)


def _defaults(
    stated: Mapping[Key, Setting], family_defaults: Defaults | None, demo: Defaults | None, mistakes: list[str]
) -> tuple[list[Setting], list[Setting]]:
    """What the family and the demo say for the family and task that are stated, where these are known."""
    family, task = stated.get(FAMILY), stated.get(TASK)
    if family is None or (task is not None and task.value not in ("t2v", "i2v")):
        return [], []
    names = str(family.value), str(task.value) if task else "t2v"
    try:
        defaults = family_defaults(*names) if family_defaults else {}
        demo_tables = demo(*names) if demo else {}
    except UserError as error:
        mistakes.append(f"{family}: {error}")
        return [], []
    return (
        list(known_settings(defaults, f"family {family.value}", mistakes)),
        list(known_settings(demo_tables, "--demo", mistakes)),
    )


def _read_files(profile: str | None, folder: Path, mistakes: list[str]) -> tuple[list[_File], bool]:
    """What `profile` and crepa.toml say, and whether `profile` repeats a run."""
    files = []
    if profile is not None:
        try:
            path, label = find_profile(profile, folder)
            text = read_text(path, label)
            files.append(_File(parse_toml(text, label), label))
            if text.startswith(RESOLVED_MARK):
                return files, True
        except UserError as error:
            mistakes.append(str(error))
    if project := find_project_file(folder):
        label = os.path.relpath(project, folder)
        try:
            files.append(_File(parse_toml(read_text(project, label), label), label, Path(label).parent))
        except UserError as error:
            mistakes.append(str(error))
    return files, False


def _anchored(setting: Setting, base: Path, folder: Path) -> Setting:
    """The setting with its relative path, if it is one, taken from `base` (itself relative to `folder`)."""
    name = (setting.table, setting.key)
    if base == Path() or setting.value == "none" or name not in PATHS | PATHS_OR_NAMES:
        return setting

    def anchor(path: object) -> object:
        if not isinstance(path, str) or (name in PATHS_OR_NAMES and not exists(folder / base / path)):
            return path
        return str(base / path)

    value = setting.value
    return setting._replace(value=[anchor(one) for one in value] if isinstance(value, list) else anchor(value))


def known_settings(tables: Mapping[str, object], source: str, mistakes: list[str]) -> Iterator[Setting]:
    """The settings of `tables` whose keys exist; the others become mistakes."""
    for table, values in tables.items():
        if table not in known_keys():
            mistakes.append(f"{source}: {unknown_table(table)}")
        elif not isinstance(values, Mapping):
            mistakes.append(f"{source}: {table} = {shown(values)}: must be a table, [{table}]")
        else:
            for key, value in values.items():
                setting = Setting(table, key, value, source)
                if key not in known_keys()[table]:
                    mistakes.append(f"{source}: {unknown_key(table, key)}")
                elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
                    mistakes.append(f"{setting}: must have at most 64 bits")
                else:
                    yield setting


def flag_settings(flags: Mapping[str, object], mistakes: list[str]) -> Iterator[Setting]:
    """The settings of flags by "table.key"; None means that the flag was not given."""
    for name, value in flags.items():
        if value is not None:
            table, _, key = name.partition(".")
            yield from known_settings({table: {key: value}}, FLAGS.get(name, f"--{key.replace('_', '-')}"), mistakes)


def _from_sets(sets: Iterable[str], mistakes: list[str]) -> Iterator[Setting]:
    for text in sets:
        name, equals, value = text.partition("=")
        table, dot, key = name.strip().partition(".")
        if equals and dot:
            yield from known_settings({table: {key: _toml_or_text(value.strip())}}, "--set", mistakes)
        else:
            mistakes.append(f"--set {text}: must be table.key=value, for example --set crepa.lambda=0.3")


def _toml_or_text(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _merged(settings: Iterable[Setting]) -> dict[Key, Setting]:
    return {(one.table, one.key): one for one in settings}


def _nested(settings: Iterable[Setting]) -> dict[str, dict[str, object]]:
    tables: dict[str, dict[str, object]] = {}
    for one in settings:
        tables.setdefault(one.table, {})[one.key] = one.value
    return tables


def checked_profile(settings: Iterable[Setting], mistakes: Iterable[str] = ()) -> ResolvedProfile:
    """The profile of settings that later ones override.

    Raises:
        UserError: lists `mistakes`, values out of range and broken rules.
    """
    merged = _merged(settings)
    mistakes = [*mistakes, *_wrong_values(merged)]
    if mistakes:
        heading = f"{len(mistakes)} mistakes in the settings:"
        raise UserError(mistakes[0] if len(mistakes) == 1 else "\n  ".join([heading, *mistakes]))
    sources = {
        f"{table}.{key}": merged[table, key].source if (table, key) in merged else BUILT_IN
        for table, keys in known_keys().items()
        for key in keys
    }
    return ResolvedProfile(Profile.model_validate(_nested(merged.values())), sources)


def _wrong_values(merged: Mapping[Key, Setting]) -> Iterator[str]:
    """Every value out of range and every broken rule, each checked as if the ones before were not there."""
    family = Setting(*FAMILY, "?", "")
    remaining = {FAMILY: family, **merged}
    blamed: set[Key] = set()
    while errors := _errors(remaining.values()):
        for keys, must in errors:
            if blamed.isdisjoint(keys):
                yield f"{merged[keys[0]]}: {must}"
            blamed.update(keys)
        remaining = {FAMILY: family} | {key: one for key, one in merged.items() if key not in blamed}


def _errors(settings: Iterable[Setting]) -> list[tuple[list[Key], str]]:
    """For every error the keys that it is about, the one to report first, and what must be."""
    try:
        Profile.model_validate(_nested(settings))
    except ValidationError as error:
        return [_explained(one) for one in error.errors(include_url=False, include_input=False)]
    return []


def _explained(error: ErrorDetails) -> tuple[list[Key], str]:
    table = str(error["loc"][0])
    if error["type"] == "rule":
        return [(table, key) for key in error["ctx"]["keys"]], error["msg"]
    key = str(error["loc"][1])
    return [(table, key)], f"must be {allowed_values(table, key)}"
