"""The index of a cache: what is known of files that were read before, so that a start need not read them again.

It is only a memory. An index that is deleted, damaged, of another program or cannot be written costs time, never a run.
"""

from __future__ import annotations

import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

INDEX_NAME = "index.sqlite"
# Of this program and this layout: an index with another number is made again.
LAYOUT = 0x43520001
TIMEOUT_SECONDS = 5
OUT_OF_REACH = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOLFS),
    *(sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL),
}
UNSETTLED_NS = 2 * 10**9
"""File systems count time in steps of up to 2 s: within one, a file may change twice and look as it did before."""


class FileState(NamedTuple):
    """The state of a file, which changes with its content: its size in bytes, and the time of change in nanoseconds."""

    size: int
    changed: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileState:
        """The state that a file has according to the system."""
        return cls(stat.st_size, stat.st_mtime_ns)


class Known(NamedTuple):
    """The row of a file in the index: the state in which it was read, and what was found."""

    state: FileState
    content: str


class Index:
    """A table of files with what was found in them, in one SQLite file in the folder of the cache.

    Every call opens and closes it, so that processes wait for each other for a moment at most. Main processes write.

    Args:
        folder: of the cache. Without the folder nothing is known, and nothing is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / INDEX_NAME
        self._damaged = False

    def find(self, names: Sequence[str]) -> list[Known | None]:
        """The row of each of some files; None for those that are not known."""
        found: list[Known | None] = []
        if self.path.is_file():
            try:
                with self._opened() as database:
                    found.extend(_find(database, name) for name in names)
            except sqlite3.Error as error:
                self._damaged = not _out_of_reach(error)
        return found + [None] * (len(names) - len(found))

    def put(self, files: Iterable[tuple[str, Known]]) -> None:
        """Keep what was found in some files, in one transaction; a damaged index is made again."""
        rows = [(os.fsencode(name), *state, text, _checksum(name, state, text)) for name, (state, text) in files]
        if not rows or not self.path.parent.is_dir():
            return
        with suppress(sqlite3.Error, OSError):
            if not self._damaged:
                try:
                    self._write(rows)
                except sqlite3.Error as error:
                    if _out_of_reach(error):
                        return
                else:
                    return
            # A journal that stays behind would be applied to the next index.
            for path in (self.path.with_name(f"{INDEX_NAME}-journal"), self.path):
                path.unlink(missing_ok=True)
            self._damaged = False
            self._write(rows)

    def _write(self, rows: Sequence[tuple[object, ...]]) -> None:
        with self._opened() as database, database:
            database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection to the index, which is made if it is empty.

        Raises:
            sqlite3.Error: if it cannot be read, or is of another layout or program.
        """
        with closing(sqlite3.connect(self.path, timeout=TIMEOUT_SECONDS)) as database:
            if _layout(database) != LAYOUT:
                _make(database)
            yield database


def settled(state: FileState, started: int) -> bool:
    """Whether a file that was read from `started` on, in nanoseconds since 1970, cannot have changed unnoticed."""
    return state.changed + UNSETTLED_NS < started


def now() -> int:
    """Nanoseconds since 1970."""
    return time.time_ns()


def _out_of_reach(error: sqlite3.Error) -> bool:
    """Whether an index cannot be used now, though it may be whole: it is locked, or nothing can be written here."""
    # The low byte is the kind; errors that Python itself raises have no number.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in OUT_OF_REACH


def _layout(database: sqlite3.Connection) -> int:
    (layout,) = database.execute("PRAGMA user_version").fetchone()
    return int(layout)


def _make(database: sqlite3.Connection) -> None:
    """Make the table of an empty index, in one transaction: a table without its layout would look foreign to others.

    Raises:
        sqlite3.Error: if it is not empty, or cannot be written.
    """
    database.execute("BEGIN IMMEDIATE")
    with database:
        if (layout := _layout(database)) == LAYOUT:
            return  # another process was faster
        if layout or database.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise sqlite3.DatabaseError("of another layout or program")
        database.execute(
            "CREATE TABLE files (name BLOB PRIMARY KEY, size INTEGER, changed INTEGER, content TEXT, "
            "checksum INTEGER) WITHOUT ROWID"
        )
        database.execute(f"PRAGMA user_version = {LAYOUT}")


def _find(database: sqlite3.Connection, name: str) -> Known | None:
    key = os.fsencode(name)
    row = database.execute("SELECT size, changed, content, checksum FROM files WHERE name = ?", (key,)).fetchone()
    if row is None:
        return None
    size, changed, content, checksum = row
    state = FileState(size, changed)
    # A damaged page need not look damaged to SQLite.
    return Known(state, content) if checksum == _checksum(name, state, content) else None


def _checksum(name: str, state: FileState, content: str) -> int:
    return zlib.crc32(f"{name}\n{state.size}\n{state.changed}\n{content}".encode(errors="surrogateescape"))
