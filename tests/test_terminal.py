"""`crepa train` in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crepa_cli.report.metrics import read_metrics

fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))

TRAIN = [sys.executable, "-m", "crepa_cli", "train", "--profile", "t2v", "--model", "wan", "--demo"]
SHORT = ["--set", "validation.every=0", "--set", "checkpoints.every=0", "--set", "train.batch_size=1"]
HOME, SHOW_CURSOR, HIDE_CURSOR = "\x1b[H", "\x1b[?25h", "\x1b[?25l"
ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"
OWN_TERMINAL = [
    *(sys.executable, "-c"),
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])",
]
"""Runs a command in the foreground of its standard input, as a shell does."""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command in a pseudo-terminal, with what it has written so far."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.master, slave = pty.openpty()
        self.resize(80, 24)
        environment = {name: value for name, value in os.environ.items() if name not in {"CI", "COLUMNS", "LINES"}}
        self.process = subprocess.Popen(
            [*OWN_TERMINAL, *command],
            cwd=folder,
            env=environment | {"TERM": "xterm-256color"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.written = ""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        data = bytearray()
        # A pseudo-terminal whose last writer is gone answers with an error.
        while chunk := self._chunk():
            data += chunk
            self.written = data.decode(errors="ignore")

    def _chunk(self) -> bytes:
        try:
            return os.read(self.master, 65536)
        except OSError:
            return b""

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.process.poll() is None, self.written[-4000:]
            time.sleep(0.05)

    def frames(self) -> list[list[str]]:
        """The screens so far, each as lines without colors."""
        live = self.written.split(ENTER)[-1].split(LEAVE)[0]
        return [CONTROL.sub("", frame).splitlines() for frame in live.split(HOME)[1:-1]]

    def wait(self) -> int:
        code = self.process.wait()
        self.reader.join()
        os.close(self.master)
        return code


@pytest.mark.slow
def test_the_dashboard_lives_through_a_resize_and_ctrl_c(demo: Path) -> None:
    run = demo / "runs" / "in-a-terminal"
    terminal = Terminal([*TRAIN, *SHORT, "--steps", "5000", "--output", str(run)], demo)
    terminal.wait_for(lambda: len([frame for frame in terminal.frames() if "losses" in "".join(frame)]) >= 2)
    before = len(terminal.frames())
    assert {len(line) for line in terminal.frames()[-1]} == {80}
    terminal.resize(120, 40)
    terminal.wait_for(lambda: len(terminal.frames()) >= before + 3)
    last = terminal.frames()[-1]
    assert len(last) == 40
    assert {len(line) for line in last} == {120}

    terminal.process.send_signal(signal.SIGINT)
    assert terminal.wait() == 130
    (checkpoint,) = (run / "checkpoints").iterdir()
    steps = json.loads((checkpoint / "state.json").read_text())["progress"]["step"]
    assert steps == len(read_metrics(run / "metrics.jsonl"))
    assert (run / "curves.svg").exists()
    assert terminal.written.count(HIDE_CURSOR) == terminal.written.count(SHOW_CURSOR)
    assert terminal.written.rfind(SHOW_CURSOR) > terminal.written.rfind(HIDE_CURSOR)
    left = CONTROL.sub("", terminal.written.split(LEAVE)[-1])
    assert "events" in left
    assert f"crepa train --resume --output {run}" in left


@pytest.mark.slow
def test_no_color_is_honored(demo: Path) -> None:
    command = ["env", "NO_COLOR=1", *TRAIN, *SHORT, "--steps", "2", "--output", "runs/colorless"]
    terminal = Terminal(command, demo)
    assert terminal.wait() == 0
    codes = {code for style in re.findall(r"\x1b\[([0-9;]*)m", terminal.written) for code in style.split(";")}
    assert not {code for code in codes if code[:1] in {"3", "4", "9"} and code not in {"3", "4", "9"}}
    assert 'pipeline.load_lora_weights("runs/colorless", weight_name="weights/' in terminal.written
