"""Videos to latents and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def encoded_latents(vae: Any, video: Tensor, generator: torch.Generator | None) -> Tensor:
    """The mode of a VAE's posterior, or a sample of it: `[C, T, h, w]`, float32.

    Args:
        vae: of diffusers.
        video: `[3, F, H, W]` in [-1, 1].
        generator: draws the sample, on the CPU; None for the mode.
    """
    posterior = vae.encode(video[None].to(vae.device, vae.dtype)).latent_dist
    latents: Tensor = posterior.mode().float()
    if generator is not None:
        latents = latents + posterior.std.float() * torch.randn(latents.shape, generator=generator).to(latents)
    return latents[0]


def scaled_latents(vae: Any, video: Tensor, generator: torch.Generator | None) -> Tensor:
    """The latents of `encoded_latents`, times the VAE's factor."""
    latents: Tensor = encoded_latents(vae, video, generator) * vae.config.scaling_factor
    return latents


def video_of_scaled(vae: Any, latents: Tensor) -> Tensor:
    """The video of scaled latents `[C, T, h, w]`: `[3, F, H, W]` in [-1, 1], float32."""
    latents = (latents / vae.config.scaling_factor)[None].to(vae.device, vae.dtype)
    video: Tensor = vae.decode(latents, return_dict=False)[0][0]
    return video.float().clamp(-1, 1)


def normalized_latents(vae: Any, video: Tensor, generator: torch.Generator | None) -> Tensor:
    """The latents of `encoded_latents`, normalized with the mean and std of the VAE.

    Args:
        vae: with `latents_mean` and `latents_std` per channel, in its configuration or as buffers.
        video: as in `encoded_latents`.
        generator: as in `encoded_latents`.
    """
    latents = encoded_latents(vae, video, generator)
    mean, std = _latent_statistics(vae, latents)
    return (latents - mean) / std


def decoded_video(vae: Any, latents: Tensor, *arguments: Any) -> Tensor:
    """The video of normalized latents `[C, T, h, w]`: `[3, F, H, W]` in [-1, 1], float32.

    Args:
        vae: as in `normalized_latents`.
        latents: normalized.
        arguments: further ones that its decoder takes.
    """
    mean, std = _latent_statistics(vae, latents)
    latents = (latents * std + mean)[None].to(vae.device, vae.dtype)
    video: Tensor = vae.decode(latents, *arguments, return_dict=False)[0][0]
    return video.float().clamp(-1, 1)


def _latent_statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    statistics = dict(vae.config) | dict(vae.named_buffers())
    mean, std = (torch.as_tensor(statistics[name]).to(latents) for name in ("latents_mean", "latents_std"))
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1) / statistics.get("scaling_factor", 1.0)
