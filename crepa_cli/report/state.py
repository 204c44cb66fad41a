"""The state of a run for the dashboard, gathered from its events."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from crepa_cli.alignment import CoefficientSchedule
from crepa_cli.events import (
    AlignmentDropped,
    Event,
    HeldOutMeasured,
    Notice,
    Progress,
    RunOpened,
    StepDone,
    TrainingStarted,
    ValidationSampled,
)
from crepa_cli.report.curves import Curve
from crepa_cli.report.plain import describe, duration, item_text, one_line

SMOOTHING = 0.95
PARTS = ("data", "forward", "backward", "optimizer")
"""The parts of a step, in their order."""
MESSAGES = 50


class Series:
    """A value over the run: its curve, its last value and its smoothed value."""

    def __init__(self) -> None:
        self.curve = Curve()
        self.now: float | None = None
        self.smoothed: float | None = None

    def add(self, value: float | None) -> None:
        """Add the value of the next step."""
        self.curve.add(value)
        self.now = value
        if value is not None:
            previous = value if self.smoothed is None else self.smoothed
            self.smoothed = SMOOTHING * previous + (1 - SMOOTHING) * value


class RunState:
    """A listener that keeps everything the panels show.

    Args:
        schedule: the planned coefficient; None for a run without alignment.
        clock: returns the time in seconds.
    """

    def __init__(self, schedule: CoefficientSchedule | None, clock: Callable[[], float]) -> None:
        self.schedule = schedule
        self.clock = clock
        self.opened: RunOpened | None = None
        self.opened_at = 0.0
        self.started: TrainingStarted | None = None
        self.started_at = 0.0
        self.latest: StepDone | None = None
        self.seconds_left: float | None = None
        self.dropped: AlignmentDropped | None = None
        self.cut_off_at: int | None = None
        self.losses = {name: Series() for name in ("diffusion", "alignment", "total")}
        self.similarity, self.average, self.coefficient = Series(), Series(), Series()
        self.parts = {part: Series() for part in PARTS}
        """Seconds."""
        self.gpu = ""
        """How busy the GPU is, if its driver says so."""
        self.sampled: list[ValidationSampled] = []
        """The validations with measures, the oldest first."""
        self.held_out: list[HeldOutMeasured] = []
        self.messages: deque[str] = deque(maxlen=MESSAGES)
        self.work: Progress | None = None
        """The work between two steps, such as a validation."""
        self.work_started_at = 0.0
        self.stopping = False
        """Whether a signal has asked for a stop."""

    def __call__(self, event: Event) -> None:
        """Update the state with an event."""
        if isinstance(event, Progress):
            self.work, self.work_started_at = event, self.clock()
        elif not isinstance(event, Notice):
            self.work = None
        match event:
            case RunOpened():
                self.opened, self.opened_at = event, self.clock()
            case StepDone():
                self._record(event)
            case TrainingStarted():
                self.started, self.started_at = event, self.clock()
            case AlignmentDropped():
                self.dropped = event
            case ValidationSampled() if event.measures:
                self.sampled.append(event)
            case HeldOutMeasured():
                self.held_out.append(event)
        if not isinstance(event, Progress | RunOpened | StepDone):
            self.messages.append(one_line(describe(event)))

    @property
    def work_text(self) -> str:
        """The work between two steps, and since when; empty during steps."""
        if self.work is None or not self.work.item:
            return ""
        return f"{self.work.stage}: {item_text(self.work.item)}, {duration(self.clock() - self.work_started_at)} so far"

    @property
    def parts_text(self) -> str:
        """The smoothed shares of the parts in a step; empty before they are known, as in runs of older versions."""
        seconds = {part: series.smoothed or 0.0 for part, series in self.parts.items()}
        total = sum(seconds.values())
        return ", ".join(f"{part} {spent / total:.0%}" for part, spent in seconds.items()) if total else ""

    @property
    def elapsed(self) -> float:
        """Seconds since this session opened the run."""
        return self.clock() - self.opened_at

    def _record(self, step: StepDone) -> None:
        self.latest = step
        self.losses["diffusion"].add(step.diffusion_loss)
        self.losses["alignment"].add(step.crepa_loss)
        self.losses["total"].add(step.loss)
        self.similarity.add(step.crepa_similarity)
        self.average.add(step.crepa_similarity_ema)
        self.coefficient.add(step.crepa_coefficient)
        for part, series in self.parts.items():
            series.add(getattr(step, f"{part}_seconds"))
        if not step.crepa_cutoff:
            self.cut_off_at = None
        elif self.cut_off_at is None:
            self.cut_off_at = step.step
        if self.started is not None:
            done = step.step + 1
            # Includes checkpoints and validation, which `step_seconds` leaves out.
            seconds_per_step = (self.clock() - self.started_at) / (done - self.started.step)
            self.seconds_left = seconds_per_step * (self.started.steps - done)


def phase(state: RunState) -> str:
    """The phase of the coefficient's schedule, in words."""
    schedule, latest = state.schedule, state.latest
    if schedule is None:
        return "alignment is off"
    if latest is None:
        return "before the first step"
    if state.dropped is not None:
        return f"cut off at step {state.dropped.step:,}: {state.dropped.reason}"
    if state.cut_off_at is not None:
        return f"cut off at step {state.cut_off_at:,}{_similarity_reason(schedule, latest)}"
    if latest.step < schedule.warmup_steps:
        return f"warmup {latest.step:,}/{schedule.warmup_steps:,}"
    if schedule.scheduler == "constant":
        return "constant"
    if latest.step < schedule.warmup_steps + schedule.decay_steps:
        return f"decaying to {schedule.end:g}"
    return f"decayed to {schedule.end:g}"


def _similarity_reason(schedule: CoefficientSchedule, latest: StepDone) -> str:
    average, threshold = latest.crepa_similarity_ema, schedule.similarity_threshold
    if average is None or threshold is None or average < threshold:
        return ""
    return f": similarity average {average:.3f} >= {threshold}"
