"""Exceptions that end a command with a message instead of a traceback, and the wording of messages."""

from collections.abc import Sequence


class UserError(Exception):
    """A user's mistake: the command prints this message and exits with code 2, without a traceback.

    The message says what is wrong, where (file, key, value, allowed range), and what to do.
    """


class RunError(Exception):
    """A failure that is not the user's mistake: the command prints this message and exits with code 1."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless there is exactly one: "1 clip", "1,200 clips"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Names in one line: all of them, or the first ten and the number of the others."""
    others = len(names) - 10
    return ", ".join(names[:10]) + (f" and {others:,} more" if others > 0 else "")
