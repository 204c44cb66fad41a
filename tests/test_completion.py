"""Shell completion, without heavy imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
    assert all(name in families for name in ("wan", "ltxvideo", "sanavideo", "kandinsky5_video"))
    presets = " ".join(completed(shell, f"crepa {command} --profile "))
    assert all(name in presets for name in ("t2v", "i2v", "solid-background"))


def test_what_is_typed_narrows_the_names() -> None:
    assert completed("bash", "crepa train --model w") == ["wan"]
    assert completed("bash", "crepa train --profile sol") == ["solid-background"]
