"""The coefficient of the alignment loss over a run, and its cutoffs."""

from __future__ import annotations

import math
from typing import Literal, TypedDict

Scheduler = Literal["constant", "linear", "cosine", "polynomial"]
ThresholdMode = Literal["permanent", "recoverable"]


class ScheduleState(TypedDict):
    """What a `CoefficientSchedule` remembers, as plain JSON values."""

    similarity_ema: float | None
    cut_off: bool


class CoefficientSchedule:
    """What the alignment loss is multiplied with at each optimizer step, counted from zero.

    `peak * step / warmup_steps` during the warmup; then `constant` stays at the peak, the others go from the peak to
    `end` over `decay_steps` (0: all that is left of `total_steps`) and stay there. 0 from `cutoff_step` on, and while
    the similarity's exponential moving average cuts it off.

    The average starts at the first observation and takes one per step. From the step after it reached
    `similarity_threshold` the coefficient is 0: for good when `permanent`, until it falls below when `recoverable`.

    Raises:
        ValueError: for a setting outside its range.
    """

    def __init__(
        self,
        *,
        peak: float,
        total_steps: int,
        scheduler: Scheduler = "constant",
        end: float = 0.0,
        warmup_steps: int = 0,
        decay_steps: int = 0,
        power: float = 1.0,
        cutoff_step: int = 0,
        similarity_threshold: float | None = None,
        similarity_ema_decay: float = 0.99,
        threshold_mode: ThresholdMode = "permanent",
    ) -> None:
        if min(peak, end, total_steps, warmup_steps, decay_steps, cutoff_step) < 0:
            raise ValueError("peak, end and the step counts of a CoefficientSchedule are at least 0")
        if power <= 0 or not 0 <= similarity_ema_decay < 1:
            raise ValueError(f"power is above 0 and the decay within [0, 1), got {power}, {similarity_ema_decay}")
        self.peak = peak
        self.scheduler = scheduler
        self.end = end
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps or max(total_steps - warmup_steps, 0)
        self.power = power
        self.cutoff_step = cutoff_step
        self.similarity_threshold = similarity_threshold
        self.similarity_ema_decay = similarity_ema_decay
        self.threshold_mode = threshold_mode
        self.similarity_ema: float | None = None
        self.cut_off = False
        """Whether the similarity's average holds the coefficient at 0 now."""

    def planned(self, step: int) -> float:
        """The coefficient that the schedule plans for a step; the similarity's cutoff is not known beforehand."""
        if self.cutoff_step and step >= self.cutoff_step:
            return 0.0
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.scheduler == "constant":
            return self.peak
        if self.decay_steps == 0:
            return self.end
        progress = min((step - self.warmup_steps) / self.decay_steps, 1.0)
        remaining = 1 - progress
        if self.scheduler == "cosine":
            remaining = (1 + math.cos(math.pi * progress)) / 2
        elif self.scheduler == "polynomial":
            remaining = math.pow(1 - progress, self.power)
        return self.end + (self.peak - self.end) * remaining

    def coefficient(self, step: int) -> float:
        """The coefficient of a step: the planned one, or 0 while the similarity's average cuts it off."""
        return 0.0 if self.cut_off else self.planned(step)

    def observe(self, similarity: float) -> None:
        """Take a step's similarity into the moving average and decide on the cutoff, which holds from the next step."""
        decay = self.similarity_ema_decay
        previous = similarity if self.similarity_ema is None else self.similarity_ema
        self.similarity_ema = decay * previous + (1 - decay) * similarity
        if self.similarity_threshold is not None:
            reached = self.similarity_ema >= self.similarity_threshold
            self.cut_off = reached or (self.cut_off and self.threshold_mode == "permanent")

    def finished(self, step: int) -> bool:
        """Whether the coefficient is 0 at this step and at every later one, so that alignment may be dropped."""
        if self.cut_off and self.threshold_mode == "permanent":
            return True
        if self.cutoff_step and step >= self.cutoff_step:
            return True
        if self.scheduler == "constant":
            return self.peak == 0
        return self.end == 0 and step >= self.warmup_steps + self.decay_steps

    def state_dict(self) -> ScheduleState:
        """What a resumed run needs beside the settings."""
        return {"similarity_ema": self.similarity_ema, "cut_off": self.cut_off}

    def load_state_dict(self, state: ScheduleState) -> None:
        """Go on from a saved state."""
        self.similarity_ema = state["similarity_ema"]
        self.cut_off = state["cut_off"]
