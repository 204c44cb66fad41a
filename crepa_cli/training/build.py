"""The parts of a trainer, built from the settings: the aligned transformer, the optimizer, the schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from transformers.optimization import Adafactor

from crepa_cli.alignment import CoefficientSchedule, Crepa
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.profile import LayerSyncSettings, Profile, TrainSettings, step_count
from crepa_cli.training.adapter import make_trainable
from crepa_cli.training.aligned import AlignedTransformer, BlockPair
from crepa_cli.training.placement.recompute import recompute_finely
from crepa_cli.training.placement.runner import block_runner

PRODIGY = {"use_bias_correction": True, "safeguard_warmup": True}
"""Recommended by its authors for diffusion models."""


def frozen_dtype(profile: Profile) -> torch.dtype:
    """The dtype that the transformer is loaded in."""
    # What is trained is kept in float32: steps of 1e-5 of a weight are lost in bfloat16.
    return torch.float32 if profile.adapter.kind == "full" else torch_dtype(profile.model.dtype)


def frozen_in_int8(profile: Profile) -> bool:
    """Whether the transformer is loaded with linear layers in int8."""
    return profile.memory.quantize_base == "int8"


def build_model(
    profile: Profile, family: Family, transformer: ModelMixin, feature_size: int | None
) -> AlignedTransformer:
    """The transformer with what is trained of it, and its alignment.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        transformer: in `frozen_dtype`.
        feature_size: width of the teacher's features; None for a transformer without alignment.
    """
    settings = profile.crepa
    make_trainable(transformer, profile.adapter)
    blocks = family.blocks(transformer)
    if profile.recomputes_blocks:
        transformer.enable_gradient_checkpointing(block_runner(profile.memory, blocks))
    if profile.memory.finer_recompute:
        recompute_finely(family, blocks)
    if profile.train.compile:
        compile_blocks(blocks)
    crepa = None
    if feature_size is not None:
        crepa = Crepa(
            family.hidden_size,
            feature_size,
            adjacent_distance=settings.adjacent_distance,
            adjacent_tau=settings.tau(family.frame_multiple / profile.data.fps),
            cumulative_neighbors=settings.cumulative_neighbors,
            spatial_align=settings.spatial_align,
            normalize_by_frames=settings.normalize_by_frames,
            objective=settings.objective,
            projector=settings.projector,
            spatial_norm=settings.spatial_norm,
        )
    teacher_block = settings.teacher_block_index if settings.use_backbone_features else None
    return AlignedTransformer(
        transformer,
        crepa,
        blocks=blocks,
        pair=BlockPair(settings.block_index, teacher_block),
        layersync=layersync_blocks(profile.layersync),
        row_major=family.row_major,
    ).train()


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Have torch compile each block when it runs first."""
    for block in blocks:
        # Not block.compile(): that would compile the capturing hooks too.
        block.forward = torch.compile(block.forward)


def layersync_blocks(settings: LayerSyncSettings) -> BlockPair | None:
    """The two blocks of LayerSync, or None if it is off."""
    if not settings.enabled or settings.student_block is None:
        return None
    return BlockPair(settings.student_block, settings.teacher_block)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def coefficient_schedule(profile: Profile) -> CoefficientSchedule:
    """The schedule that the settings describe."""
    crepa, total = profile.crepa, profile.train.steps
    return CoefficientSchedule(
        peak=crepa.lambda_,
        total_steps=total,
        scheduler=crepa.scheduler,
        end=crepa.lambda_end,
        warmup_steps=step_count(crepa.warmup_steps, total),
        decay_steps=step_count(crepa.decay_steps, total),
        power=crepa.power,
        cutoff_step=step_count(crepa.cutoff_step, total),
        similarity_threshold=crepa.similarity_threshold,
        similarity_ema_decay=crepa.similarity_ema_decay,
        threshold_mode=crepa.threshold_mode,
    )


def make_optimizer(
    train: TrainSettings, groups: list[list[nn.Parameter]], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of the settings.

    Args:
        train: the settings.
        groups: of parameters; some may be empty.
        device: that trains.
    """
    parameters = [{"params": group} for group in groups]
    common: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    if train.optimizer == "adafactor":
        # By itself it would choose the learning rate, and scale it by the size of the weights: 0 for a new LoRA.
        adafactor: torch.optim.Optimizer = Adafactor(parameters, scale_parameter=False, relative_step=False, **common)
        return adafactor
    common |= {"betas": (train.beta1, train.beta2), "eps": train.eps}
    if train.optimizer == "adamw":
        # In one kernel, without the temporary copies that updating all parameters at once takes.
        return torch.optim.AdamW(parameters, fused=device.type == "cuda", **common)
    # runs.checks has made sure that its package is installed.
    if train.optimizer == "prodigy":
        with redirect_stdout(None):  # it prints a line
            prodigy: torch.optim.Optimizer = import_module("prodigyopt").Prodigy(parameters, **PRODIGY, **common)
        for group in prodigy.param_groups:  # its first step adds these, and a checkpoint is loaded before that
            group |= {"d_denom": 0.0, "d_hat": group["d0"]}
        return prodigy
    optimizer: torch.optim.Optimizer = import_module("bitsandbytes.optim").AdamW8bit(parameters, **common)
    return optimizer


def with_floor(multiplier: Callable[[int], float], floor: float, warmup: int) -> Callable[[int], float]:
    """A schedule of the learning rate that ends at `floor` in place of 0; its warmup stays as it is.

    Args:
        multiplier: of the learning rate, at most 1, by step.
        floor: share of the learning rate.
        warmup: steps before the schedule decays.
    """
    return lambda step: multiplier(step) if step < warmup else floor + (1 - floor) * multiplier(step)
