"""TOML files: presets, `crepa.toml` and the resolved profile of a run."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import tomli_w

from crepa_cli.errors import UserError
from crepa_cli.profile.describe import shown
from crepa_cli.profile.settings import Profile

Value = TypeVar("Value")

PROJECT_FILE = "crepa.toml"
PRESET = "preset"
"""Key of a TOML file, above its tables, that names the preset below its settings."""
PATHS = {
    ("data", "path"),
    ("data", "sources"),
    ("data", "validation_path"),
    ("data", "cache"),
    ("train", "output"),
    ("validation", "images"),
}
PATHS_OR_NAMES = {("model", "checkpoint"), ("model", "components"), ("adapter", "init_from"), ("crepa", "encoder")}
CONTROL = re.compile(r"[\x00-\x1f]")
BACKSLASHES = (
    'in double quotes a backslash starts an escape: write the path with slashes ("D:/clips") or in single quotes '
    "('D:\\clips')"
)
LARGEST_FILE = 10**6
RESOLVED_MARK = "# All settings of a run, resolved."
RESOLVED_HEADER = f"{RESOLVED_MARK} As --profile, this file alone decides: no crepa.toml is read beside it.\n\n"


def presets() -> dict[str, Path]:
    """The presets by name, from the installed package or from the source checkout."""
    return _profiles_in(_shipped())


def recipes() -> dict[str, Path]:
    """The recipes by name: the settings that fit a family's training on a card of a size, over a preset."""
    return _profiles_in(_shipped() / "recipes")


def _shipped() -> Path:
    folder = Path(__file__).parent / "presets"
    return folder if folder.is_dir() else Path(__file__).parents[2] / "profiles"


def _profiles_in(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def preset_purpose(path: Path) -> str:
    """The purpose of a preset: the comment in its first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def find_profile(name: str, folder: Path) -> tuple[Path, str]:
    """The file that `--profile` names, a preset, a recipe or a path relative to `folder`, and its name in messages.

    Raises:
        UserError: if there is no such preset, recipe or file.
    """
    for kind, known in (("preset", presets()), ("recipe", recipes())):
        if name in known:
            return known[name], f"{kind} {name}"
    path = folder / name
    if exists(path):
        return path, name
    nearest = difflib.get_close_matches(name, [*presets(), *recipes()], n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    raise UserError(
        f"--profile: no preset or file is named {shown(name)}{hint}; the presets are {', '.join(presets())}, and "
        "`crepa init --list` shows the recipes"
    )


def preset_tables(tables: Mapping[str, object], label: str) -> dict[str, object] | None:
    """The settings of the preset that a file names with `preset = "..."`; None if it names none.

    Args:
        tables: of the file.
        label: of the file in messages.

    Raises:
        UserError: if there is no such preset.
    """
    if PRESET not in tables:
        return None
    name, known = tables[PRESET], presets()
    if not isinstance(name, str) or name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"{label}: {PRESET} = {shown(name)}: must be one of {', '.join(known)}{hint}")
    return parse_toml(read_text(known[name], f"preset {name}"), f"preset {name}")


def without_preset(tables: Mapping[str, Value]) -> dict[str, Value]:
    """The tables of a file without the name of its preset."""
    return {name: values for name, values in tables.items() if name != PRESET}


def exists(path: Path) -> bool:
    """Whether the file or folder exists; False if its name is invalid."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def find_project_file(folder: Path) -> Path | None:
    """The `crepa.toml` of `folder` or of the nearest parent that has one."""
    folder = folder.absolute()
    candidates = (parent / PROJECT_FILE for parent in (folder, *folder.parents))
    return next((path for path in candidates if exists(path)), None)


def read_text(path: Path, label: str) -> str:
    """The text of a small UTF-8 file.

    Raises:
        UserError: if it cannot be read, is not a regular file, is too large or is not UTF-8. The message starts with
            `label`.
    """
    try:
        if not path.is_file():
            raise UserError(f"{label}: is not a file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UserError(f"{label}: is larger than {LARGEST_FILE // 10**6} MB; is this the right file?")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{label}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{label}: is not UTF-8 text") from error


def parse_toml(text: str, label: str) -> dict[str, object]:
    """The tables of a TOML document.

    Raises:
        UserError: if the text is not valid TOML. The message names `label`, the line and the column.
    """
    try:
        tables = tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"{label}: not valid TOML: {error}{_backslash_hint(text, str(error))}") from error
    except RecursionError as error:
        raise UserError(f"{label}: not valid TOML: too deeply nested") from error
    _refuse_broken_paths(tables, label)
    return tables


def _backslash_hint(text: str, error: str) -> str:
    """How to write a path, if the line of a TOML error has a backslash in double quotes."""
    found = re.search(r"at line (\d+)", error)
    line = text.splitlines()[int(found[1]) - 1] if found else ""
    return f"; {BACKSLASHES}" if re.search(r'"[^"]*\\', line) else ""


def _refuse_broken_paths(tables: Mapping[str, object], label: str) -> None:
    """Refuse paths with control characters: TOML reads a backslash before n or t as a line break or a tab."""
    for table, keys in tables.items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            texts = value if isinstance(value, list) else [value]
            texts = [text.get("path") if isinstance(text, dict) else text for text in texts]
            if (table, key) in PATHS | PATHS_OR_NAMES and any(CONTROL.search(str(text)) for text in texts):
                raise UserError(f"{label}: {table}.{key} = {shown(value)} is not a path; {BACKSLASHES}")


def dump_toml(profile: Profile) -> str:
    """All settings of `profile` that have a value, as TOML; `--profile` reads it back to an equal profile."""
    return RESOLVED_HEADER + tomli_w.dumps(profile.model_dump(exclude_none=True))
