"""Files and folders appear whole, on systems and file systems that refuse what Linux allows."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest
import torch
import windows_rules
from safetensors.torch import load_file, save_file

from crepa_cli.data.cache import Cache
from crepa_cli.errors import UserError
from crepa_cli.files import remove_folder, remove_leftovers, whole_folder, write_whole


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules of Windows."""
    if not windows_rules.NEEDS.exists():
        pytest.skip("the rules of Windows are enforced on Linux alone")
    windows_rules.enforce(monkeypatch.setattr)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with a file."""
    folder = tmp_path / "old"
    folder.mkdir()
    save_file({"weight": torch.ones(4)}, folder / "model.safetensors")
    return folder


@pytest.mark.usefixtures("windows")
def test_the_rules_hold(old: Path, tmp_path: Path) -> None:
    """They are what the other tests rest on: each refuses what Windows refuses, and nothing else."""
    file = old / "model.safetensors"
    with pytest.raises(PermissionError):
        os.open(old, os.O_RDONLY)
    with file.open("rb") as reader, pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(reader.fileno())
    other = tmp_path / "other"
    other.touch()

    def assert_held() -> None:
        for refused in (file.unlink, lambda: old.rename(tmp_path / "new"), lambda: other.replace(file)):
            with pytest.raises(PermissionError):
                refused()

    with file.open("rb"):
        assert_held()
    mapped = load_file(file)
    assert_held()
    mapped.clear()
    with pytest.raises(PermissionError):
        other.rename(file)
    other.replace(file)
    old.rename(tmp_path / "new")
    with pytest.raises(ImportError):
        exec("import fcntl", {"__name__": "crepa_cli.anything"})


@pytest.mark.usefixtures("windows")
def test_folders_and_files_are_written_replaced_and_deleted_under_the_rules_of_windows(old: Path) -> None:
    for content in (b"first", b"second"):
        with whole_folder(old, 6) as partial:
            (partial / "inner").mkdir()
            (partial / "inner/file").write_bytes(content)
        write_whole(old / "inner/file", content + b" again")
    assert [path.read_bytes() for path in old.rglob("*") if path.is_file()] == [b"second again"]
    remove_folder(old)
    assert not list(old.parent.iterdir())


@pytest.mark.usefixtures("windows")
def test_what_a_virus_scanner_holds_for_a_moment_is_replaced_and_deleted(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scanner lets go while the program waits."""
    file = old / "model.safetensors"
    held = file.open("rb")
    monkeypatch.setattr(time, "sleep", lambda _seconds: held.close())
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    held = file.open("rb")
    remove_folder(old)
    assert not list(old.parent.iterdir())


@pytest.mark.usefixtures("windows")
def test_what_another_program_keeps_open_is_named_and_stays(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    file = old / "model.safetensors"
    before = file.read_bytes()
    (old.parent / "half.partial").mkdir()
    with file.open("rb"):
        with pytest.raises(UserError, match=r"model\.safetensors cannot be written: Permission denied"):
            write_whole(file, b"new")
        with pytest.raises(UserError, match="old cannot be written: Permission denied"), whole_folder(old, 1):
            pass
        remove_leftovers(old.parent)
    assert file.read_bytes() == before
    assert list(old.parent.iterdir()) == [old]
    assert 0.5 < sum(pauses) < 3


@pytest.mark.usefixtures("windows")
def test_what_was_read_from_a_cache_holds_no_file(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write("latents", "ab", {"latents": torch.ones(3)})
    assert not cache.has("latents", "other")
    read = cache.read("latents", "ab")
    cache.write("latents", "ab", {"latents": torch.zeros(3)})
    cache.path("latents", "ab").unlink()
    assert read["latents"].tolist() == [1, 1, 1]


def refuse_folders(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A file system that syncs files and answers `code` for folders."""
    fsync = os.fsync

    def limited(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", limited)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM])
def test_a_folder_that_cannot_be_synced_is_written(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_folders(monkeypatch, code)
    with whole_folder(tmp_path / "new", 3) as partial:
        (partial / "file").write_bytes(b"abc")
    assert (tmp_path / "new/file").read_bytes() == b"abc"


def test_a_disk_that_fails_while_a_folder_is_synced_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_folders(monkeypatch, errno.EIO)
    with (
        pytest.raises(UserError, match="new cannot be written: Input/output error"),
        whole_folder(tmp_path / "new", 3) as partial,
    ):
        (partial / "file").write_bytes(b"abc")
    assert not list(tmp_path.iterdir())
