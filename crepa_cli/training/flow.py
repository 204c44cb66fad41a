"""Which noise levels are trained, and how the prediction is scored (arXiv 2403.03206)."""

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


STRETCHED_QUANTILES = 0.005, 0.999
"""Shares of the shifted logit-normal distribution whose noise levels `stretched` moves to 0 and 1 (LTX-2's trainer)."""
UNIFORM_SHARE = 0.1
"""The share of the noise levels that `stretched` draws uniformly (LTX-2's trainer)."""

SPREAD_DRAWS = 2**14
"""Noise levels from which `spread_sigmas` takes its own; each is exact to about 0.01."""


def sample_sigmas(
    count: int,
    sampling: str,
    shift: float,
    generator: torch.Generator,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Noise levels `[count]` in [0, 1]: drawn, then shifted by s * u / (1 + (s - 1) * u).

    A shift that grows with the clip leaves a long clip next to no low noise. `stretched` therefore scales the shifted
    levels linearly so that their 0.5 and 99.9 % quantiles become 0 and 1, and draws one level in ten uniformly.

    Args:
        count: how many.
        sampling: `logit_normal` (mean 0, std 1), `stretched` (the same, stretched) or `uniform`.
        shift: s; above 1 it moves them towards noise, as samplers do for large videos.
        generator: on the CPU.
        bounds: the lowest and the highest noise level; within them the distribution keeps its shape.
    """
    ends = torch.tensor(bounds, dtype=torch.float64)
    quantiles = torch.rand(count, generator=generator, dtype=torch.float64)
    if sampling == "stretched":
        sigmas = _stretched(quantiles, ends, shift)
        uniform = torch.lerp(ends[0], ends[1], torch.rand(count, generator=generator, dtype=torch.float64))
        chosen = torch.rand(count, generator=generator, dtype=torch.float64) < UNIFORM_SHARE
        return torch.where(chosen, uniform, sigmas).float()
    low, high = _unshifted(ends, shift)
    if sampling == "uniform":
        return _shifted(torch.lerp(low, high, quantiles), shift).float()
    return _shifted(_logit_normal(quantiles, low, high), shift).float()


def spread_sigmas(count: int, sampling: str, shift: float, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Noise levels `[count]` in ascending order that divide the distribution of `sample_sigmas` into equal shares."""
    each = SPREAD_DRAWS // count
    drawn = sample_sigmas(each * count, sampling, shift, seeded_generator("spread"), bounds).sort().values
    return drawn[each // 2 :: each]


def _stretched(quantiles: Tensor, ends: Tensor, shift: float) -> Tensor:
    """The levels at these shares of the stretched distribution between two levels."""
    lowest, highest = _shifted(torch.special.ndtri(ends.new_tensor(STRETCHED_QUANTILES)).sigmoid(), shift)
    low, high = _unshifted(torch.lerp(lowest, highest, ends), shift)
    levels = _shifted(_logit_normal(quantiles, low, high), shift)
    stretched: Tensor = (levels - lowest) / (highest - lowest)
    return stretched


def _logit_normal(quantiles: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The levels at these shares of the logit-normal distribution between two levels."""
    shares = torch.lerp(_logit_normal_share(low), _logit_normal_share(high), quantiles)
    levels: Tensor = torch.special.ndtri(shares).sigmoid()
    return levels


def _shifted(levels: Tensor, shift: float) -> Tensor:
    return shift * levels / (1 + (shift - 1) * levels)


def _unshifted(levels: Tensor, shift: float) -> Tensor:
    return levels / (shift - (shift - 1) * levels)


def _logit_normal_share(level: Tensor) -> Tensor:
    """The share of the logit-normal distribution below a level."""
    share: Tensor = torch.special.ndtr(level.logit())
    return share


def diffusion_loss(prediction: Tensor, step: TransformerStep, sigmas: Tensor, weighting: str) -> Tensor:
    """The mean squared error of the prediction, weighted by noise level: a 0-d float32 tensor.

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
