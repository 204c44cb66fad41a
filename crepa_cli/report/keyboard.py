"""Keys that are pressed in a terminal, read in a thread beside the work."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

POLL_SECONDS = 0.1
"""The longest time until the thread notices that it is to end, or that the process is in the foreground again."""
PAUSE_SECONDS = 0.05
"""Characters that follow each other sooner were not typed one by one."""
ESCAPE_SECONDS = 0.5
"""How long the rest of an escape sequence may take over a slow connection."""
ESCAPE = "\x1b"


class Keyboard:
    """Calls `press` with every key; use it as a context manager, in the main thread.

    A key counts if it comes alone: characters that come at once were pasted, or are the sequence of an arrow key or the
    mouse. Ctrl-C and Ctrl-Z stay signals. On POSIX the terminal does not wait for lines and does not echo while this
    process is in the foreground, and is as it was before whenever the process is stopped or done; after Ctrl-Z in a run
    of several processes the shell has to see to that, as shells do. Nothing is read in the background, where the
    terminal would stop the process. Without a terminal as standard input there are no keys.

    Args:
        press: called in a thread.
        show: called with False before Ctrl-Z stops the process, in a signal handler, and with True whenever the process
            is in the foreground.
    """

    def __init__(self, press: Callable[[str], None], show: Callable[[bool], None]) -> None:
        self.press = press
        self.show = show
        self.reads = sys.stdin is not None and sys.stdin.isatty()
        self.closed = threading.Event()
        self.suspending = False
        self.before: list[Any] | None = None
        """The attributes of the terminal that are put back."""
        self.handler: Any = None
        self.thread = threading.Thread(target=self._listen, name="crepa-keyboard", daemon=True)

    def __enter__(self) -> Keyboard:
        """Begin to read."""
        if self.reads:
            self._handle_suspension()
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Read no more, and leave the terminal as it was."""
        self.closed.set()
        try:
            if self.thread.is_alive():
                self.thread.join()
        finally:
            self._give_back()
            if sys.platform != "win32" and self.handler is not None:
                signal.signal(signal.SIGTSTP, self.handler)

    @property
    def reading(self) -> bool:
        """Whether keys are read now: not in the background."""
        return self.thread.is_alive() and (sys.platform == "win32" or self.before is not None)

    def _listen(self) -> None:
        if sys.platform != "win32":
            # A read that comes too late, in the background, then fails and does not stop the process.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTIN, signal.SIGTTOU})
        while not self.closed.is_set():
            if key := self._key():
                self.press(key)

    def _key(self) -> str:
        """A character that came alone; empty for anything else, and if none came for a while."""
        found = self._read(POLL_SECONDS)
        while more := self._read(ESCAPE_SECONDS if ESCAPE in found else PAUSE_SECONDS) if found else "":
            found += more
        return found if len(found) == 1 else ""

    def _read(self, seconds: float) -> str:
        """The characters that are there or come within some seconds; empty if none do."""
        if sys.platform == "win32":
            import msvcrt

            deadline = time.monotonic() + seconds
            while not msvcrt.kbhit():
                if time.monotonic() > deadline:
                    return ""
                time.sleep(PAUSE_SECONDS / 5)
            return msvcrt.getwch()
        else:  # noqa: RET505  # mypy takes what follows to be unreachable
            if not self._take():
                self.closed.wait(seconds)
                return ""
            if not select.select([sys.stdin], [], [], seconds)[0]:
                return ""
            data = b""
            # It fails in the background, and if the terminal is gone.
            with suppress(OSError):
                data = os.read(sys.stdin.fileno(), 1024)
            if not data:
                self.closed.wait(seconds)
            return data.decode("latin-1")

    def _take(self) -> bool:
        """Let the terminal hand over every key at once; False while this process may not read."""
        if sys.platform != "win32":
            import termios
            import tty

            if self.suspending or not self._in_foreground():
                return False
            try:
                attributes = termios.tcgetattr(sys.stdin)
                # A shell that had the terminal meanwhile has changed it.
                if attributes[3] & termios.ICANON:
                    self.before = attributes
                    tty.setcbreak(sys.stdin, termios.TCSANOW)
                    self.show(True)
            except termios.error:  # the terminal is gone
                return False
        return True

    def _give_back(self) -> None:
        if sys.platform != "win32" and self.before is not None:
            import termios

            if self._in_foreground():
                termios.tcsetattr(sys.stdin, termios.TCSANOW, self.before)
            self.before = None

    def _in_foreground(self) -> bool:
        if sys.platform != "win32":
            with suppress(OSError):  # a terminal of another session
                return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
        return False

    def _handle_suspension(self) -> None:
        # A process that waits for others, which have stopped, runs no handler: it would stop after they go on.
        if os.environ.get("WORLD_SIZE", "1") != "1":
            return
        if sys.platform != "win32" and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            self.handler = signal.signal(signal.SIGTSTP, self._suspend)

    def _suspend(self, _number: int, _frame: object) -> None:
        """Stop the process, as Ctrl-Z does by itself, with the terminal as it was before."""
        if sys.platform != "win32":
            self.suspending = True
            self._give_back()
            self.show(False)
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, self._suspend)
            self.suspending = False
