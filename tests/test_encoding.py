"""Output is printed whatever the encoding of a stream takes; Windows writes files in cp1252 or cp437."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOWN = {
    "cp1252": "caf\xe9 \\u043a\\u043b\\u0438\\u043f -> ##",
    "cp437": "caf\xe9 \\u043a\\u043b\\u0438\\u043f -> █▌",
    "ascii": r"caf\xe9 \u043a\u043b\u0438\u043f -> ##",
    "utf-8": "caf\xe9 клип → █▌",
}


@pytest.mark.parametrize("encoding", SHOWN)
def test_what_an_encoding_lacks_is_spelled_in_others(encoding: str, tmp_path: Path) -> None:
    """A message with names of the user's, in a terminal's stead a pipe."""
    command = [sys.executable, "-m", "crepa_cli", "init", "--profile", "caf\xe9 клип → █▌"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
    message = done.stderr.decode(encoding)
    assert done.returncode == 2, message
    assert SHOWN[encoding] in message


@pytest.mark.parametrize("encoding", ["cp1252", "cp437"])
def test_help_is_printed(encoding: str) -> None:
    command = [sys.executable, "-m", "crepa_cli", "train", "--help"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, encoding=encoding, check=True
    )
    assert "--checkpoint" in done.stdout
    assert "\\u" not in done.stdout
