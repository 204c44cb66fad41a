"""Noise processes: how latents are noised, and what the transformer predicts from them.

Noise levels go from 0 for clean latents to 1 for noise alone, in every process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class NoiseProcess(ABC):
    """The process that a family is trained by."""

    can_be_weighted: ClassVar[bool]
    """Whether `train.loss_weighting` has formulas for its noise levels."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The noisy latents `[B, C, T, h, w]`.

        Args:
            latents: of clips.
            noise: like the latents, standard normal.
            levels: `[B]`.
        """

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The prediction that is right, with the arguments of `add_noise` and in the same shape."""


class Flow(NoiseProcess):
    """Flow matching: latents and noise are mixed linearly, and the velocity is predicted.

    A noise level is sigma, the share of noise (arXiv 2209.03003, 2403.03206).
    """

    can_be_weighted = True

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """`(1 - sigma) * latents + sigma * noise`; sigmas broadcast from the left."""
        sigmas = _from_the_left(levels, latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:  # noqa: ARG002 (the same at every level)
        """The velocity `noise - latents`."""
        return noise - latents


class VPrediction(NoiseProcess):
    """Diffusion in discrete timesteps, whose variance is constant, and v as the prediction (arXiv 2202.00512).

    A noise level is a timestep divided by their number: uniform levels are uniform timesteps.

    Args:
        alphas: the share of the latents in the variance at each timestep, `[N]`, as a scheduler of diffusers holds it
            in `alphas_cumprod`.
    """

    can_be_weighted = False

    def __init__(self, alphas: Tensor) -> None:
        # Numbers, because the fake tensors of a memory prediction do not go with real ones.
        self._latents: list[float] = alphas.double().sqrt().tolist()
        self._noise: list[float] = (1 - alphas.double()).sqrt().tolist()
        self._kept: dict[torch.device, Tensor] = {}

    def timesteps(self, levels: Tensor) -> Tensor:
        """The timesteps `[B]` of noise levels, int64."""
        count = len(self._noise)
        return (levels * count).long().clamp(max=count - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """`sqrt(alpha) * latents + sqrt(1 - alpha) * noise`."""
        of_latents, of_noise = self._factors(levels, latents)
        return of_latents * latents + of_noise * noise

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """v, which is `sqrt(alpha) * noise - sqrt(1 - alpha) * latents`.

        Its mean squared error is that of the latents that follow from it, times `1 / (1 - alpha)`.
        """
        of_latents, of_noise = self._factors(levels, latents)
        return of_latents * noise - of_noise * latents

    def _factors(self, levels: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the latents and of the noise in the noisy latents, broadcast to these."""
        of_latents, of_noise = self._tables(levels.device)[:, self.timesteps(levels)]
        return _from_the_left(of_latents, latents), _from_the_left(of_noise, latents)

    def _tables(self, device: torch.device) -> Tensor:
        """The factors at all timesteps, `[2, N]`; on a GPU the same tensor every time, as a copy makes the CPU wait."""
        if device in self._kept:
            return self._kept[device]
        tables = torch.tensor([self._latents, self._noise], device=device)
        # Fake tensors are on the CPU too, and belong to one prediction.
        if device.type != "cpu":
            self._kept[device] = tables
        return tables


def _from_the_left(levels: Tensor, latents: Tensor) -> Tensor:
    """`[B]` as `[B, 1, ...]`, to broadcast to latents."""
    return levels.view(-1, *[1] * (latents.ndim - 1))
