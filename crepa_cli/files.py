"""Files that are written whole or not at all, on every system and file system."""

from __future__ import annotations

import errno
import functools
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from crepa_cli.errors import UserError

PARTIAL = "partial"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}
"""Errors with which Windows, network drives and FUSE refuse to open or sync a folder."""
ATTEMPTS = 20
PAUSE_SECONDS = 0.05


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
            _retry(lambda: temporary.replace(path))
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(_write_failure(path, len(data), error)) from error


@contextmanager
def whole_folder(path: Path, size: int) -> Iterator[Path]:
    """A folder to fill; once its files are on the disk it takes the place of `path`.

    An error before that leaves `path` as it was, and no partial folder.

    Args:
        path: its final name.
        size: the bytes that will be written, for the message of a full disk.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with _partial_folder(path, size) as partial:
        yield partial
        _finish(partial)
        remove_folder(path)
        _retry(lambda: partial.replace(path))
        _sync(path.parent)


@contextmanager
def whole_files(folder: Path, size: int) -> Iterator[Path]:
    """Like `whole_folder`, but what is filled takes its place file by file, and what else is in `folder` stays."""
    with _partial_folder(folder, size) as partial:
        yield partial
        _finish(partial)
        folder.mkdir(exist_ok=True)
        for entry in list(partial.iterdir()):
            remove_folder(folder / entry.name)
            _retry(functools.partial(entry.replace, folder / entry.name))
        _sync(folder)


@contextmanager
def _partial_folder(path: Path, size: int) -> Iterator[Path]:
    """An empty folder beside `path`, deleted in the end."""
    partial = path.with_name(f"{path.name}.{PARTIAL}")
    try:
        try:
            _delete(partial)
            partial.mkdir(parents=True)
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(_write_failure(path, size, error)) from error


def _finish(folder: Path) -> None:
    """Give the files in a folder the mode of any new file, and wait until they are on the disk.

    safetensors makes files that only their owner can read.
    """
    probe = folder / PARTIAL
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for entry in (*folder.rglob("*"), folder):
        if entry.is_file():
            entry.chmod(mode)
        _sync(entry)


def remove_folder(path: Path) -> None:
    """Delete a folder; if the process is killed, the folder is there under its name whole, or not at all."""
    if path.is_dir():
        doomed = path.with_name(f"{path.name}.{secrets.token_hex(4)}.{PARTIAL}")
        _retry(lambda: path.replace(doomed))
        _delete(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete the folders that killed processes left partly written or partly deleted, but for those still in use."""
    for path in folder.glob(f"*.{PARTIAL}"):
        with suppress(PermissionError):
            _delete(path)


def _delete(path: Path) -> None:
    if path.exists():
        _retry(lambda: shutil.rmtree(path))


def _retry(action: Callable[[], object]) -> None:
    """Retry for a second what is refused: on Windows, virus scanners and indexers open new files for a moment."""
    for _ in range(ATTEMPTS - 1):
        try:
            action()
        except PermissionError:
            time.sleep(PAUSE_SECONDS)
        else:
            return
    action()


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir():
        _sync_folder(path)
        return
    # Windows flushes only what is open for writing.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


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
    # safetensors reports the system's errors as text. On Windows the number is one of Windows' own, which OSError
    # translates; elsewhere the fourth argument is ignored.
    found = re.search(r"os error (\d+)", str(error))
    number = OSError(int(found[1]), "", None, int(found[1])).errno if found else None
    return (number, os.strerror(number)) if number is not None else (None, str(error))
