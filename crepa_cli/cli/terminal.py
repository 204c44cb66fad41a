"""Whether somebody is at a terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Jupyter, Colab and Kaggle set these for their kernels, and commands in cells inherit them.
NOTEBOOK_VARIABLES = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "COLAB_GPU", "KAGGLE_KERNEL_RUN_TYPE")


def interactive(console: Console) -> bool:
    """Whether somebody watches this console: a real terminal, and neither a notebook nor CI.

    Both of them may have a pseudo-terminal, but nobody types into it.
    """
    return console.file.isatty() and not in_notebook() and not os.environ.get("CI")


def in_notebook() -> bool:
    """Whether a cell of a notebook started this process."""
    # Every IPython kernel sets Matplotlib's backend, also the kernels that editors start.
    return any(name in os.environ for name in NOTEBOOK_VARIABLES) or "inline" in os.environ.get("MPLBACKEND", "")


def write_plain_text() -> None:
    """Keep escape codes out of the output of this process and its children, even in a pseudo-terminal."""
    os.environ.pop("FORCE_COLOR", None)
    os.environ["TERM"] = "dumb"
