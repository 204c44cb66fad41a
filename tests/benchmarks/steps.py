"""Steps of training with random weights, as the trainer takes them: their seconds and their peak of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import diffusers
import torch
from accelerate import Accelerator, init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from crepa_cli.data.dataset import Batch, ClipDataset
from crepa_cli.data.encoder import encoder_config
from crepa_cli.data.online import OnlineTeacher
from crepa_cli.data.scan import ClipForm
from crepa_cli.errors import RunError
from crepa_cli.events import Event, StepDone, StepSkipped
from crepa_cli.memory.live_bytes import LiveBytes
from crepa_cli.memory.prediction import training_memory
from crepa_cli.memory.savings import with_setting
from crepa_cli.memory.shapes import Clips, clips_of, form_bucket
from crepa_cli.models import family_defaults, load_family
from crepa_cli.models.base import BaseCheckpoint
from crepa_cli.models.family import Family
from crepa_cli.models.precision import in_loaded_dtypes
from crepa_cli.processes import PRECISION
from crepa_cli.profile import Profile
from crepa_cli.profile.layers import complete
from crepa_cli.requests import Requests
from crepa_cli.runs.folder import RunFolder
from crepa_cli.runs.prompts import Prompts
from crepa_cli.teachers.dinov2 import Dinov2Teacher, encoder_dtype
from crepa_cli.training.batches import Batches
from crepa_cli.training.build import build_model, frozen_dtype
from crepa_cli.training.checkpointer import Checkpointer
from crepa_cli.training.experts import build_experts
from crepa_cli.training.skipped import SkippedSteps
from crepa_cli.training.step import Teaching, step_losses
from crepa_cli.training.trainer import Trainer
from crepa_cli.training.validator import Validator

STD = 0.02
Settings = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Plan:
    """A training to measure.

    Attributes:
        family: its name.
        checkpoint: Hub id, or a local folder; only configurations are read.
        settings: those that differ from the checkpoint's defaults.
        config: entries of the transformer's configuration that are replaced.
        warmup: steps that are not timed.
        timed: steps that are.
        cutoff: drop the alignment afterwards, and measure as many steps without it.
    """

    family: str
    checkpoint: str
    settings: Settings
    config: Mapping[str, Any]
    warmup: int = 1
    timed: int = 3
    cutoff: bool = False

    def profile(self) -> Profile:
        """The settings, without validations and checkpoints."""
        steps = self.warmup + self.timed
        tables: dict[str, dict[str, object]] = {
            "model": {"family": self.family, "checkpoint": self.checkpoint},
            "data": {"caption_dropout": 0.0},
            "train": {"steps": 1000, "timestep_shift": 3.0},
            "validation": {"every": 0},
            "checkpoints": {"every": 0},
            "crepa": {"cutoff_step": steps if self.cutoff else 0},
        }
        for table, values in self.settings.items():
            tables[table] = tables.get(table, {}) | dict(values)
        return complete(tables, family_defaults)

    def open_family(self, profile: Profile, device: torch.device) -> Family:
        """The family, whose weights will be drawn at random on a device."""
        family = load_family(self.family)(self.checkpoint, profile.model.task)
        family.base = RandomWeights(family, self.config, device)
        family.config = family.base.read_config(f"{family.component}/config.json")
        return family


class RandomWeights(BaseCheckpoint):
    """The base model of a family, with published configurations and random weights.

    Args:
        family: of the checkpoint.
        config: entries of the transformer's configuration that are replaced.
        device: draws the weights; they are kept on the CPU, like those of a checkpoint that is loaded.
    """

    def __init__(self, family: Family, config: Mapping[str, Any], device: torch.device) -> None:
        super().__init__(family.base.name)
        self.family, self.config, self.device = family, config, device

    def read_config(self, filename: str) -> dict[str, Any]:
        """A published configuration, with the replaced entries."""
        config = super().read_config(filename)
        return config | dict(self.config) if filename == f"{self.family.component}/config.json" else config

    def load_model(self, class_name: str, component: str, dtype: torch.dtype) -> ModelMixin:
        """A transformer, on the CPU."""
        # Parameters on the meta device; buffers, such as rotary frequencies, as they are computed.
        with init_empty_weights():
            model = getattr(diffusers, class_name).from_config(self.read_config(f"{component}/config.json"))
        return filled(in_loaded_dtypes(model, dtype), self.device)

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:  # noqa: ARG002
        """None: `open_trainer` draws the weights in place of reading files."""
        return iter(())

    def source(self, component: str) -> str:
        """The name of the component alone."""
        return component

    def load_pipeline(
        self,
        class_name: str,  # noqa: ARG002
        *,
        dtype: torch.dtype,  # noqa: ARG002
        without: tuple[str, ...],  # noqa: ARG002
        **components: Any,  # noqa: ARG002
    ) -> DiffusionPipeline:
        """The pipeline with its VAE alone."""
        pipeline = self.family.empty_vae_pipeline()
        filled(pipeline.vae, self.device)
        return pipeline


@torch.no_grad()
def filled(module: Any, device: torch.device) -> Any:
    """The module with its empty parameters drawn on a device and kept on the CPU."""
    for part in module.modules():
        for name, tensor in list(part.named_parameters(recurse=False)):
            if tensor.is_meta:
                values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                setattr(part, name, nn.Parameter(_drawn(name, values).cpu(), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_meta:
                part.register_buffer(name, torch.ones(buffer.shape, dtype=buffer.dtype))
    return module


def _drawn(name: str, values: Tensor) -> Tensor:
    """Ones for norms; int8 codes and their scales so that the weights are small numbers as well."""
    if values.dtype == torch.int8:
        return values.random_(-127, 128)
    if name == "scale":
        return values.fill_(STD / 64)
    return values.fill_(1.0) if name == "weight" and values.ndim == 1 else values.normal_(std=STD)


def random_teacher(profile: Profile, device: torch.device) -> Dinov2Teacher:
    """The vision encoder of the settings, with random weights."""
    config = AutoConfig.for_model(**encoder_config(profile.crepa))
    with init_empty_weights():
        model = AutoModel.from_config(config, dtype=encoder_dtype(device))
    return Dinov2Teacher(filled(model, device).eval().to(device))


class RandomClip(ClipDataset):
    """A data set of one clip with random content and the shapes of a real one, of which nothing is read from a cache.

    Args:
        clips: the shapes.
    """

    def __init__(self, clips: Clips) -> None:
        self.healing = None
        generator = torch.Generator().manual_seed(0)
        self.content = {name: _content(tensor, generator) for name, tensor in clips.tensors.items()}
        self.grid, self.features = clips.teacher, None
        if self.grid is not None:
            shape = self.grid.frames, self.grid.tokens, clips.feature_size
            self.features = torch.randn(shape, generator=generator).half()

    def buckets(self) -> list[list[int]]:
        """One bucket with one clip."""
        return [[0]]

    def source(self, _: int) -> int:
        """Of one source."""
        return 0

    def drawn(self, index: int, _: float) -> int:
        """Without further windows."""
        return index

    def batch(self, indices: Sequence[int], captions: Sequence[float | None], with_features: bool) -> Batch:  # noqa: ARG002
        """The clip, as often as it is asked for."""
        tensors = {name: torch.stack([tensor] * len(indices)) for name, tensor in self.content.items()}
        features = None
        if with_features and self.features is not None:
            features = torch.stack([self.features] * len(indices))
        return Batch(("random",) * len(indices), tensors, features, self.grid)


def _content(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers; ones for masks, which stand for the longest caption, and lengths as they are."""
    if not tensor.is_meta:
        return tensor
    if not tensor.is_floating_point() or tensor.ndim == 0:
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def open_trainer(profile: Profile, family: Family, folder: Path) -> Trainer:
    """The trainer of a run, with one random clip.

    Args:
        profile: the resolved settings.
        family: with random weights.
        folder: of the run; nothing is written to it.
    """
    accelerator = Accelerator(mixed_precision=PRECISION[profile.model.dtype])
    device, crepa, run = accelerator.device, profile.crepa, RunFolder(folder)
    clips = clips_of(profile, family, form_bucket(profile, family))
    # int8 weights are quantized while files are read, and there are none.
    with patch("crepa_cli.models.family.read_weights", lambda transformer, *_: filled(transformer, device)):
        experts = build_experts(profile, family, clips.feature_size, accelerator, None)
    online = None
    if crepa.enabled and crepa.encoder_teaches and not crepa.teacher_cache:
        with patch("crepa_cli.data.online.load_teacher", lambda *_: random_teacher(profile, device)):
            online = OnlineTeacher(family, crepa, device)
    return Trainer(
        profile,
        family,
        run,
        experts,
        Batches(RandomClip(clips), family, profile, accelerator, experts.aligns and online is None),
        Checkpointer(run, 1, accelerator),
        Validator(profile, family, Prompts([], {}), ClipForm.of(profile.data), run, accelerator),
        accelerator,
        online,
        SkippedSteps(0),
    )


