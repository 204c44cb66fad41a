"""One step's losses: from prepared tensors and noise to what the backward starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from crepa_cli.alignment import TokenGrid
from crepa_cli.models.family import Family, Tensors
from crepa_cli.profile import Profile
from crepa_cli.training.flow import diffusion_loss

LOSSES = ("diffusion", "crepa", "layersync")
"""The terms of the total."""


class Losses(NamedTuple):
    """Of a micro-batch: 0-d tensors; None for what is off."""

    total: Tensor
    diffusion: Tensor
    crepa: Tensor | None = None
    similarity: Tensor | None = None
    self_similarity: Tensor | None = None
    layersync: Tensor | None = None


class Teaching(NamedTuple):
    """The inputs of CREPA in a step: an encoder's features `[B, T', N', D]` and their grid, and the coefficient."""

    features: Tensor | None = None
    grid: TokenGrid | None = None
    coefficient: float = 0.0


def step_losses(
    model: nn.Module,
    family: Family,
    profile: Profile,
    tensors: Tensors,
    noise: Tensor,
    sigmas: Tensor,
    teaching: Teaching,
) -> Losses:
    """The forward pass of a micro-batch; `total` has the gradient.

    Args:
        model: an `AlignedTransformer`, or what Accelerate wraps around one.
        family: of its transformer.
        profile: the weighting of the losses.
        tensors: clips and captions with a batch dimension, on the device of the model.
        noise: like the latents.
        sigmas: `[B]`.
        teaching: without features if a block is the teacher, or if alignment is off.
    """
    target = family.step(tensors, noise, sigmas)
    output = model(target.inputs, family.token_grid(tensors["latents"]), teaching.features, teaching.grid)
    diffusion = diffusion_loss(output.prediction, target, sigmas, profile.train.loss_weighting)
    total, alignment = diffusion, output.alignment
    if alignment is not None:
        total = total + teaching.coefficient * alignment.loss
    if output.layersync is not None:
        total = total + profile.layersync.lambda_ * output.layersync
    if alignment is None:
        return Losses(total, diffusion, layersync=output.layersync)
    similarities = alignment.similarity, alignment.self_similarity
    return Losses(total, diffusion, alignment.loss, *similarities, output.layersync)


def not_finite(losses: Tensors) -> list[str]:
    """The names of the losses of a micro-batch that are not finite."""
    return [term for term in LOSSES if term in losses and not torch.isfinite(losses[term])]
