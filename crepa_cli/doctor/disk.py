"""Disk space for the files of a run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.filesize import decimal

from crepa_cli.doctor.findings import Check

LITTLE = 5 * 10**9


def check_folder(name: str, folder: Path, needed: int = 0, contents: str = "") -> Check:
    """Check that a folder is writable and has enough space.

    Args:
        name: name of the check.
        folder: the folder, which need not exist yet.
        needed: total size of the files in bytes, including those already there from an earlier run.
        contents: description of these files, put in front of the message.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Check(name, "failure", f"{folder}: {place} is not writable", "choose another folder")
    free = shutil.disk_usage(place).free
    message = f"{contents}{decimal(free)} free in {folder}"
    if needed > free + _size(folder):
        return Check(name, "failure", message, f"free up space for {decimal(needed)}, or choose a larger disk")
    if needed + LITTLE > free:
        return Check(name, "warning", message, "space is tight: checkpoints and videos need some too")
    return Check(name, "fine", message)


def _size(folder: Path) -> int:
    """The total size of the files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
