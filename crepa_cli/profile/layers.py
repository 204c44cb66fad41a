"""Layers of settings: later ones override earlier ones, and every value keeps its source."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from crepa_cli.errors import UserError
from crepa_cli.profile.describe import (
    allowed_values,
    examples,
    family_keys,
    known_keys,
    shown,
    unknown_key,
    unknown_table,
)
from crepa_cli.profile.files import (
    PATHS,
    PATHS_OR_NAMES,
    PRESET,
    PROJECT_FILE,
    RESOLVED_MARK,
    exists,
    find_profile,
    find_project_file,
    parse_toml,
    preset_tables,
    read_text,
    without_preset,
)
from crepa_cli.profile.settings import LISTED_TABLES, Profile

Tables = Mapping[str, Mapping[str, object]]
Demo = Callable[[str, str], Tables]
"""From the names of a model family and a task to settings by table and key."""
Defaults = Callable[[str, str, str, str | None], Mapping[str, Tables]]
"""From family, task, `adapter.kind` and, if it is set, the checkpoint to layers of settings, by their names."""
Key = tuple[str, str]

BUILT_IN = "built-in default"
FAMILY: Key = ("model", "family")
RANK: Key = ("adapter", "rank")
ALPHA: Key = ("adapter", "alpha")
TASK: Key = ("model", "task")
KIND: Key = ("adapter", "kind")
CHECKPOINT: Key = ("model", "checkpoint")
COMPONENTS: Key = ("model", "components")
FLAGS = {"model.family": "--model", "data.path": "--data"}
NO_FAMILY = "no model family is set: choose one with --model; `crepa init` lists them"
LARGEST_INTEGER = 2**63 - 1


class Setting(NamedTuple):
    """A value and the layer that set it."""

    table: str
    key: str
    value: object
    source: str

    @property
    def name(self) -> Key:
        """Table and key."""
        return self.table, self.key

    def __str__(self) -> str:
        return f"{self.source}: {self.table}.{self.key} = {shown(self.value)}"


class SettingsError(UserError):
    """Mistakes in the settings, one message each.

    Attributes:
        mistakes: the messages.
        rest: the settings without those at fault, over the family's defaults; what is missing has no valid value.
    """

    def __init__(self, mistakes: Sequence[str], rest: Mapping[Key, Setting]) -> None:
        heading = f"{len(mistakes)} mistakes in the settings:"
        super().__init__(mistakes[0] if len(mistakes) == 1 else "\n  ".join([heading, *mistakes]))
        self.mistakes = mistakes
        self.rest = rest

    @property
    def profile(self) -> Profile | None:
        """The profile of the rest; None if the family's defaults are not known."""
        try:
            return _resolved(self.rest).profile
        except (KeyError, ValidationError):
            return None


class _File(NamedTuple):
    tables: Mapping[str, object]
    label: str
    base: Path = Path()


@dataclass(frozen=True)
class ResolvedProfile:
    """The settings of a run, and the source of each by "table.key"."""

    profile: Profile
    sources: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Table, key, value as text and source of every setting, in the order of the tables."""
        for table, values in self.profile.model_dump().items():
            for key, value in values.items():
                yield table, key, shown(value, limit=None), self.sources[f"{table}.{key}"]


def resolve_profile(
    *,
    profile: str | None,
    flags: Mapping[str, object],
    sets: Sequence[str],
    folder: Path,
    family_defaults: Defaults,
    demo: Demo | None = None,
) -> ResolvedProfile:
    """Merge the layers of a run's settings; later layers override earlier ones.

    The order is: built-in defaults, family, `profile`, crepa.toml, `demo`, `flags`, `sets`. A setting whose default
    depends on the family goes back to that default if a layer sets it to "none".

    Args:
        profile: name of a preset or path of a TOML file; it replaces the preset that crepa.toml names. A file that
            `dump_toml` wrote replaces the family's defaults and crepa.toml, so that it repeats its run.
        flags: values by "table.key"; None means that the flag was not given.
        sets: "table.key=value", the value as TOML or else a bare string.
        folder: the first folder to search for crepa.toml; its parents come next.
        family_defaults: has a value for every setting that depends on the family, and raises `UserError` for an
            unknown family.
        demo: settings of the demo, if it is on.

    Raises:
        UserError: lists all mistakes, each with its source and the allowed values.
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

    stated = merged([*written, *given])
    if FAMILY not in stated and not unreadable:
        mistakes.append(NO_FAMILY)
    defaults, demo_settings = _defaults(stated, family_defaults, demo, mistakes)
    if repeats_run:  # Files of older versions lack the settings that were none.
        defaults = [one for one in defaults if one.name in family_keys()]
    return _resolved(check_settings([*written, *demo_settings, *given], mistakes, defaults))


