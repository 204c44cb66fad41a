"""Use and temperature of the GPU, from its driver."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

READ_SECONDS = 1.0


class GpuUse:
    """How busy and how warm the GPU of this process is, read once a second at most.

    Torch asks the driver through the package nvidia-ml-py, or amdsmi for AMD; without it nothing is said. The driver
    may take its time, so this is for a thread that draws. Of several GPUs it is the first that the process may use.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.read_at = -math.inf
        self.text = ""

    def __call__(self) -> str:
        """Such as `GPU 97% at 71 C`; empty if nothing is known."""
        # Asking would open a GPU that this process does not use.
        if torch.cuda.is_initialized() and self.clock() - self.read_at >= READ_SECONDS:
            self.read_at = self.clock()
            try:
                self.text = f"GPU {torch.cuda.utilization()}% at {torch.cuda.temperature()} C"
            except Exception:
                self.text, self.read_at = "", math.inf
        return self.text
