"""TOML files: the presets, `crepa.toml`, and the profile that a run writes."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path

import tomli_w

from crepa_cli.errors import UserError
from crepa_cli.profile.describe import shown
from crepa_cli.profile.settings import Profile

PROJECT_FILE = "crepa.toml"
LARGEST_FILE = 2**20
RESOLVED_MARK = "# All settings of a run, resolved."
RESOLVED_HEADER = f"{RESOLVED_MARK} As --profile, this file alone decides: no crepa.toml is read beside it.\n\n"


def presets() -> dict[str, Path]:
    """The presets by name: of the installed package, or of the source checkout that this file lies in."""
    folder = Path(__file__).parent / "presets"
    if not folder.is_dir():
        folder = Path(__file__).parents[2] / "profiles"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def preset_purpose(path: Path) -> str:
    """What a preset is for: its first line, a comment."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def find_profile(name: str, folder: Path) -> tuple[Path, str]:
    """The file that `--profile` names, a preset or a path relative to `folder`, and how to call it.

    Raises:
        UserError: there is no such preset and no such file.
    """
    known = presets()
    if name in known:
        return known[name], f"preset {name}"
    path = folder / name
    if exists(path):
        return path, name
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    raise UserError(f"--profile: there is no preset and no file {shown(name)}{hint}; presets are {', '.join(known)}")


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; False as well for what no file system takes as a name."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def find_project_file(folder: Path) -> Path | None:
    """The `crepa.toml` of `folder` or of its nearest parent that has one."""
    folder = folder.absolute()
    candidates = (parent / PROJECT_FILE for parent in (folder, *folder.parents))
    return next((path for path in candidates if exists(path)), None)


def read_text(path: Path, label: str) -> str:
    """The text of a small UTF-8 file.

    Raises:
        UserError: it cannot be read, is no regular file, is too large, or is no text. The message starts with `label`.
    """
    try:
        if not path.is_file():
            raise UserError(f"{label}: is not a file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UserError(f"{label}: is larger than {LARGEST_FILE // 2**20} MiB; is this the right file?")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{label}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{label}: is not UTF-8 text") from error


def parse_toml(text: str, label: str) -> dict[str, object]:
    """The tables of a TOML document.

    Raises:
        UserError: the text is no TOML. The message names `label`, the line and the column.
    """
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"{label}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{label}: not valid TOML: too deeply nested") from error


def dump_toml(profile: Profile) -> str:
    """Every setting of `profile` that has a value, as TOML that `--profile` reads back to an equal profile."""
    return RESOLVED_HEADER + tomli_w.dumps(profile.model_dump(exclude_none=True))
