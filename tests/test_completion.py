"""Shell completion, without heavy imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crepa_cli.cli.completion import json_files, settings

COMPLETE = (
    "import sys\n"
    "from crepa_cli.cli import app\n"
    "try:\n    app(prog_name='crepa')\n"
    "finally:\n    assert 'torch' not in sys.modules\n"
)


def completed(shell: str, words: str) -> list[str]:
    """The completions that a shell receives for the last word."""
    environment = {
        "_CREPA_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE], env=os.environ | environment, capture_output=True, text=True
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("command", ["train", "init", "doctor"])
def test_families_and_presets_are_completed(shell: str, command: str) -> None:
    families = " ".join(completed(shell, f"crepa {command} --model "))
    assert all(name in families for name in ("wan", "ltxvideo", "sanavideo", "kandinsky5_video", "ltx2"))
    presets = " ".join(completed(shell, f"crepa {command} --profile "))
    assert all(name in presets for name in ("t2v", "i2v", "solid-background"))


def test_what_is_typed_narrows_the_names() -> None:
    assert completed("bash", "crepa train --model w") == ["wan"]
    assert completed("bash", "crepa train --profile sol") == ["solid-background"]


@pytest.mark.parametrize("command", ["train", "init", "doctor", "probe-blocks wan"])
def test_tasks_are_completed(command: str) -> None:
    assert completed("bash", f"crepa {command} --task ") == ["t2v", "i2v"]


def test_settings_and_their_values_are_completed() -> None:
    assert completed("bash", "crepa train --set crepa.encoder_i") == ["crepa.encoder_image_size="]
    assert settings("crepa.scheduler=c") == ["crepa.scheduler=constant", "crepa.scheduler=cosine"]
    assert settings("crepa.enabled=") == ["crepa.enabled=true", "crepa.enabled=false"]
    assert settings("crepa.lambda=") == settings("crepa.nothing=") == []


def test_json_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("configs/wan.json", "config.json", "clip.mp4"):
        (tmp_path / name).touch()
    assert completed("bash", "crepa init --to co") == ["config.json", "configs/"]
    assert json_files("configs/") == ["configs/wan.json"]
    assert json_files("nowhere/") == []