def _defaults(
    stated: Mapping[Key, Setting], family_defaults: Defaults, demo: Demo | None, mistakes: list[str]
) -> tuple[list[Setting], list[Setting]]:
    """The defaults and the demo's settings for the stated family and task; nothing if these are unknown."""
    family, task = stated.get(FAMILY), stated.get(TASK)
    if family is None or (task is not None and task.value not in ("t2v", "i2v")):
        return [], []
    names = str(family.value), str(task.value) if task else "t2v"
    kind = "lora" if KIND not in stated else str(stated[KIND].value)
    # A single file has the defaults of the model that it belongs to.
    checkpoint = stated.get(COMPONENTS) or stated.get(CHECKPOINT)
    try:
        layers = family_defaults(*names, kind, str(checkpoint.value) if checkpoint else None)
        demo_tables = demo(*names) if demo else {}
    except UserError as error:
        mistakes.append(f"{family}: {error}")
        return [], []
    return (
        [one for source, tables in layers.items() for one in known_settings(tables, source, mistakes)],
        list(known_settings(demo_tables, "--demo", mistakes)),
    )


def _read_files(profile: str | None, folder: Path, mistakes: list[str]) -> tuple[list[_File], bool]:
    """The contents of the preset, of `profile` and of crepa.toml, and whether `profile` repeats a run."""
    files: list[_File] = []
    if profile is not None:
        try:
            path, label = find_profile(profile, folder)
            text = read_text(path, label)
            files += _below(_File(parse_toml(text, label), label))
            if text.startswith(RESOLVED_MARK):
                return files, True
        except UserError as error:
            mistakes.append(str(error))
    if project := find_project_file(folder):
        label = os.path.relpath(project, folder)
        try:
            file = _File(parse_toml(read_text(project, label), label), label, Path(label).parent)
            files += _below(file) if profile is None else [file]
        except UserError as error:
            mistakes.append(str(error))
    return [file._replace(tables=without_preset(file.tables)) for file in files], False


def _below(file: _File) -> list[_File]:
    """The preset that a file names, if any, and the file itself.

    Raises:
        UserError: if there is no such preset.
    """
    preset = preset_tables(file.tables, file.label)
    return [file] if preset is None else [_File(preset, f"preset {file.tables[PRESET]}"), file]


def _anchored(setting: Setting, base: Path, folder: Path) -> Setting:
    """The setting; if its value is a relative path, it is resolved from `base` (itself relative to `folder`)."""
    name = setting.name
    if base == Path() or setting.value == "none" or name not in PATHS | PATHS_OR_NAMES:
        return setting

    def anchor(path: object) -> object:
        if isinstance(path, dict):  # a source
            return path | {"path": anchor(path["path"])} if "path" in path else path
        if not isinstance(path, str) or (name in PATHS_OR_NAMES and not exists(folder / base / path)):
            return path
        return str(base / path)

    value = setting.value
    return setting._replace(value=[anchor(one) for one in value] if isinstance(value, list) else anchor(value))


def complete(tables: Mapping[str, object], family_defaults: Defaults) -> Profile:
    """The profile that a crepa.toml with these tables, and the name of its preset, describes without flags.

    Raises:
        SettingsError: lists all mistakes.
    """
    mistakes: list[str] = []
    settings = [
        setting
        for file in _below(_File(dict(tables), PROJECT_FILE))
        for setting in known_settings(without_preset(file.tables), file.label, mistakes)
    ]
    defaults, _ = _defaults(merged(settings), family_defaults, None, mistakes)
    return _resolved(check_settings(settings, mistakes, defaults)).profile


def known_settings(tables: Mapping[str, object], source: str, mistakes: list[str]) -> Iterator[Setting]:
    """The settings of `tables` whose keys exist; unknown tables and keys are added to `mistakes`."""
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
                elif any(isinstance(one, int) and abs(one) > LARGEST_INTEGER for one in _parts(value)):
                    mistakes.append(f"{setting}: must have at most 64 bits")
                else:
                    yield setting


