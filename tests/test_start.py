"""Starting a run and resuming one: what is refused, what stays on disk, what is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import RunCrepa

DEMO = ["train", "--profile", "t2v", "--model", "wan", "--demo", "--plain"]


@pytest.fixture
def finished(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a run that is finished."""
    (tmp_path / "crepa-demo").symlink_to(demo / "crepa-demo")
    shutil.copytree(demo / "runs/wan-t2v-1", tmp_path / "runs/wan-t2v-1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_start_that_fails_leaves_no_run_and_resume_says_which_it_picks_and_that_it_is_finished(
    finished: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = finished / "clips"
    clips.mkdir()
    (clips / "one.mp4").write_bytes(b"no video")
    (clips / "one.txt").write_text("a disc")
    assert run_crepa(*DEMO, "--data", clips) == 2
    assert "no usable clips" in capsys.readouterr().err
    assert [run.name for run in (finished / "runs").iterdir()] == ["wan-t2v-1"]

    assert run_crepa("train", "--resume") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "resuming runs/wan-t2v-1, the run in runs/ that was written to last"
    assert any("is finished: it has trained 60 steps, and train.steps is 60" in line for line in said)
    assert "Load them with:" in said
