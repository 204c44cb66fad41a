"""Rules of Windows, enforced on Linux: `python tests/windows_rules.py train --demo` runs crepa under them.

- There are no modules of POSIX; the peak of memory comes from psutil.
- A folder cannot be opened, and what is open for reading alone cannot be synced.
- A file that is open or memory-mapped cannot be replaced, renamed or deleted, nor can a folder that holds one.
- Renaming replaces no file, and nothing replaces a folder.

`NEEDS` says what enforcing them takes.
"""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

POSIX_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
NEEDS = Path("/proc/self/maps")
"""Linux lists here which files are mapped."""
Call = Callable[..., Any]


def enforce(put: Call = setattr) -> None:
    """Replace functions of Python by ones that follow the rules, with `put(object, name, function)`."""
    put(builtins, "__import__", _without_posix_modules(builtins.__import__))
    put(psutil.Process, "memory_info", _memory_of_windows)
    # On Linux rmtree opens the folders that it deletes.
    put(shutil, "_use_fd_functions", False)
    put(os, "open", _refusing_folders(os.open))
    put(os, "fsync", _refusing_readers(os.fsync))
    put(os, "replace", _refusing_held(_refusing_targets(os.replace, os.path.isdir)))
    put(os, "rename", _refusing_held(_refusing_targets(os.rename, os.path.exists)))
    for name in ("remove", "unlink", "rmdir"):
        put(os, name, _refusing_held(getattr(os, name)))


def _without_posix_modules(import_: Call) -> Call:
    """Our modules find none; other libraries have their own ways on Windows."""

    def limited(name: str, globals: dict[str, Any] | None = None, *rest: Any, **options: Any) -> Any:  # noqa: A002
        if name.partition(".")[0] in POSIX_MODULES and (globals or {}).get("__name__", "").startswith("crepa_cli"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_(name, globals, *rest, **options)

    return limited


def _memory_of_windows(_process: psutil.Process) -> SimpleNamespace:
    import resource

    return SimpleNamespace(peak_wset=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _refusing_folders(open_: Call) -> Call:
    def limited(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise _refusal(path)
        return int(open_(path, *arguments, **options))

    return limited


def _refusing_readers(fsync: Call) -> Call:
    import fcntl

    def limited(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fsync(descriptor)

    return limited


def _refusing_targets(move: Call, refused: Callable[[Any], bool]) -> Call:
    def limited(source: Any, target: Any, **options: Any) -> None:
        if refused(target):
            raise _refusal(target)
        move(source, target, **options)

    return limited


def _refusing_held(action: Call) -> Call:
    """`action` on one or two paths."""

    def limited(*paths: Any, **options: Any) -> None:
        for path in paths:
            if is_held(Path(path)):
                raise _refusal(path)
        action(*paths, **options)

    return limited


def is_held(path: Path) -> bool:
    """Whether this process has a file open or mapped, or one inside a folder."""
    place = path.parent.resolve() / path.name
    return any(place == held or place in held.parents for held in _held_files())


def _held_files() -> set[Path]:
    held = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # another thread has closed it
            held.add(descriptor.readlink())
    lines = NEEDS.read_text().splitlines()
    return held | {Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line}


def _refusal(path: Any) -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))


if __name__ == "__main__":
    enforce()
    from crepa_cli.cli import main

    sys.argv[0] = "crepa"
    main()
