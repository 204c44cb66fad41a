"""Signals that ask a run to stop: Ctrl-C, a terminated job, a closed terminal."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from crepa_cli.libraries import silence_libraries

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""Those that this system lacks are left out. SIGBREAK is the Ctrl-Break of Windows."""
CLOSE_EVENT = 2
"""The number that Windows gives the closing of a console window."""
LONGEST_GRACE_SECONDS = 30
"""Windows itself ends a process some 5 seconds after its console was closed."""


_acknowledgements: list[Callable[[], None]] = []


@contextmanager
def acknowledged(acknowledge: Callable[[], None]) -> Iterator[None]:
    """Within this context `acknowledge` is called as soon as a signal asks for a stop that has something to save.

    It runs inside the signal handler, so it may set a flag and no more: a lock may be held already.
    """
    _acknowledgements.append(acknowledge)
    try:
        yield
    finally:
        _acknowledgements.remove(acknowledge)


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
        for acknowledge in _acknowledgements:
            acknowledge()

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
    with handled(signals.handle), _closed_console():
        yield signals


@contextmanager
def handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle the signals that ask for a stop; a SIGHUP that `nohup` made the process ignore stays ignored."""
    numbers = {getattr(signal, name) for name in NAMES if hasattr(signal, name)}
    ignored = {number for number in numbers if signal.getsignal(number) is signal.SIG_IGN} - {signal.SIGINT}
    previous = {number: signal.signal(number, handler) for number in numbers - ignored}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    """Ignore Ctrl-C within this context, and for good in processes that begin in it; only the main thread can do so."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    """Do what Ctrl-C does in a terminal: interrupt every process of this one's group; on Windows this one alone."""
    if sys.platform == "win32":
        _thread.interrupt_main()
    else:
        os.killpg(os.getpgrp(), signal.SIGINT)


def begin_worker() -> None:
    """Leave Ctrl-C to the process that this one works for, on Windows too, and keep libraries quiet."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence_libraries()


@contextmanager
def _closed_console() -> Iterator[None]:
    """Count a closed console window of Windows as Ctrl-Break.

    Windows ends the process as soon as the handler, which runs in a thread of its own, returns.
    """
    if sys.platform == "win32":
        import ctypes
        from ctypes import wintypes

        def close(event: int) -> bool:
            if event != CLOSE_EVENT:
                return False
            _thread.interrupt_main(signal.SIGBREAK)
            time.sleep(LONGEST_GRACE_SECONDS)
            return True

        handler = ctypes.WINFUNCTYPE(wintypes.BOOL, wintypes.DWORD)(close)
        set_handler = ctypes.windll.kernel32.SetConsoleCtrlHandler
        set_handler(handler, True)
        try:
            yield
        finally:
            set_handler(handler, False)
    else:
        yield
