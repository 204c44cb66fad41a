"""What a shell does with a job that reads keys: `python tests/job_control.py` ends well if the job behaves.

`WORLD_SIZE=2` makes it one of several processes, which Ctrl-Z must stop at once, whatever they wait for.

This process is the leader of a session of its own and has both ends of its terminal.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

READER = """
import signal, sys, time
from crepa_cli.report.keyboard import Keyboard

def say(text):
    sys.stdout.write(f"<{text}>")
    sys.stdout.flush()

def press(key):
    say(f"key {key}")
    if key == "x":
        pressed.append(key)

# A shell script starts its background jobs with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
pressed = []
with Keyboard(press, lambda visible: say(f"shown {visible}")):
    say("ready")
    while not pressed:
        time.sleep(0.02)
    if "fail" in sys.argv:
        raise ValueError("after x")
say("done")
"""
"""A command that says which keys it has read, until that is an x."""
PATIENCE = 20.0


class Shell:
    """The leader of a session, and its job."""

    def __init__(self) -> None:
        import fcntl
        import termios

        os.setsid()
        self.master, self.terminal = os.openpty()
        fcntl.ioctl(self.terminal, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        self.said = ""
        end = self.terminal
        self.job = subprocess.Popen(
            [sys.executable, "-c", READER], stdin=end, stdout=end, stderr=end, process_group=0, restore_signals=True
        )

    def front(self, group: int) -> None:
        """Put a group of processes into the foreground."""
        os.tcsetpgrp(self.terminal, group)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self.master, keys.encode())

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Read what the job says until a condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.said
            if select.select([self.master], [], [], 0.05)[0]:
                self.said += os.read(self.master, 1024).decode()

    def hear(self, text: str) -> None:
        """Wait until the job says something, and forget everything up to that."""
        self.wait_for(lambda: text in self.said)
        self.said = self.said.split(text, 1)[1]

    def stopped(self) -> bool:
        """Whether the job was stopped since the last call."""
        found, status = os.waitpid(self.job.pid, os.WNOHANG | os.WUNTRACED)
        return found != 0 and os.WIFSTOPPED(status)

    def by_lines(self) -> bool:
        """Whether the terminal waits for lines and echoes them, as a shell expects."""
        import termios

        flags = termios.tcgetattr(self.terminal)[3]
        return bool(flags & termios.ICANON) and bool(flags & termios.ECHO)

    def listen(self, seconds: float) -> None:
        """Let the job do something it should not."""
        end = time.monotonic() + seconds
        self.wait_for(lambda: time.monotonic() > end)


def main() -> None:
    """Start in the background, come to the front, be stopped and go on twice, and end."""
    import termios

    several = os.environ.get("WORLD_SIZE") == "2"
    shell = Shell()
    before = termios.tcgetattr(shell.terminal)
    shell.front(os.getpgrp())
    shell.hear("<ready>")
    shell.press("a\n")
    shell.listen(0.5)
    assert "<key" not in shell.said
    assert not shell.stopped()
    assert shell.by_lines()

    termios.tcflush(shell.terminal, termios.TCIFLUSH)
    shell.front(shell.job.pid)
    shell.hear("<shown True>")
    assert not shell.by_lines()
    shell.press("b")
    shell.hear("<key b>")

    for _ in range(2):
        shell.press("\x1a")
        if not several:
            shell.hear("<shown False>")
        shell.wait_for(shell.stopped)
        if several:
            assert "<shown False>" not in shell.said
            termios.tcsetattr(shell.terminal, termios.TCSANOW, before)
        assert shell.by_lines()
        shell.front(os.getpgrp())
        os.kill(shell.job.pid, signal.SIGCONT)  # bg
        shell.listen(0.5)
        assert not shell.stopped()
        assert shell.by_lines()
        assert "<shown True>" not in shell.said
        shell.front(shell.job.pid)  # fg
        shell.hear("<shown True>")
        shell.press("c")
        shell.hear("<key c>")

    shell.press("x")
    shell.hear("<done>")
    assert shell.by_lines()
    assert shell.job.wait(PATIENCE) == 0


if __name__ == "__main__":
    main()
