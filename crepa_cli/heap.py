"""Memory that models have held, given back to the system."""

from __future__ import annotations

import ctypes
import sys

from diffusers.training_utils import free_memory


def release_memory() -> None:
    """Free what nothing refers to any more, on the device and on the heap.

    glibc keeps freed memory for later: after a text encoder of 5 GB, the process would hold 5 GB that nothing uses.
    """
    free_memory()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