class Measurement(NamedTuple):
    """Of a phase of a plan.

    Attributes:
        seconds: median of the timed steps.
        peak: most bytes of tensors on the device.
        profile: the settings.
        family: with random weights.
        device: that trained.
    """

    seconds: float
    peak: int
    profile: Profile
    family: Family
    device: torch.device

    @property
    def flops(self) -> int | None:
        """FLOPs of a step, without what is recomputed; None if they are unknown."""
        return step_flops(self.profile, self.family)

    @property
    def predicted(self) -> int:
        """The peak, as doctor predicts it."""
        bucket = form_bucket(self.profile, self.family)
        return sum(training_memory(self.profile, self.family, bucket, self.device).values())

    def to_json(self) -> dict[str, float | None]:
        """The figures."""
        return {"seconds": self.seconds, "flops": self.flops, "peak": self.peak, "predicted": self.predicted}


def measure(plan: Plan, device: torch.device, folder: Path) -> Iterator[Measurement]:
    """Train some steps of a plan; a second measurement follows if the alignment is dropped.

    Raises:
        RunError: if a loss is not finite.
    """
    profile = plan.profile()
    family = plan.open_family(profile, device)
    phases = [profile, with_setting(profile, "crepa", "enabled", False)] if plan.cutoff else [profile]
    with peak_counter(device) as (restart, read):
        trainer = open_trainer(profile, family, folder)
        # Not trainer.train(), which saves a checkpoint when it is left.
        events = trainer._steps(lambda: False, Requests())
        assert isinstance(events, Generator)
        with closing(events):
            for phase in phases:
                seconds = _median_seconds(events, plan, restart, device)
                yield Measurement(seconds, read(), phase, family, device)


