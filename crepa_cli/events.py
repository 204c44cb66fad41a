"""Events of a run, as small frozen dataclasses: preparation and trainer yield them, and listeners receive them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """`done` of a stage's `total` items are finished; with several processes, of this process's share.

    The first one of a stage comes before its first item. `item` is what is worked on from now on, such as the name of a
    clip or "loading the VAE"; it is empty once the stage is finished. `unit` is B for bytes, and empty for things that
    are counted. Preparation has the stages downloading, scanning, prompts, latents and features, training loading and
    validation, a measurement blocks and projectors, an evaluation the videos of each column, reference and measuring.
    """

    stage: str
    done: int
    total: int
    item: str = ""
    unit: str = ""


@dataclass(frozen=True)
class ClipSkipped:
    """A clip is excluded from training, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Notice:
    """Something the user should know, such as a damaged cache entry that is computed again."""

    message: str


@dataclass(frozen=True)
class RunOpened:
    """The first event: the settings and the checkpoint are valid, and the run has a folder.

    `device_memory` is in bytes; `loading` is the code that will load the trained weights; `model` and `device` are
    names to show.
    """

    output: Path
    device_memory: int
    loading: str
    model: str = ""
    device: str = ""


@dataclass(frozen=True)
class TrainingStarted:
    """Everything is loaded, and the first step is next.

    `step` is the first step of this session; it is above 0 if the run was resumed. Checkpoints and validations come
    every so many steps, or never if that is 0.
    """

    output: Path
    step: int
    steps: int
    clips: int
    batches_per_epoch: int
    trainable_parameters: int
    checkpoint_every: int = 0
    validation_every: int = 0


@dataclass(frozen=True)
class StepDone:
    """One optimizer step, counted from zero, with the fields of `metrics.jsonl`; None for values that do not exist."""

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
    crepa_weighted_loss: float | None = None
    """The coefficient times `crepa_loss`: the part of the total that alignment adds. For cosines it is below 0 once
    frames agree; for relations it never is."""
    crepa_self_similarity: float | None = None
    """The similarity of each frame with its own features, without its neighbors."""
    expert: str | None = None
    """The expert that the step trained, of a run that trains both."""
    data_seconds: float | None = None
    """Waiting for the batch, its copy to the device, and features that are computed in the step."""
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    optimizer_seconds: float | None = None
    """Of the update before this step's: a GPU is still at work on this one when the step's values are known."""


@dataclass(frozen=True)
class StepSkipped:
    """An optimizer step that changed nothing because its loss or gradient was not finite; `reason` names the clips."""

    step: int
    reason: str


@dataclass(frozen=True)
class AlignmentDropped:
    """Alignment ends for good at this step; the hook, the projector and the features are released."""

    step: int
    reason: str


@dataclass(frozen=True)
class CheckpointSaved:
    """The checkpoint after this many steps is complete on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class ValidationSampled:
    """The validation videos after this many steps are on disk.

    `measures` has the mean of each measure over the videos, and as `still` the number of videos in which nothing moves.
    It is empty if the run was stopped before the last video.
    """

    step: int
    paths: tuple[Path, ...]
    measures: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class HeldOutMeasured:
    """The mean diffusion loss of the clips that are never trained on, after this many steps.

    `similarity` is that of the alignment, and None without it. A resumed run repeats the event of its checkpoint.
    """

    step: int
    loss: float
    similarity: float | None
    clips: int


@dataclass(frozen=True)
class TrainingEnded:
    """The last event. `weights` is None if the run stopped before its last step."""

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
    | HeldOutMeasured
    | TrainingEnded
)


def drained(events: Generator[Event, None, Result], listener: Callable[[Event], None]) -> Result:
    """Pass every event to a listener and return the generator's result."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            result: Result = end.value
            return result
        listener(event)
