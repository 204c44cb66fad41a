"""What happens in a run, as small frozen dataclasses: the preparation and the trainer yield them, reports listen."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` pieces of a stage are finished, or of this process's share of it.

    Stages of the preparation are scanning, prompts, latents and features; of a measurement blocks and projectors.
    """

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class ClipSkipped:
    """A clip is left out of the training, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Notice:
    """Something that the user should know, such as a cache entry that was damaged and is made again."""

    message: str


@dataclass(frozen=True)
class RunOpened:
    """The first event: settings and checkpoint are checked, and the run has a folder.

    `device_memory` is in bytes; `loading` are the lines of code that will load the weights.
    """

    output: Path
    device_memory: int
    loading: str


@dataclass(frozen=True)
class TrainingStarted:
    """Everything is loaded; the first step comes next.

    `step` is the first step of this session, above 0 when a run goes on.
    """

    output: Path
    step: int
    steps: int
    clips: int
    batches_per_epoch: int
    trainable_parameters: int


@dataclass(frozen=True)
class StepDone:
    """One optimizer step, counted from zero: the fields of `metrics.jsonl`; None where a value does not exist."""

    step: int
    loss: float
    diffusion_loss: float
    crepa_loss: float | None
    crepa_similarity: float | None
    crepa_similarity_ema: float | None
    crepa_coefficient: float
    crepa_cutoff: bool
    layersync_loss: float | None
    learning_rate: float
    grad_norm: float
    projector_grad_norm: float | None
    step_seconds: float
    samples_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class StepSkipped:
    """An optimizer step that changed nothing, because a loss or the gradient was not finite, and of which clips."""

    step: int
    reason: str


@dataclass(frozen=True)
class AlignmentDropped:
    """Alignment can never come back from this step on; hook, projector and features are gone."""

    step: int
    reason: str


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint after this many steps is complete on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class ValidationSampled:
    """Validation videos after this many steps are on disk."""

    step: int
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class TrainingEnded:
    """The last event. `weights` is None where the run was stopped before its last step."""

    step: int
    weights: Path | None


Event = (
    RunOpened
    | Progress
    | ClipSkipped
    | Notice
    | TrainingStarted
    | StepDone
    | StepSkipped
    | AlignmentDropped
    | CheckpointSaved
    | ValidationSampled
    | TrainingEnded
)


def drained(events: Generator[Event, None, Result], listener: Callable[[Event], None]) -> Result:
    """Tell a listener all events, and return what came of the work that yielded them."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            result: Result = end.value
            return result
        listener(event)
