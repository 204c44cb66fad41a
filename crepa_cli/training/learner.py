"""The learner: the trained weights and all state that changes with them: optimizer, schedules, moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from crepa_cli.alignment import CoefficientSchedule
from crepa_cli.heap import release_memory
from crepa_cli.models.attention import compute_attention_with
from crepa_cli.models.family import Family
from crepa_cli.models.sharing import SharedPlace
from crepa_cli.models.streaming import stream
from crepa_cli.profile import Profile
from crepa_cli.training.adapter import start_from
from crepa_cli.training.aligned import AlignedTransformer
from crepa_cli.training.build import (
    build_model,
    coefficient_schedule,
    frozen_dtype,
    frozen_in_int8,
    make_optimizer,
    trainable,
    with_floor,
)
from crepa_cli.training.checkpoints import Snapshot, holds_projector, load_checkpoint, take_snapshot
from crepa_cli.training.parallel import replicated, shard


class GradientNorms(NamedTuple):
    """L2 norms before clipping, 0-d tensors; `projector` is None without one."""

    adapter: Tensor
    projector: Tensor | None


@dataclass
class Learner:
    """The aligned transformer and everything that updates it.

    Attributes:
        aligned: the module that is trained.
        model: `aligned` as it is called: replicated over the processes, if there are several.
        optimizer: over the trained weights of the transformer and the projector.
        lr_scheduler: of the optimizer, one step for each optimizer step.
        schedule: of the alignment's coefficient.
        average: the moving average of the transformer's trained weights, if one is kept.
        accelerator: device, precision and processes.
        max_grad_norm: bound of each gradient norm; 0 for none.
    """

    aligned: AlignedTransformer
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    schedule: CoefficientSchedule
    average: EMAModel | None
    accelerator: Accelerator
    max_grad_norm: float

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained parameters of the transformer, in order."""
        return trainable(self.aligned.transformer)

    @property
    def aligns(self) -> bool:
        """Whether CREPA still takes part."""
        return self.aligned.crepa is not None

    def coefficient(self, step: int) -> float:
        """The coefficient of the alignment loss at a step; 0 once alignment is dropped."""
        return self.schedule.coefficient(step) if self.aligns else 0.0

    @property
    def learning_rate(self) -> float:
        """The learning rate of the coming update."""
        return float(self.lr_scheduler.get_last_lr()[0])

    def clip_gradients(self) -> GradientNorms:
        """Clip the gradients of the transformer and of the projector, each by its own norm.

        The projector's gradient is often larger than the adapter's: one common norm would slow the adapter down.
        """
        projector = trainable(self.aligned.crepa) if self.aligned.crepa else []
        return GradientNorms(self._clip(self.trained), self._clip(projector) if projector else None)

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self, similarity: float | None) -> None:
        """Take an optimizer step with the accumulated gradients, known to be finite, and advance all schedules."""
        self.optimizer.step()
        self.lr_scheduler.step()
        self.discard_gradients()
        if self.average:
            self.average.step(self.trained)
        if similarity is not None:
            self.schedule.observe(similarity)

    def discard_gradients(self) -> None:
        """Leave weights, averages and schedules as they are."""
        self.optimizer.zero_grad(set_to_none=True)

    def drop_alignment(self) -> None:
        """Remove the projector from model, optimizer and memory."""
        projector = set(self.aligned.crepa.parameters()) if self.aligned.crepa else set()
        for group in self.optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in projector]
        for parameter in projector:
            self.optimizer.state.pop(parameter, None)
        # DistributedDataParallel would keep waiting for the projector's gradients: wrap the module anew.
        self.model = self.aligned
        self.aligned.drop_alignment()
        release_memory()
        self.model = replicated(self.aligned, self.accelerator)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within this context the weights are their moving average, if one is kept."""
        if self.average is None:
            yield
            return
        self.average.store(self.trained)
        self.average.copy_to(self.trained)
        try:
            yield
        finally:
            self.average.restore(self.trained)

    def snapshot(self, progress: dict[str, Any]) -> Snapshot:
        """The state to save, with the trainer's own `progress`; every process has to call this."""
        state = progress | {
            "schedule": self.schedule.state_dict(),
            "lr_scheduler": {"last_epoch": self.lr_scheduler.last_epoch},
            "average_steps": self.average.optimization_step if self.average else 0,
        }
        return take_snapshot(self.aligned, self.optimizer, self.average.shadow_params if self.average else None, state)

    def load(self, checkpoint: Path, progress: dict[str, Any]) -> None:
        """Restore the state of a checkpoint; learning rate, weight decay and their schedule stay those of the settings.

        Args:
            checkpoint: its folder.
            progress: what it holds, from `read_progress`.
        """
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        load_checkpoint(checkpoint, self.aligned, self.optimizer, self.average.shadow_params if self.average else None)
        step = progress["lr_scheduler"]["last_epoch"]
        self.lr_scheduler.last_epoch = step
        multipliers = [multiplier(step) for multiplier in self.lr_scheduler.lr_lambdas]
        for group, rate, decay, multiplier in zip(self.optimizer.param_groups, rates, decays, multipliers, strict=True):
            group.update(initial_lr=rate, weight_decay=decay, lr=rate * multiplier)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule.load_state_dict(progress["schedule"])
        if self.average:
            self.average.optimization_step = progress["average_steps"]


