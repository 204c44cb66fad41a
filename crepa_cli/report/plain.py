"""Plain lines, for logs and pipes: one per event, and one per logging interval of steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal

from crepa_cli.errors import counted
from crepa_cli.events import (
    AlignmentDropped,
    CheckpointSaved,
    ClipSkipped,
    Event,
    HeldOutMeasured,
    Notice,
    Progress,
    RunOpened,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingStarted,
    ValidationSampled,
)

QUIET_SECONDS = 10.0
"""The longest time without a line while a stage is at work."""
ITEM_LENGTH = 60
STOPPING = "stopping: saving a checkpoint; Ctrl-C once more to stop now"


def one_line(message: str) -> str:
    """A message without line breaks and control characters, which would garble the screen."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in message).split())


def item_text(item: str) -> str:
    """An item's name on one line, shortened if it is long."""
    text = one_line(item)
    return text if len(text) <= ITEM_LENGTH else f"{text[: ITEM_LENGTH - 3]}..."


def duration(seconds: float) -> str:
    """A time such as 40 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def number(value: float | None) -> str:
    """The value with four decimals, or a dash if there is none."""
    return "-" if value is None else f"{value:.4f}"


def amount(event: Progress) -> str:
    """How much of a stage is done: `3/20`, or `1.2 GB/23.4 GB`."""
    if event.unit == "B":
        return f"{decimal(event.done)}/{decimal(event.total)}"
    return f"{event.done}/{event.total}"


def describe(event: Event) -> str:
    """An event as one line of text."""
    match event:
        case RunOpened(output):
            return f"run folder: {output}"
        case Progress(stage, _, _, item):
            return ", ".join([f"{stage}: {amount(event)}", *([item_text(item)] if item else [])])
        case ClipSkipped(name, reason):
            return f"skipped {name}: {reason}"
        case Notice(message):
            return message
        case TrainingStarted():
            start = f"training from step {event.step} to {event.steps}: {counted(event.clips, 'clip')}"
            if not event.batches_per_epoch:
                return start
            return (
                f"{start}, {counted(event.batches_per_epoch, 'step')} per epoch, "
                f"{counted(event.trainable_parameters, 'trainable parameter')}"
            )
        case StepDone():
            return (
                f"step {event.step} {f'expert={event.expert} ' if event.expert else ''}"
                f"loss={number(event.loss)} diffusion={number(event.diffusion_loss)} "
                f"crepa={number(event.crepa_loss)} coefficient={event.crepa_coefficient:.4f} "
                f"similarity={number(event.crepa_similarity)} "
                f"own={number(event.crepa_self_similarity)} average={number(event.crepa_similarity_ema)} "
                f"lr={event.learning_rate:.2e} grad_norm={event.grad_norm:.3f} seconds={event.step_seconds:.3f}"
            )
        case StepSkipped(step, reason):
            return f"step {step} skipped: {reason}"
        case AlignmentDropped(step, reason):
            return f"alignment turned off at step {step}: {reason}"
        case CheckpointSaved(_, path):
            return f"checkpoint saved: {path}"
        case ValidationSampled(step, paths, measures):
            folder = f": {paths[0].parent}" if paths else f" at step {step}"
            figures = "".join(f" {name}={value:.4g}" for name, value in measures.items())
            return f"{counted(len(paths), 'validation video')} sampled{folder}{figures}"
        case HeldOutMeasured(step, loss, similarity, clips):
            return (
                f"held-out loss={loss:.4f} similarity={number(similarity)} of {counted(clips, 'clip')} at step {step}"
            )
        case TrainingEnded(step, weights):
            return f"weights written: {weights}" if weights else f"stopped after {counted(step, 'step')}"


class StageClock:
    """The times of the stage at work and of its item, from the progress events.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.latest: Progress | None = None
        self.item_started = 0.0
        self.first = (0, 0.0)
        """How many items were finished when the first one started, and the time."""

    def __call__(self, event: Progress) -> None:
        """Take the next event of a stage."""
        latest, now = self.latest, self.clock()
        # Loading a model is no item, and would make the items look slow.
        if latest is None or latest.stage != event.stage or latest.done == event.done:
            self.first = event.done, now
        self.latest, self.item_started = event, now

    @property
    def item_seconds(self) -> float:
        """Seconds since the last event."""
        return self.clock() - self.item_started

    @property
    def speed(self) -> str | None:
        """Bytes per second, such as `35.2 MB/s`; None for a stage that does not count bytes, or has none yet."""
        done, started = self.first
        if self.latest is None or self.latest.unit != "B" or self.latest.done <= done:
            return None
        return f"{decimal(round((self.latest.done - done) / max(self.item_started - started, 1e-3)))}/s"

    @property
    def seconds_left(self) -> float | None:
        """The time that the rest of the stage takes at the speed of the items so far; None before the first is done."""
        done, started = self.first
        if self.latest is None or self.latest.done <= done:
            return None
        per_item = (self.item_started - started) / (self.latest.done - done)
        return max(0.0, per_item * (self.latest.total - self.latest.done) - self.item_seconds)


