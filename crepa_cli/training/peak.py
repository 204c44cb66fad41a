"""Peak memory of the training alone, without the preparation before it and the validations between its steps."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

RESET_PEAK = Path("/proc/self/clear_refs")
"""Linux resets the peak of resident memory when 5 is written here."""


class PeakMemory:
    """Most bytes in use while training: allocated on the GPU, or resident in the process on the CPU.

    On systems other than Linux the peak of resident memory cannot be reset, and is that of the whole process.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.highest = 0
        self.restart()

    def read(self) -> int:
        """The peak so far, in bytes."""
        self.highest = max(self.highest, self._current())
        return self.highest

    def restart(self) -> None:
        """Forget a peak since the last reading, such as that of a validation."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif RESET_PEAK.exists():
            with suppress(OSError):
                RESET_PEAK.write_text("5")

    def _current(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_peak()


def resident_peak() -> int:
    """Most bytes that this process had in memory at one time."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows, which has no module `resource`
        return int(memory.peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_memory(device: torch.device) -> int:
    """Bytes that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return int(psutil.virtual_memory().total)


def device_name(accelerator: Accelerator) -> str:
    """The device and how many take part."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return f"{accelerator.num_processes} x {name}"
