"""The time that the parts of a step take."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch


class StepClock:
    """Measures the parts of steps without making the CPU wait for the GPU.

    On a GPU each mark is an event in its queue of work, so the times are those of the GPU, and a part in which it waits
    for the CPU counts in full. Elsewhere they are those of the CPU.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        """Parts, with the moments of their ends."""

    def mark(self, part: str = "") -> None:
        """Say that a part ends here, and the next one begins; without a name, that what was before is no part."""
        self.marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading; the GPU must have reached the last mark.

        The update of a step comes after its losses are read, so it is part of the next reading.
        """
        seconds: dict[str, float] = {}
        for (_, before), (part, after) in itertools.pairwise(self.marks):
            spent = before.elapsed_time(after) / 1000 if self.on_gpu else after - before
            seconds[part] = seconds.get(part, 0.0) + spent
        self.marks = self.marks[-1:]
        return seconds

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
