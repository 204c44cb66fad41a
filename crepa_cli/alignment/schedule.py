"""The coefficient (lambda) of the alignment loss over a run, and its cutoffs."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Literal, TypedDict, get_args

Scheduler = Literal["constant", "linear", "cosine", "polynomial"]
ThresholdMode = Literal["permanent", "recoverable"]


class ScheduleState(TypedDict):
    """The state of a `CoefficientSchedule`, as plain JSON values."""

    similarity_ema: float | None
    cut_off: bool


class CoefficientSchedule:
    """The factor of the alignment loss at each optimizer step, counted from zero.

    During the warmup it is `peak * step / warmup_steps`. Then `constant` stays at the peak; the other schedulers go
    from the peak to `end` over `decay_steps` (0: the rest of `total_steps`) and stay there. The coefficient is 0 from
    `cutoff_step` on, and while the exponential moving average of the similarity cuts it off.

    The average starts at the first observation and takes one observation per step. Once it reaches
    `similarity_threshold`, the coefficient is 0 from the next step on: for good if the mode is `permanent`, until the
    average falls below the threshold if it is `recoverable`.

    Raises:
        TypeError: for a setting that is no number.
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
        _check_numbers(
            Integral,
            "a whole number",
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            cutoff_step=cutoff_step,
        )
        _check_numbers(
            Real,
            "a number",
            peak=peak,
            end=end,
            power=power,
            similarity_threshold=0 if similarity_threshold is None else similarity_threshold,
            similarity_ema_decay=similarity_ema_decay,
        )
        _check_choice("scheduler", scheduler, get_args(Scheduler))
        _check_choice("threshold_mode", threshold_mode, get_args(ThresholdMode))
        if not (0 <= peak < math.inf and 0 <= end < math.inf):
            raise ValueError(f"peak and end must be finite and at least 0, got {peak} and {end}")
        if min(total_steps, warmup_steps, decay_steps, cutoff_step) < 0:
            raise ValueError("the step counts of a CoefficientSchedule must be at least 0")
        if not 0 < power < math.inf or not 0 <= similarity_ema_decay < 1:
            raise ValueError(
                f"power must be above 0 and similarity_ema_decay in [0, 1), got {power} and {similarity_ema_decay}"
            )
        if similarity_threshold is not None and not -1 <= similarity_threshold <= 1:
            raise ValueError(f"similarity_threshold must lie in [-1, 1], got {similarity_threshold}")
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
        """Whether the average similarity currently holds the coefficient at 0."""

    def planned(self, step: int) -> float:
        """The coefficient planned for a step, without the cutoff by similarity, which is not known in advance."""
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
        """The coefficient of a step: the planned one, or 0 while the average similarity cuts it off."""
        return 0.0 if self.cut_off else self.planned(step)

    def observe(self, similarity: float) -> None:
        """Update the moving average with a step's similarity, and the cutoff, which takes effect at the next step.

        Raises:
            ValueError: if it is not finite, which would spoil the average for good.
        """
        if not math.isfinite(similarity):
            raise ValueError(f"similarity must be finite, got {similarity}")
        decay = self.similarity_ema_decay
        previous = similarity if self.similarity_ema is None else self.similarity_ema
        self.similarity_ema = decay * previous + (1 - decay) * similarity
        if self.similarity_threshold is not None:
            reached = self.similarity_ema >= self.similarity_threshold
            self.cut_off = reached or (self.cut_off and self.threshold_mode == "permanent")

    def finished(self, step: int) -> bool:
        """Whether the coefficient is 0 at this step and at every later one, so that alignment can be dropped."""
        if self.cut_off and self.threshold_mode == "permanent":
            return True
        if self.cutoff_step and step >= self.cutoff_step:
            return True
        if self.peak == 0 and (self.scheduler == "constant" or self.end == 0):
            return True
        if self.scheduler == "constant":
            return False
        return self.end == 0 and step >= self.warmup_steps + self.decay_steps

    def state_dict(self) -> ScheduleState:
        """The state that a resumed run needs in addition to the settings."""
        return {"similarity_ema": self.similarity_ema, "cut_off": self.cut_off}

    def load_state_dict(self, state: ScheduleState) -> None:
        """Restore a saved state."""
        self.similarity_ema = state["similarity_ema"]
        self.cut_off = state["cut_off"]


def _check_numbers(kind: type, expected: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {expected}, got {value!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
