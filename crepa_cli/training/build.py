"""The parts of a trainer, built from the settings: the aligned transformer, the optimizer, the schedule."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from torch import nn

from crepa_cli.alignment import CoefficientSchedule, Crepa
from crepa_cli.errors import RunError
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.profile import LayerSyncSettings, Profile, step_count
from crepa_cli.training.adapter import make_trainable
from crepa_cli.training.aligned import AlignedTransformer, BlockPair


def frozen_dtype(profile: Profile) -> torch.dtype:
    """The dtype that the transformer is loaded in."""
    # What is trained is kept in float32: steps of 1e-5 of a weight are lost in bfloat16.
    return torch.float32 if profile.adapter.kind == "full" else torch_dtype(profile.model.dtype)


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
    if profile.train.activation_checkpointing:
        transformer.enable_gradient_checkpointing()
    blocks = family.blocks(transformer)
    if profile.train.compile:
        for block in blocks:
            # Not block.compile(): that would compile the capturing hooks too.
            block.forward = torch.compile(block.forward)
    crepa = None
    if feature_size is not None:
        crepa = Crepa(
            family.hidden_size,
            feature_size,
            adjacent_distance=settings.adjacent_distance,
            adjacent_tau=settings.adjacent_tau,
            cumulative_neighbors=settings.cumulative_neighbors,
            spatial_align=settings.spatial_align,
            normalize_by_frames=settings.normalize_by_frames,
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
    name: str, groups: list[list[nn.Parameter]], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer over groups of parameters, of which some may be empty.

    Raises:
        RunError: if its package is not installed.
    """
    parameters = [{"params": group} for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise RunError("optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    return optimizer
