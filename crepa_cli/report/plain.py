"""Plain lines, for logs and pipes: one per event, and one per logging interval of steps."""

from __future__ import annotations

from rich.console import Console

from crepa_cli.errors import counted
from crepa_cli.events import (
    AlignmentDropped,
    CheckpointSaved,
    ClipSkipped,
    Event,
    Notice,
    Progress,
    RunOpened,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingStarted,
    ValidationSampled,
)


def number(value: float | None) -> str:
    """The value with four decimals, or a dash if there is none."""
    return "-" if value is None else f"{value:.4f}"


def describe(event: Event) -> str:
    """An event as one line of text."""
    match event:
        case RunOpened(output):
            return f"run folder: {output}"
        case Progress(stage, done, total):
            return f"{stage}: {done}/{total}"
        case ClipSkipped(name, reason):
            return f"skipped {name}: {reason}"
        case Notice(message):
            return message
        case TrainingStarted():
            return (
                f"training from step {event.step} to {event.steps}: {counted(event.clips, 'clip')}, "
                f"{counted(event.batches_per_epoch, 'step')} per epoch, "
                f"{counted(event.trainable_parameters, 'trainable parameter')}"
            )
        case StepDone():
            return (
                f"step {event.step} loss={number(event.loss)} diffusion={number(event.diffusion_loss)} "
                f"crepa={number(event.crepa_loss)} coefficient={event.crepa_coefficient:.4f} "
                f"similarity={number(event.crepa_similarity)} average={number(event.crepa_similarity_ema)} "
                f"lr={event.learning_rate:.2e} grad_norm={event.grad_norm:.3f} seconds={event.step_seconds:.3f}"
            )
        case StepSkipped(step, reason):
            return f"step {step} skipped: {reason}"
        case AlignmentDropped(step, reason):
            return f"alignment turned off at step {step}: {reason}"
        case CheckpointSaved(_, path):
            return f"checkpoint saved: {path}"
        case ValidationSampled(step, paths):
            folder = f": {paths[0].parent}" if paths else f" at step {step}"
            return f"{counted(len(paths), 'validation video')} sampled{folder}"
        case TrainingEnded(step, weights):
            return f"weights written: {weights}" if weights else f"stopped after {counted(step, 'step')}"


class PlainLines:
    """A listener that prints lines that are easy to grep.

    Args:
        console: prints them.
        every: number of steps from one line of step values to the next.
    """

    def __init__(self, console: Console, every: int) -> None:
        self.console = console
        self.every = every

    def __call__(self, event: Event) -> None:
        """Print an event; steps and progress in between are left out."""
        if isinstance(event, StepDone) and event.step % self.every:
            return
        if isinstance(event, Progress) and event.done < event.total:
            return
        self.console.print(describe(event), markup=False, highlight=False, soft_wrap=True)
