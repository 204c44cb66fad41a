"""Logs, warnings and prints of libraries, as events, so that they neither garble the screen nor get lost."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

from crepa_cli.events import Event, Notice
from crepa_cli.report.plain import one_line

Listener = Callable[[Event], None]
_WARNING_PLACE = re.compile(r"^.*?:\d+: ")


class RecordHandler(logging.Handler):
    """Passes log records on as notices, each message once: warnings inside a loop would fill the screen.

    Args:
        listener: receives the notices.
        level: the lowest level that is passed on.
    """

    def __init__(self, listener: Listener, level: int) -> None:
        super().__init__(level)
        self.listener = listener
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on."""
        message = record.getMessage()
        if record.name == "py.warnings":
            message = _WARNING_PLACE.sub("", message.splitlines()[0])
        else:
            message = one_line(f"{record.name}: {message}")
        if message not in self.seen:
            self.seen.add(message)
            self.listener(Notice(message))


@contextmanager
def records_as_notices(listener: Listener, level: int) -> Iterator[None]:
    """Pass on log records of libraries at this level or above, including Python's warnings, inside the context."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    handler, root = RecordHandler(listener, level), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(min(level, logging.WARNING))
    for library in libraries:
        library.disable_default_handler()
        library.enable_propagation()
        library.set_verbosity(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        for library in libraries:
            library.disable_propagation()
            library.enable_default_handler()
            library.set_verbosity_error()


class PrintedLines(io.TextIOBase):
    """A stream that turns lines into notices.

    Args:
        listener: receives the notices.
        screen: the stream it replaces; a Rich console keeps writing there.
    """

    def __init__(self, listener: Listener, screen: TextIO) -> None:
        self.listener = listener
        self.rich_proxied_file = screen
        self.rest = ""

    def write(self, text: str) -> int:
        """Pass on every complete line."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.strip():
                self.listener(Notice(line))
        return len(text)

    def isatty(self) -> bool:
        """Return False, so that libraries draw no progress bars of their own."""
        return False


@contextmanager
def prints_as_notices(listener: Listener) -> Iterator[None]:
    """Pass on everything printed from Python inside the context."""
    out, err = PrintedLines(listener, sys.stdout), PrintedLines(listener, sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        yield
