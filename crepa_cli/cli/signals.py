"""Requests to stop: Ctrl-C, SIGTERM, a closed terminal, and their counterparts on Windows."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
"""The signals that ask for a stop on this system. SIGBREAK is the Ctrl-Break of Windows."""
CLOSE_EVENT = 2
"""What Windows calls a closed console window."""
LONGEST_GRACE_SECONDS = 30
"""Windows itself waits about 5 seconds before it ends a process whose console was closed."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The numbers of the signals received so far, in a list that grows; a second Ctrl-C ends the process at once.

    Outside the main thread, where Python allows no signal handlers, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def request(number: int, _frame: object) -> None:
        # A launcher answers Ctrl-C with SIGTERM to processes that have had the Ctrl-C already.
        if number == signal.SIGINT in received:
            sys.exit(128 + number)
        received.append(number)

    with handled(request), _closed_console(received):
        yield received


@contextmanager
def handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle the signals that ask for a stop; a SIGHUP that `nohup` made the process ignore stays ignored."""
    ignored = {number for number in STOPS if signal.getsignal(number) is signal.SIG_IGN} - {signal.SIGINT}
    previous = {number: signal.signal(number, handler) for number in STOPS if number not in ignored}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def _closed_console(received: list[int]) -> Iterator[None]:
    """Count a closed console window of Windows as Ctrl-Break.

    Windows ends the process as soon as the handler, which runs in a thread of its own, returns.
    """
    if sys.platform == "win32":
        import ctypes
        from ctypes import wintypes

        def close(event: int) -> bool:
            if event != CLOSE_EVENT:
                return False
            received.append(signal.SIGBREAK)
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
