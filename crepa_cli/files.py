"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path

from crepa_cli.errors import UserError

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


def _write_failure(path: Path, size: int, error: OSError) -> str:
    if error.errno not in NO_ROOM:
        return f"{path} cannot be written: {error.strerror}."
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    return (
        f"{path} cannot be written: {error.strerror}. This file needs {size:,} bytes; {free:,} bytes are free "
        f"in {folder}. Make room there or choose a folder on a larger disk, then start again."
    )
