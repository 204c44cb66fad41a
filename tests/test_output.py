"""Folders and streams that cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import CREPA, RunCrepa

from crepa_cli.data.cache import check_writable
from crepa_cli.demo import FOLDER
from crepa_cli.errors import UserError
from crepa_cli.report.metrics import read_metrics

NOBODY_WRITES = Path("/proc/self")
"""Not even root can make a file here."""
needs_proc = pytest.mark.skipif(not NOBODY_WRITES.is_dir(), reason="root can make files in every folder")
needs_bash = pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="has no bash")
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")


@needs_proc
def test_clips_that_nobody_can_write_next_to_are_refused_with_the_setting_to_use() -> None:
    with pytest.raises(UserError, match=r"/proc/self cannot be written .* --set data\.cache=\S+/\.cache/crepa/self$"):
        check_writable(NOBODY_WRITES / ".crepa-cache", NOBODY_WRITES)


@needs_proc
def test_a_cache_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.cache = /proc/self/cache: /proc/self cannot be written"):
        check_writable(NOBODY_WRITES / "cache", tmp_path)


def test_the_check_of_a_cache_that_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "new/cache", tmp_path)
    assert not list(tmp_path.iterdir())


@needs_proc
@pytest.mark.parametrize("command", [["train", "--plain"], pytest.param(["doctor"], marks=pytest.mark.slow)])
def test_commands_refuse_before_they_scan(
    command: list[str],
    demo: Path,
    run_crepa: RunCrepa,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(demo)
    flags = ["--profile", "t2v", "--model", "wan", "--demo", "--set", "data.cache=/proc/self/cache"]
    assert run_crepa(*command, *flags, *(["--set", "train.output=out"] if command[0] == "train" else [])) == 2
    printed = capsys.readouterr()
    assert "/proc/self cannot be written" in " ".join((printed.out + printed.err).split())
    assert "scanning" not in printed.out


def test_a_demo_that_cannot_be_written_names_the_folder(
    tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / FOLDER).write_text("in the way")
    assert run_crepa("train", "--profile", "t2v", "--model", "wan", "--demo") == 2
    assert "the files of the demo cannot be written to" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@needs_bash
@pytest.mark.parametrize(
    "output",
    [
        "| head -1",
        pytest.param("> /dev/full", marks=needs_full),
        ">&-",
    ],
)
def test_a_training_outlives_its_standard_output(output: str, demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = f"{' '.join(CREPA)} train --profile t2v --model wan --demo --plain --steps 3 --output {run}"
    command += f" --set validation.every=0 --set report.every=1 --set train.batch_size=1 {output}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=demo, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert len(read_metrics(run / "metrics.jsonl")) == 3