class PlainLines:
    """A listener that prints lines that are easy to grep.

    A stage of the preparation has a line at its start, at its end and every `quiet` seconds. As a context manager, it
    also prints one if no event comes for so long, because an item, a step or a validation may take minutes.

    Args:
        console: prints them.
        every: number of steps from one line of step values to the next; the first and the last step have one too.
        quiet: seconds.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        console: Console,
        every: int,
        *,
        quiet: float = QUIET_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console
        self.every = every
        self.quiet = quiet
        self.clock = clock
        self.stage = StageClock(clock)
        self.training: TrainingStarted | None = None
        self.step, self.step_started = 0, 0.0
        """The step at work, and the time at which it started."""
        self.training_started = 0.0
        self.unprinted: StepDone | None = None
        """The latest step, if it has no line."""
        self.printed_at = clock()
        self.stopping = False
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._keep_alive, name="crepa-plain-lines", daemon=True)

    def __enter__(self) -> PlainLines:
        """Start to print lines while no event comes."""
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Print nothing more by itself."""
        self.closed.set()
        self.thread.join()

    def __call__(self, event: Event) -> None:
        """Print an event; steps and progress in between are left out."""
        with self.lock:
            if isinstance(event, Progress):
                self._progress(event)
                return
            if not isinstance(event, ClipSkipped | Notice):
                self.stage.latest = None
                self._follow_steps(event)
            if event is not self.unprinted:
                self._print(describe(event) + self._rest(event))

    def _follow_steps(self, event: Event) -> None:
        self.step_started = self.clock()
        match event:
            case TrainingStarted():
                self.training, self.step, self.training_started = event, event.step, self.step_started
            case StepDone():
                self.step = event.step + 1
                self.unprinted = None if self._has_line(event) else event
            case StepSkipped():
                self.step = event.step + 1
            case TrainingEnded():
                self.training = None
                if self.unprinted is not None:
                    self._print(describe(self.unprinted))

    def _rest(self, event: Event) -> str:
        """The number of steps and the seconds that are left, checkpoints and validations counted in, after a step."""
        if self.training is None or not isinstance(event, StepDone):
            return ""
        done, steps = event.step + 1, self.training.steps
        per_step = (self.clock() - self.training_started) / max(1, done - self.training.step)
        return f" steps={steps} seconds_left={per_step * (steps - done):.0f}"

    def _has_line(self, event: StepDone) -> bool:
        ends = (self.training.step, self.training.steps - 1) if self.training else ()
        return event.step % self.every == 0 or event.step in ends

    def stop(self) -> None:
        """Say soon that a signal has asked for a stop; it may be called from a signal handler."""
        self.stopping = True

    def beat(self) -> None:
        """Say that a stop was asked for, or what is worked on if nothing has been printed for `quiet` seconds."""
        with self.lock:
            if self.stopping:
                self.stopping = False
                self._print(STOPPING)
            elif self._seconds_to_beat() <= 0 and (work := self._work()):
                self._print(work)

    def _work(self) -> str:
        """The work since the last event; empty before the first stage and after the last step."""
        latest = self.stage.latest
        if latest is not None:
            seconds = f"{duration(self.stage.item_seconds)} so far"
            finished = latest.done == latest.total
            return f"after {latest.stage}: preparing what comes next, {seconds}" if finished else self._state(seconds)
        if self.training is None:
            return ""
        return f"step {self.step} of {self.training.steps}: {duration(self.clock() - self.step_started)} so far"

    def _progress(self, event: Progress) -> None:
        before = self.stage.latest
        self.stage(event)
        starts = before is None or before.stage != event.stage
        if starts or event.done == event.total or self._seconds_to_beat() <= 0:
            self._print(self._state())

    def _state(self, *more: str) -> str:
        latest, left = self.stage.latest, self.stage.seconds_left
        if latest is None:
            return ""
        speed = [self.stage.speed] if self.stage.speed else []
        rest = [f"{duration(left)} left"] if left is not None and latest.done < latest.total else []
        return ", ".join([describe(latest), *more, *speed, *rest])

    def _seconds_to_beat(self) -> float:
        return self.printed_at + self.quiet - self.clock()

    def _print(self, line: str) -> None:
        self.printed_at = self.clock()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _keep_alive(self) -> None:
        while not self.closed.wait(max(self._seconds_to_beat(), self.quiet / 10)):
            self.beat()