def _parts(value: object) -> Iterator[object]:
    """The value itself, or the values of the tables in a list."""
    yield value
    for one in value if isinstance(value, list) else ():
        yield from one.values() if isinstance(one, dict) else ()


def flag_settings(flags: Mapping[str, object], mistakes: list[str]) -> Iterator[Setting]:
    """The settings that flags set, by "table.key"; None means that the flag was not given."""
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


def merged(settings: Iterable[Setting], defaults: Iterable[Setting] = ()) -> dict[Key, Setting]:
    """The last setting of each key. A "none" that stands for the family's default is replaced by that of `defaults`."""
    base = {one.name: one for one in defaults}
    result = dict(base)
    for one in settings:
        if one.value in (None, "none") and one.name in examples():
            result.pop(one.name, None)
            if one.name in base:
                result[one.name] = base[one.name]
        else:
            result[one.name] = one
    return result


def nested(values: Mapping[Key, object]) -> dict[str, dict[str, Any]]:
    """The values by table and key."""
    tables: dict[str, dict[str, Any]] = {}
    for (table, key), value in values.items():
        tables.setdefault(table, {})[key] = value
    return tables


def check_settings(
    settings: Iterable[Setting], mistakes: Iterable[str] = (), defaults: Iterable[Setting] = ()
) -> dict[Key, Setting]:
    """The settings over `defaults`, merged, with nothing wrong in them; those of the family may be missing.

    Raises:
        SettingsError: lists `mistakes`, values out of range and broken rules.
    """
    defaults = list(defaults)
    checked = merged(settings, defaults)
    wrong, rest = _wrong_values(checked)
    if mistakes := [*mistakes, *wrong]:
        raise SettingsError(mistakes, {one.name: one for one in defaults} | rest)
    return checked


def _resolved(settings: Mapping[Key, Setting]) -> ResolvedProfile:
    """The profile of checked settings, complete but for adapter.alpha, which is the rank if it is not set."""
    rank = settings[RANK]
    settings = {ALPHA: Setting(*ALPHA, rank.value, rank.source), **settings}
    sources = {
        f"{table}.{key}": settings[table, key].source if (table, key) in settings else BUILT_IN
        for table, keys in known_keys().items()
        for key in keys
    }
    return ResolvedProfile(Profile.model_validate(nested(_values(settings))), sources)


def _values(settings: Mapping[Key, Setting]) -> dict[Key, object]:
    return {name: one.value for name, one in settings.items()}


def _wrong_values(settings: Mapping[Key, Setting]) -> tuple[list[str], dict[Key, Setting]]:
    """A message for each value out of range and each broken rule, and the settings without those at fault.

    What is already wrong is left out of later checks.
    """
    messages: list[str] = []
    blamed: set[Key] = set()
    rest = dict(settings)
    while errors := _errors(_values(rest)):
        for keys, must in errors:
            if blamed.isdisjoint(keys):
                messages.append(f"{settings[keys[0]]}: {must}")
            blamed.update(keys)
        rest = {name: one for name, one in rest.items() if name not in blamed}
    return messages, rest


def _errors(values: Mapping[Key, object]) -> list[tuple[list[Key], str]]:
    """For each error its keys, first the one to report, and the requirement. Examples stand in for missing values."""
    stand_ins = {FAMILY: "?", **examples()}
    try:
        Profile.model_validate(nested({**stand_ins, **values}))
    except ValidationError as error:
        found = [_explained(one) for one in error.errors(include_url=False, include_input=False)]
        missing = stand_ins.keys() - values.keys()
        return [(keys, must) for keys, must in found if missing.isdisjoint(keys)]
    return []


def _explained(error: ErrorDetails) -> tuple[list[Key], str]:
    table = str(error["loc"][0])
    if error["type"] == "rule":
        return [(table, key) for key in error["ctx"]["keys"]], error["msg"]
    key, *inner = (str(part) for part in error["loc"][1:])
    tables = f"{table}.{key}"
    if tables in LISTED_TABLES and len(inner) > 1:
        name, known = inner[1], LISTED_TABLES[tables].model_fields
        must = f"{name} must be {allowed_values(tables, name)}" if name in known else f"the keys are {', '.join(known)}"
        return [(table, key)], f"in table {int(inner[0]) + 1}, {must}"
    return [(table, key)], f"must be {allowed_values(table, key)}"
