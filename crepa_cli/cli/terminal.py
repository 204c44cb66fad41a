"""Whether somebody is at a terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Jupyter, Colab and Kaggle set these for their kernels, and commands in cells inherit them.
NOTEBOOK_VARIABLES = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "COLAB_GPU", "KAGGLE_KERNEL_RUN_TYPE")


def interactive(console: Console) -> bool:
    """Whether somebody watches this console: a real terminal, and neither a notebook nor CI.

    Both of them may have a pseudo-terminal, but nobody types into it.
    """
    return console.file.isatty() and not in_notebook() and not os.environ.get("CI")


class LastingOutput:
    """A stream that falls silent once it cannot be written to, so that a training outlives its reader.

    Args:
        stream: receives the text, until its pipe is closed or its disk is full.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        try:
            return self.stream.write(text)
        except OSError:
            self._fall_silent()
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self.stream.flush()
        except OSError:
            self._fall_silent()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """The descriptor of the stream."""
        return self.stream.fileno()

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        return self.stream.encoding

    def _fall_silent(self) -> None:
        # The interpreter flushes what is left when it exits, which would fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def in_notebook() -> bool:
    """Whether a cell of a notebook started this process."""
    # Every IPython kernel sets Matplotlib's backend, also the kernels that editors start.
    return any(name in os.environ for name in NOTEBOOK_VARIABLES) or "inline" in os.environ.get("MPLBACKEND", "")


def write_plain_text() -> None:
    """Keep escape codes out of the output of this process and its children, even in a pseudo-terminal."""
    os.environ.pop("FORCE_COLOR", None)
    os.environ["TERM"] = "dumb"