def _median_seconds(events: Iterator[Event], plan: Plan, restart: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for number in range(plan.warmup + plan.timed):
        if number == plan.warmup:
            restart()
        started = time.perf_counter()
        event = next(event for event in events if isinstance(event, (StepDone, StepSkipped)))
        if isinstance(event, StepSkipped):
            raise RunError(event.reason)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[plan.warmup :])


@contextmanager
def peak_counter(device: torch.device) -> Iterator[tuple[Callable[[], None], Callable[[], int]]]:
    """Functions that restart and read the most bytes of tensors: of the GPU's allocator, or counted on the CPU."""
    if device.type == "cuda":
        yield lambda: torch.cuda.reset_peak_memory_stats(device), lambda: torch.cuda.max_memory_allocated(device)
    else:
        with LiveBytes() as live:
            yield live.reset_peak, lambda: live.peak


_COUNTED: dict[str, int] = {}


def step_flops(profile: Profile, family: Family) -> int | None:
    """FLOPs of the forward and backward of a step, counted on meta tensors, without what checkpointing recomputes.

    None for sparse attention, whose FLOPs depend on the values.
    """
    if family.needs_compilation:
        return None
    tables = profile.model_dump(by_alias=True)
    tables.pop("memory", None)
    tables["train"] |= {"activation_checkpointing": False, "compile": False, "sharding": False}
    tables["model"] |= {"dtype": "float32"}  # automatic casts do not know the meta device
    key = f"{tables} {family.config}"
    if key not in _COUNTED:
        _COUNTED[key] = _count_flops(Profile.model_validate(tables), family)
    return _COUNTED[key]


def _count_flops(profile: Profile, family: Family) -> int:
    clips = clips_of(profile, family, form_bucket(profile, family))
    batch = {name: torch.stack([tensor] * profile.train.batch_size) for name, tensor in clips.tensors.items()}
    with torch.device("meta"):
        transformer = family.empty_transformer(frozen_dtype(profile)).requires_grad_(False)
        model = build_model(profile, family, transformer, clips.feature_size if profile.crepa.enabled else None)
        features = None
        if clips.teacher is not None and profile.crepa.enabled:
            features = torch.empty(
                len(batch["latents"]), clips.teacher.frames, clips.teacher.tokens, clips.feature_size
            )
        noise, sigmas = torch.empty_like(batch["latents"]), torch.empty(len(batch["latents"]))
        with FlopCounterMode(display=False) as counter:
            teaching = Teaching(features, clips.teacher, 1.0)
            step_losses(model, family, profile, batch, noise, sigmas, teaching).total.backward()
    return int(counter.get_total_flops())
