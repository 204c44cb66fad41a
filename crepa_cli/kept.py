"""Whole numbers found by earlier calls, such as predictions of memory, stored in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from crepa_cli import __version__
from crepa_cli.errors import UserError
from crepa_cli.files import write_whole

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def kept(facts: object, find: Callable[[], dict[str, int]]) -> dict[str, int]:
    """The stored numbers for these facts; without any, call `find` and store its result.

    Args:
        facts: JSON values of everything that the numbers depend on, except for the versions of libraries.
        find: returns numbers by name.
    """
    versions = {"crepa": __version__, **{name: version(name) for name in LIBRARIES}}
    digest = hashlib.sha256(json.dumps([versions, facts], sort_keys=True, default=str).encode()).hexdigest()
    file = folder() / f"{digest[:32]}.json"
    known = _read(file)
    if known is not None:
        return known
    found = find()
    # If the folder cannot be written, the next call only takes longer.
    with suppress(UserError):
        write_whole(file, json.dumps(found).encode())
    return found


def folder() -> Path:
    """The folder of stored numbers."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crepa" / "memory"


def _read(file: Path) -> dict[str, int] | None:
    """The numbers in a file; None if the file is missing or damaged."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    if isinstance(content, dict) and content and all(isinstance(one, int) for one in content.values()):
        return content
    return None
