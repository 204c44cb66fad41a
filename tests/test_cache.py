"""Cache entries are complete or absent, whatever happens to processes, disks and files."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from crepa_cli.data.cache import Cache, cache_key
from crepa_cli.errors import UserError
from crepa_cli.files import write_whole

KEY = cache_key(clip="abc", frames=17)
TENSORS = {
    "latents": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "half": torch.tensor([0.5, -1.25], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_written_is_read_in_plain_safetensors(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert not cache.has("latents", KEY)
    cache.write("latents", KEY, TENSORS)
    assert cache.has("latents", KEY)
    assert not cache.has("features", KEY)
    assert same(cache.read("latents", KEY), TENSORS)
    assert files(tmp_path) == [tmp_path / "cache" / "latents" / KEY[:2] / f"{KEY}.safetensors"]
    with safe_open(cache.path("latents", KEY), framework="pt") as file:
        assert file.metadata()["key"] == KEY


def test_tensors_of_any_layout_can_be_stored_and_changing_what_was_read_changes_no_file(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    parameter = torch.nn.Parameter(torch.randn(3, 5))
    cache.write("features", KEY, {"turned": parameter.T, "first": parameter[0], "second": parameter[1]})
    read = cache.read("features", KEY)
    assert torch.equal(read["turned"], parameter.T)
    read["turned"].zero_()
    assert cache.has("features", KEY)


def test_a_key_depends_on_every_value_and_on_nothing_else() -> None:
    assert cache_key(a=1, b=["x", None]) == cache_key(b=("x", None), a=1)
    variants: list[dict[str, object]]
    variants = [{}, {"a": 1}, {"a": 2}, {"a": "1"}, {"a": 1.5}, {"a": [1]}, {"a": {"b": 1}}, {"b": 1}, {"a": "\ud800"}]
    assert len({cache_key(**parts) for parts in variants}) == len(variants)
    with pytest.raises(ValueError, match="JSON"):
        cache_key(a=float("nan"))
    with pytest.raises(TypeError):
        cache_key(a=Path("x"))


def test_a_damaged_entry_is_reported_counts_as_absent_and_is_healed(tmp_path: Path) -> None:
    reports: list[tuple[Path, str]] = []
    cache = Cache(tmp_path, lambda path, reason: reports.append((path, reason)))
    cache.write("latents", KEY, TENSORS)
    path = cache.path("latents", KEY)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not cache.has("latents", KEY)
    assert reports == [(path, "its content does not match its checksum")]
    cache.write("latents", KEY, TENSORS)
    assert cache.has("latents", KEY)
    assert len(reports) == 1


def test_an_entry_under_another_key_is_not_taken(tmp_path: Path) -> None:
    reports: list[str] = []
    cache = Cache(tmp_path, lambda _, reason: reports.append(reason))
    cache.write("latents", KEY, TENSORS)
    other = cache_key(clip="other")
    cache.path("latents", other).parent.mkdir(parents=True)
    cache.path("latents", KEY).rename(cache.path("latents", other))
    assert not cache.has("latents", other)
    assert reports == ["contains another entry"]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_flipped_bit_or_truncation_goes_unnoticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        cache = Cache(Path(name))
        cache.write("latents", KEY, TENSORS)
        path = cache.path("latents", KEY)
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans(), "truncate"):
            content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
        else:
            for bit in data.draw(st.sets(st.integers(0, len(content) * 8 - 1), min_size=1, max_size=4), "bits"):
                content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert not cache.has("latents", KEY) or same(cache.read("latents", KEY), TENSORS)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "C64", "F99"])
def test_an_entry_with_a_foreign_type_is_damaged(tmp_path: Path, dtype: str) -> None:
    cache = Cache(tmp_path)
    header = {"__metadata__": {"key": KEY}, "x": {"dtype": dtype, "shape": [8], "data_offsets": [0, 64]}}
    text = json.dumps(header).encode()
    write_whole(cache.path("latents", KEY), len(text).to_bytes(8, "little") + text + bytes(64))
    assert not cache.has("latents", KEY)


def test_reading_what_is_gone_is_an_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Run the command again"):
        Cache(tmp_path).read("latents", KEY)


def test_writers_of_the_same_entry_neither_wait_nor_disturb_readers(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write("latents", KEY, TENSORS)
    seen: list[bool] = []

    def write() -> None:
        for _ in range(20):
            Cache(tmp_path).write("latents", KEY, TENSORS)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        seen.append(cache.has("latents", KEY) and same(cache.read("latents", KEY), TENSORS))
    assert all(seen)
    assert len(files(tmp_path)) == 1


def test_a_killed_writer_leaves_no_entry_and_its_leftovers_are_removed_after_a_day(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib, crepa_cli.files as files\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_whole(pathlib.Path(sys.argv[1]), b'x' * 1000)"
    )
    cache = Cache(tmp_path)
    path = cache.path("latents", KEY)
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9
    assert not cache.has("latents", KEY)
    (leftover,) = files(tmp_path)
    cache.remove_leftovers()
    assert files(tmp_path) == [leftover]  # it may belong to a run that is at work
    os.utime(leftover, (time.time() - 25 * 3600,) * 2)
    cache.write("latents", KEY, TENSORS)
    cache.remove_leftovers()
    assert files(tmp_path) == [path]


def test_removing_leftovers_of_a_store_that_does_not_exist_does_nothing(tmp_path: Path) -> None:
    Cache(tmp_path / "gone").remove_leftovers()
    assert files(tmp_path) == []


def test_a_file_that_is_too_large_leaves_nothing_and_the_message_has_the_sizes(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write("latents", KEY, TENSORS)
    with file_size_limit(100_000), pytest.raises(UserError) as caught:
        cache.write("latents", KEY, {"x": torch.zeros(1_000_000)})
    assert "needs 4,000," in str(caught.value)
    assert f"bytes are free in {cache.path('latents', KEY).parent}" in str(caught.value)
    assert same(cache.read("latents", KEY), TENSORS)
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("step", ["mkdir", "fsync"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*{"mkdir": (Path, "mkdir", full), "fsync": (os, "fsync", full)}[step])
    with pytest.raises(UserError, match=r"No space left on device. It needs 3 bytes; [\d,]+ bytes are free in"):
        write_whole(tmp_path / "new" / "file" if step == "mkdir" else tmp_path / "file", b"abc")
    monkeypatch.undo()
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_an_error_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written: (Not a directory|File exists)"):
        Cache(tmp_path / "file").write("latents", KEY, TENSORS)
    assert not Cache(tmp_path / "file").has("latents", KEY)
