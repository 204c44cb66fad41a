"""Text for streams that take few characters, such as output that Windows writes to a file in cp1252."""

from __future__ import annotations

import codecs
import io
import sys

LOOKALIKES = {ord("→"): "->", **dict.fromkeys(range(ord("▀"), ord("▟") + 1), "#")}
"""The arrow of advice, and the blocks that bars are drawn with."""
ERRORS = "crepa_lookalikes"


def print_any_text() -> None:
    """Replace what the encoding of the standard streams lacks, in place of a UnicodeEncodeError."""
    codecs.register_error(ERRORS, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Return look-alikes, or an escape with a backslash for what has none."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(LOOKALIKES)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end
