"""Signals that ask a run to stop: Ctrl-C, a terminated job, a closed terminal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""Those that this system lacks are left out. Windows sends SIGBREAK for Ctrl-Break and a closed console."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work in good order.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """The signals received so far.

    Attributes:
        received: their numbers, first to last.
        at_once: whether the first one interrupts what is running, as is right while there is nothing to save.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.at_once = True

    def handle(self, number: int, _frame: object) -> None:
        """Record a signal; a second Ctrl-C ends the process without saving."""
        # A launcher answers Ctrl-C with SIGTERM to processes that got the Ctrl-C too.
        if number == signal.SIGINT in self.received:
            sys.exit(128 + number)
        self.received.append(number)
        if self.at_once and len(self.received) == 1:
            raise Stopped(number)

    def raise_first(self) -> None:
        """Raise `Stopped` if there was a signal."""
        if self.received:
            raise Stopped(self.received[0])


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Within this context signals are recorded instead of ending the process; only the main thread can do so."""
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    previous = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
