"""Room on disk for what a run writes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.filesize import decimal

from crepa_cli.doctor.findings import Check

LITTLE = 5 * 10**9


def check_folder(name: str, folder: Path, needed: int = 0, contents: str = "") -> Check:
    """Whether a folder can be written, and has room.

    Args:
        name: of the check.
        folder: it need not be there yet.
        needed: bytes that will be written to it, less what is there from an earlier run.
        contents: what these are, in words.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Check(name, "failure", f"{folder}: {place} cannot be written", "choose another folder")
    free = shutil.disk_usage(place).free
    message = f"{contents}{decimal(free)} free for {folder}"
    if needed > free + _size(folder):
        return Check(name, "failure", message, f"make room for {decimal(needed)}, or choose a larger disk")
    if needed + LITTLE > free:
        return Check(name, "warning", message, "little room: checkpoints and videos are written too")
    return Check(name, "fine", message)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
