"""Progress bars and notes of libraries, which are kept off the screen."""

from __future__ import annotations

import logging


def silence_libraries() -> None:
    """Keep progress bars and notes of libraries off the screen; their warnings arrive as events."""
    # Before diffusers imports it: on some processors it warns of a kernel for 4-bit weights, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    logging.captureWarnings(True)
