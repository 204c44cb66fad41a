"""The index of a cache tells what it was told, or nothing, whatever happens to its file."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crepa_cli.data.index import FileState, Index, Known

FILES = {f"/clips/{number:03}.mp4": Known(FileState(number, number**5), f"found {number} ä") for number in range(150)}
ODD = {os.fsdecode(b"/clips/\xff.mp4"): Known(FileState(2**40, -1), "")}


def filled(folder: Path) -> Index:
    index = Index(folder)
    index.put(FILES.items())
    return index


def test_what_was_put_is_found_in_the_order_asked_for_and_the_last_one_counts(tmp_path: Path) -> None:
    index = filled(tmp_path)
    index.put(ODD.items())
    name, other = "/clips/007.mp4", Known(FileState(1, 2), "new")
    index.put([(name, other)])
    names = [*ODD, name, "/clips/none.mp4", "/clips/003.mp4"]
    assert Index(tmp_path).find(names) == [*ODD.values(), other, None, FILES["/clips/003.mp4"]]


def test_without_a_folder_nothing_is_kept_and_nothing_is_made(tmp_path: Path) -> None:
    index = filled(tmp_path / "none")
    assert index.find(["/clips/001.mp4"]) == [None]
    assert not (tmp_path / "none").exists()
    (tmp_path / "index.sqlite").mkdir()
    assert filled(tmp_path).find(["/clips/001.mp4"]) == [None]


def foreign_database(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE files (name TEXT)")
    database.close()


SPOILED: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2 // 4096 * 4096),
    "text": lambda path: path.write_text("no database\n" * 1000),
    "another program's": foreign_database,
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_index_is_made_again(how: str, tmp_path: Path) -> None:
    SPOILED[how](filled(tmp_path).path)
    index = Index(tmp_path)
    found = index.find([*FILES])
    assert all(one in (None, FILES[name]) for name, one in zip(FILES, found, strict=True))
    assert None in found
    index.put((name, FILES[name]) for name, one in zip(FILES, found, strict=True) if one is None)
    fresh = Index(tmp_path)
    again = fresh.find([*FILES])
    fresh.put((name, FILES[name]) for name, one in zip(FILES, again, strict=True) if one is None)
    assert Index(tmp_path).find([*FILES]) == [*FILES.values()]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_flipped_bit_tells_anything_else(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = filled(Path(name)).path
        content = bytearray(path.read_bytes())
        places = st.integers(0, 400) | st.integers(0, len(content) - 1)
        for place in data.draw(st.sets(places, min_size=1, max_size=20), "places"):
            content[place] ^= data.draw(st.integers(1, 255), "bits")
        path.write_bytes(content)
        index = Index(Path(name))
        found = index.find([*FILES])
        assert all(one in (None, FILES[name]) for name, one in zip(FILES, found, strict=True))
        index.put(FILES.items())
        shutil.rmtree(name)


def test_an_index_that_is_locked_or_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crepa_cli.data.index.TIMEOUT_SECONDS", 0.05)
    index = filled(tmp_path)
    with sqlite3.connect(index.path) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert index.find(["/clips/001.mp4"]) == [None]
        index.put(ODD.items())
        other.rollback()
    other.close()
    assert index.find(["/clips/001.mp4", *ODD]) == [FILES["/clips/001.mp4"], None]


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\nfrom crepa_cli.data.index import *\n"
        "for n in range(30): Index(pathlib.Path(sys.argv[1])).put([(f'{sys.argv[2]}/{n}', Known(FileState(n, n), ''))])"
    )
    commands = [[sys.executable, "-c", script, str(tmp_path), name] for name in ("a", "b", "c")]
    started = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    names = [f"{writer}/{number}" for writer in "abc" for number in range(30)]
    assert None not in Index(tmp_path).find(names)
