"""Keys in a pseudo-terminal: of the reader alone, and of `crepa train`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import job_control
import pytest
from conftest import CREPA
from test_terminal import LEAVE, SHORT, TRAIN, Terminal
from test_watch import STEPS, Written

from crepa_cli.report.keyboard import ESCAPE, ESCAPE_SECONDS, PAUSE_SECONDS
from crepa_cli.settings import resolve

termios = pytest.importorskip("termios")
READ = [sys.executable, "-c", job_control.READER]


class Typed(Terminal):
    """A terminal in which somebody types."""

    def type(self, *keys: str, pause: float = 4 * PAUSE_SECONDS) -> None:
        for key in keys:
            os.write(self.master, key.encode())
            time.sleep(pause)

    def by_lines(self) -> bool:
        """Whether the terminal waits for lines and echoes them."""
        flags = termios.tcgetattr(self.master)[3]
        return bool(flags & termios.ICANON) and bool(flags & termios.ECHO)


@pytest.fixture(name="reader")
def _reader(tmp_path: Path) -> Typed:
    terminal = Typed(READ, tmp_path)
    terminal.wait_for(lambda: "<ready>" in terminal.written and "<shown True>" in terminal.written)
    return terminal


def test_keys_count_if_they_come_alone(reader: Typed) -> None:
    assert not reader.by_lines()
    reader.type("q")
    # Pasted text, arrow keys, a key of the keypad, a click, an answer of the terminal, Alt and a letter.
    for burst in ("qq", "vim\n", "\x1b[A", "\x1bOq", "\x1b[Mqcv", "\x1b[?1;2c", "é", "\x1bq"):
        reader.type(burst, pause=(ESCAPE_SECONDS if ESCAPE in burst else 0) + 3 * PAUSE_SECONDS)
    # An arrow key over a slow connection.
    reader.type("\x1b", "[", "c", pause=2 * PAUSE_SECONDS)
    reader.type("", pause=ESCAPE_SECONDS)
    reader.type("c", "?", "x")
    assert reader.wait() == 0
    assert [part.split(">")[0] for part in reader.written.split("<key ")[1:]] == ["q", "c", "?", "x"]


@pytest.mark.parametrize("end", ["x", "fail", signal.SIGINT, signal.SIGTSTP])
def test_the_terminal_is_left_as_it_was(end: str | signal.Signals, tmp_path: Path) -> None:
    """A process that no shell controls is not stopped by Ctrl-Z."""
    terminal = Typed([*READ, str(end)], tmp_path)
    held = os.dup(terminal.master)
    before = termios.tcgetattr(held)
    terminal.wait_for(lambda: "<ready>" in terminal.written and "<shown True>" in terminal.written)
    assert termios.tcgetattr(held) != before
    if isinstance(end, signal.Signals):
        terminal.type({signal.SIGINT: "\x03", signal.SIGTSTP: "\x1a"}[end])
    if end == signal.SIGTSTP:
        terminal.wait_for(lambda: terminal.written.count("<shown True>") == 2)
    if end != signal.SIGINT:
        terminal.type("x")
    assert (terminal.wait() == 0) == (end in {"x", signal.SIGTSTP})
    assert termios.tcgetattr(held) == before
    os.close(held)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_shell_stops_a_job_and_starts_it_again_and_keys_in_the_background_are_not_its_own(processes: str) -> None:
    command = [sys.executable, job_control.__file__]
    environment = os.environ | {"WORLD_SIZE": processes}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_read_from_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-c", job_control.READER.replace("while not pressed:", "for _ in range(9):")]
    done = subprocess.run(command, cwd=tmp_path, input="x", capture_output=True, text=True, check=False)
    assert done.stdout == "<ready><done>"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_keys_of_a_training(processes: int, demo: Path, tmp_path: Path) -> None:
    """A word typed by mistake does nothing; the help, a checkpoint, a validation, and the end."""
    run = tmp_path / "run"
    validation = [word for one in ("every=4000", "steps=1", "frames=5") for word in ("--set", f"validation.{one}")]
    flags = [*validation, "--steps", "5000", "--output", str(run), "--processes", str(processes)]
    terminal = Typed([*TRAIN, *SHORT, *flags], demo)

    def screen() -> str:
        frames = terminal.frames()
        return "\n".join(frames[-1]) if frames else ""

    terminal.wait_for(lambda: "losses" in screen() and "? keys" in screen())
    terminal.type(*"vim quit")
    terminal.type("\x1b[A", "qqccvv", pause=2 * ESCAPE_SECONDS)
    terminal.type("?")
    terminal.wait_for(lambda: "c c  save a checkpoint" in screen())
    assert not list((run / "checkpoints").glob("*"))
    terminal.type("c")
    terminal.wait_for(lambda: "press c again" in screen())
    terminal.type("c")
    terminal.wait_for(lambda: "checkpoint saved" in screen())
    terminal.type("v", "v")
    terminal.wait_for(lambda: "sampled" in screen())
    (sampled,) = [path.name for path in (run / "samples").iterdir() if path.name != "step-000000"]
    terminal.type("q")
    terminal.wait_for(lambda: "press q again within 5 s to save a checkpoint and stop" in screen())
    terminal.type("q")
    assert terminal.wait() == 130
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    assert checkpoints[0] < sampled < checkpoints[1]
    assert f"crepa train --resume --output {run}" in terminal.written.split(LEAVE)[-1]


@pytest.mark.slow
def test_keys_of_a_view_from_elsewhere(tmp_path: Path) -> None:
    """Of a run that goes on: it is left at the first q, and nothing in its folder changes."""
    profile = resolve("t2v", {"model.family": "wan"}, [f"train.steps={STEPS}"], demo=True).profile
    written = Written(tmp_path / "run", profile)
    written.write(*written.session(0, 20))
    before = {path.name: path.read_bytes() for path in written.run.path.iterdir()}
    terminal = Typed([*CREPA, "watch", "run"], tmp_path)
    terminal.wait_for(lambda: "? keys" in terminal.written)
    terminal.type("+", "?")
    terminal.wait_for(lambda: "q    leave; the run goes on" in terminal.written)
    terminal.type("c", "c", "q")
    assert terminal.wait() == 0
    assert {path.name: path.read_bytes() for path in written.run.path.iterdir()} == before