def build_learner(
    profile: Profile,
    family: Family,
    teacher_size: int,
    accelerator: Accelerator,
    checkpoint: Path | None,
    progress: dict[str, Any],
    steps: int | None = None,
    place: SharedPlace | None = None,
) -> Learner:
    """Load the transformer and build what trains it; with a checkpoint, as it was when that was saved.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        teacher_size: width of the teacher's features.
        accelerator: device, precision and processes.
        checkpoint: to resume, if any.
        progress: what the checkpoint holds, from `read_progress`; empty without one.
        steps: how many of the run's steps train this transformer; all of them by default.
        place: where the frozen weights of several transformers take turns.
    """
    train = profile.train
    schedule = coefficient_schedule(profile)
    if progress:
        schedule.load_state_dict(progress["schedule"])
    # A checkpoint saved at the very step where alignment ends still holds the projector, and the trainer drops it.
    saved = checkpoint is not None and holds_projector(checkpoint)
    aligns = profile.crepa.enabled and (saved or not schedule.finished(progress.get("step", 0)))
    torch.manual_seed(train.seed)
    # Each process of a sharded run reads its own share, once it is known.
    load = family.hollow_transformer if train.sharding else family.load_transformer
    transformer = load(frozen_dtype(profile), int8=frozen_in_int8(profile))
    compute_attention_with(profile.train.attention, family, family.blocks(transformer))
    aligned = build_model(profile, family, transformer, teacher_size if aligns else None)
    if checkpoint is None and profile.adapter.init_from:
        start_from(transformer, family, profile.adapter)
    if train.sharding:
        shard(aligned, family.blocks(transformer), accelerator)
        family.read_weights(transformer)
    if profile.memory.stream_weights:
        aligned.on_host = stream(family.blocks(transformer), accelerator.device)
    if place is not None:
        aligned.on_host = place.add(transformer, family.blocks(transformer))
    model = replicated(aligned, accelerator)
    groups = [trainable(module) if module else [] for module in (transformer, aligned.crepa)]
    optimizer = make_optimizer(train, groups, accelerator.device)
    lr_scheduler = get_scheduler(
        train.lr_scheduler,
        optimizer,
        num_warmup_steps=train.lr_warmup_steps,
        num_training_steps=train.steps if steps is None else steps,
    )
    lr_scheduler.lr_lambdas = [
        with_floor(multiplier, train.lr_floor, train.lr_warmup_steps) for multiplier in lr_scheduler.lr_lambdas
    ]
    # All weights at once: their temporary copies would be too large in full tuning, and shares cannot be copied so.
    foreach = profile.adapter.kind == "lora" and not train.sharding
    average = EMAModel(groups[0], decay=train.ema, foreach=foreach) if train.ema else None
    learner = Learner(aligned, model, optimizer, lr_scheduler, schedule, average, accelerator, train.max_grad_norm)
    if checkpoint is not None:
        learner.load(checkpoint, progress)
    return learner
