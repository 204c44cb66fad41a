"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from crepa_cli.errors import UserError

PARTIAL = "partial"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is whole under its name or not there at all, whenever the process is killed.

    Missing parent folders are made. The name is replaced in one step once the data is on the disk.

    Raises:
        UserError: the disk is full (the message says how much was needed, how much is free, and where), or
            the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(_write_failure(path, len(data), error)) from error


@contextmanager
def whole_folder(path: Path, size: int) -> Iterator[Path]:
    """A folder to fill; once its files are on the disk it takes the place of `path`.

    Whatever goes wrong before leaves `path` as it was, and no half folder.

    Args:
        path: its final name.
        size: the bytes that will be written, for the message of a full disk.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f"{path.name}.{PARTIAL}")
    try:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for entry in (*partial.rglob("*"), partial):
                _sync(entry)
            remove_folder(path)
            partial.replace(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(_write_failure(path, size, error)) from error


def remove_folder(path: Path) -> None:
    """Delete a folder; killed at any moment, it is still there under its name whole, or not at all."""
    if path.is_dir():
        doomed = path.with_name(f"{path.name}.{secrets.token_hex(4)}.{PARTIAL}")
        path.replace(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what runs that were killed had half written or half deleted in a folder."""
    for path in folder.glob(f"*.{PARTIAL}"):
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_failure(path: Path, size: int, error: OSError | SafetensorError) -> str:
    number, reason = _reason(error)
    if number not in NO_ROOM:
        return f"{path} cannot be written: {reason}."
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    return (
        f"{path} cannot be written: {reason}. It needs {size:,} bytes; {free:,} bytes are free "
        f"in {folder}. Make room there or choose a folder on a larger disk, then start again."
    )


def _reason(error: OSError | SafetensorError) -> tuple[int | None, str]:
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    # safetensors reports the system's errors as text.
    found = re.search(r"os error (\d+)", str(error))
    return (int(found[1]), os.strerror(int(found[1]))) if found else (None, str(error))
