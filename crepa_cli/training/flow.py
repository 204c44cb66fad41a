"""Flow matching: which noise levels are trained, and how the prediction is scored (arXiv 2403.03206)."""

from __future__ import annotations

import hashlib

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from crepa_cli.models.family import TransformerStep


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator that is a pure function of `parts`.

    Everything random in a step comes from generators like this one, so that a resumed run needs no saved state to draw
    what the interrupted one would have drawn.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def sample_sigmas(
    count: int,
    sampling: str,
    shift: float,
    generator: torch.Generator,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Noise levels `[count]` in [0, 1]: drawn, then shifted by s * u / (1 + (s - 1) * u).

    Args:
        count: how many.
        sampling: `logit_normal` (mean 0, std 1) or `uniform`.
        shift: s; above 1 it moves them towards noise, as samplers do for large videos.
        generator: on the CPU.
        bounds: the lowest and the highest noise level; within them the distribution keeps its shape.
    """
    ends = torch.tensor(bounds, dtype=torch.float64)
    low, high = ends / (shift - (shift - 1) * ends)
    quantiles = torch.rand(count, generator=generator, dtype=torch.float64)
    if sampling == "uniform":
        drawn = torch.lerp(low, high, quantiles)
    else:
        drawn = torch.lerp(_logit_normal_share(low), _logit_normal_share(high), quantiles)
        drawn = torch.special.ndtri(drawn).sigmoid()
    return (shift * drawn / (1 + (shift - 1) * drawn)).float()


def _logit_normal_share(level: Tensor) -> Tensor:
    """The share of the logit-normal distribution below a level."""
    share: Tensor = torch.special.ndtr(level.logit())
    return share


def diffusion_loss(prediction: Tensor, step: TransformerStep, sigmas: Tensor, weighting: str) -> Tensor:
    """The mean squared error of the predicted velocity, weighted by noise level: a 0-d float32 tensor.

    Args:
        prediction: what the transformer returned.
        step: what it should have returned, and which of its elements count.
        sigmas: `[B]`.
        weighting: `none`, `sigma_sqrt` (1 / sigma^2) or `cosmap`.
    """
    error = (prediction.float() - step.target.float()) ** 2
    if step.weight is not None:
        error = error * step.weight / step.weight.expand_as(error).mean()
    weights: Tensor = compute_loss_weighting_for_sd3(weighting, sigmas)
    return (error.flatten(1).mean(1) * weights).mean()
