"""The small video autoencoder: its constructed start, its forward over whole sequences, and its training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn

from crepa_cli.demo.clips import DIRECTIONS
from crepa_cli.demo.scenes import BACKGROUNDS, SCENE_COLORS, SCENE_SHAPES, SCENE_TEXTURES, Scene
from small_video.loop import rank, train, world

CHANNELS = 8
"""Channels of the latents."""
PATCH = 2
BATCH = 4
"""Clips of a step and process."""
RATE = 2e-3
NOISE = 0.07
"""Noise on the latents in their deviation; a decoder that has seen it forgives the transformer small errors."""
SHAPE_WEIGHT = 4.0
"""Weight of a pixel of the shape, which covers a sixth of a frame."""
SHAPES = (*SCENE_SHAPES, "star")
"""A shape more than the transformer sees, so that edges of every kind are known."""


def new_vae() -> AutoencoderKLWan:
    """A VAE that starts as local means: 8 x 8 pixels of four frames to one latent, and back.

    From the default start it does not leave the mean color of a picture for a long time.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_spatial=8,
    )
    with torch.no_grad():
        _construct(vae)
    for layer in (vae.quant_conv, vae.post_quant_conv):
        layer.requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def _construct(vae: Any) -> None:
    """Carry red, -red, green, -green, blue, -blue and a constant through all layers.

    The difference of the activations of a value and its negative is the value itself.
    """
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.mul_(0.15)
            module.conv2.bias.zero_()
            if not isinstance(module.conv_shortcut, nn.Identity):
                _carry(module.conv_shortcut, [(0, 0, 0)])
        elif isinstance(module, WanAttentionBlock):
            module.proj.weight.zero_()
            module.proj.bias.zero_()
        elif isinstance(module, WanResample):
            down = module.mode.startswith("down")
            _carry(module.resample[1], list(itertools.product((0, 1), (0, 1))) if down else [(1, 1)])
            if down:
                _carry(module.time_conv, [(1, 0, 0), (2, 0, 0)])
            elif module.mode == "upsample3d":
                _carry(module.time_conv, [(2, 0, 0)])
                # Both frames that one becomes are equal at first.
                half = len(module.time_conv.weight) // 2
                module.time_conv.weight[half:] = module.time_conv.weight[:half]
                module.time_conv.bias[half:] = module.time_conv.bias[:half]
    _split(vae.encoder.conv_in, PATCH**2)
    _split(vae.decoder.conv_in, 1)
    _join(vae.encoder.conv_out, 1)
    _join(vae.decoder.conv_out, PATCH**2)
    for layer in (vae.quant_conv, vae.post_quant_conv):
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[:CHANNELS, :CHANNELS, 0, 0, 0] = torch.eye(CHANNELS)
    # Next to no variance: noise is added in training instead.
    vae.quant_conv.bias[CHANNELS:] = -20.0


CARRIED = 7


def _carry(layer: Any, taps: list[tuple[int, ...]]) -> None:
    """The carried channels become their means over some taps of the kernel; the others stay random."""
    layer.weight[:CARRIED] = 0
    layer.bias[:CARRIED] = 0
    for channel, tap in itertools.product(range(CARRIED), taps):
        layer.weight[(channel, channel, *tap)] = 1 / len(taps)


def _split(layer: Any, parts: int) -> None:
    """Three inputs of `parts` channels each become their means, the negatives of them, and a constant."""
    layer.weight[:CARRIED] = 0
    layer.bias[:CARRIED] = 0
    layer.bias[CARRIED - 1] = 2
    for color in range(3):
        columns = slice(color * parts, (color + 1) * parts)
        layer.weight[2 * color, columns, 2, 1, 1] = 1 / parts
        layer.weight[2 * color + 1, columns, 2, 1, 1] = -1 / parts


def _join(layer: Any, parts: int) -> None:
    """The first three outputs of `parts` channels each become a color again, times what the norm took away."""
    layer.weight[: 3 * parts] = 0
    layer.bias[: 3 * parts] = 0
    for color in range(3):
        rows = slice(color * parts, (color + 1) * parts)
        layer.weight[rows, 2 * color, 2, 1, 1] = 0.4
        layer.weight[rows, 2 * color + 1, 2, 1, 1] = -0.4


def encode(vae: Any, video: Tensor) -> Tensor:
    """The mean of the latents of videos `[B, 3, F, H, W]` in [-1, 1]: `[B, C, T, h, w]`.

    Equal to the published forward, which goes four frames at a time, and faster.
    """
    x = vae.encoder.conv_in(patchify(video, PATCH).contiguous(memory_format=torch.channels_last_3d))
    for layer in vae.encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = vae.encoder.mid_block(x)
    x = vae.encoder.conv_out(vae.encoder.nonlinearity(vae.encoder.norm_out(x)))
    return vae.quant_conv(x)[:, :CHANNELS]


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Videos `[B, 3, F, H, W]` of latents, not cut off at -1 and 1; equal to the published forward."""
    latents = vae.post_quant_conv(latents).contiguous(memory_format=torch.channels_last_3d)
    x = vae.decoder.mid_block(vae.decoder.conv_in(latents))
    for block in vae.decoder.up_blocks:
        for layer in block.resnets:
            x = layer(x)
        if block.upsamplers is not None:
            x = _resample(block.upsamplers[0], x)
    x = vae.decoder.conv_out(vae.decoder.nonlinearity(vae.decoder.norm_out(x)))
    return unpatchify(x, PATCH)


def _resample(layer: Any, x: Tensor) -> Tensor:
    """Halve or double rows and columns and, of all frames but the first, the number."""
    if layer.mode.startswith("down"):
        x = _each_frame(layer, x)
        return torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    later = layer.time_conv(x[:, :, 1:])
    later = later.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
    return _each_frame(layer, torch.cat([x[:, :, :1], later], dim=2))


def _each_frame(layer: Any, x: Tensor) -> Tensor:
    pictures = x.movedim(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    pictures = layer.resample[1](layer.resample[0](pictures))
    return pictures.unflatten(0, (len(x), -1)).movedim(2, 1)


def batch_of(step: int, count: int = BATCH) -> tuple[Tensor, Tensor]:
    """Videos `[B, 3, F, H, W]` in [-1, 1] of random scenes, and whether a pixel is the shape's `[B, 1, F, H, W]`."""
    choose = random.Random(f"vae/{step}").choice
    videos = []
    for index in range(count):
        backdrop, direction = choose(list(BACKGROUNDS)), choose(list(DIRECTIONS))
        scene = Scene(choose(SCENE_TEXTURES), choose(SCENE_COLORS), choose(SHAPES), direction, backdrop)
        videos.append(scene.render(step * count + index))
    pixels = torch.stack(videos).movedim(1, 2).float()
    shape = (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)) > 25
    return pixels / 127.5 - 1, shape


Halves = tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]


def _loss(vae: Any, step: int, halves: Halves, *, frozen: bool) -> Tensor:
    """The error of colors and of their differences to neighbors in time and space.

    Args:
        vae: to train.
        step: chooses clips and noise.
        halves: `encode` and `decode`.
        frozen: train the decoder alone.
    """
    videos, shape = batch_of(step * world() + rank())
    with torch.autocast("cpu", torch.bfloat16):
        latents = halves[0](vae, videos).float()
        if frozen:
            # Compiled, the decoder is the same whether or not the encoder is trained, too.
            latents = latents.detach().requires_grad_()
        deviation = latents.detach().std((0, 2, 3, 4), keepdim=True)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step * world() + rank()))
        decoded = halves[1](vae, latents + NOISE * deviation * noise).float()
    error = decoded - videos
    weight = torch.where(shape, SHAPE_WEIGHT, 1.0)
    loss = (weight * error.abs()).mean()
    for dim in (2, 3, 4):
        later = weight.narrow(dim, 1, weight.shape[dim] - 1)
        loss = loss + 0.5 * (later * error.diff(dim=dim).abs()).mean()
    return loss / weight.mean()


def train_vae(work: Path, *, steps: int, decoder_steps: int, compiled: bool = False) -> AutoencoderKLWan:
    """Train encoder and decoder, write the latents' statistics into the configuration, then train the decoder alone."""
    vae = new_vae()
    halves = (torch.compile(encode), torch.compile(decode)) if compiled else (encode, decode)
    train(vae, lambda step: _loss(vae, step, halves, frozen=False), work / "vae.safetensors", steps=steps, rate=RATE)
    with torch.no_grad():
        latents = torch.cat([encode(vae, batch_of(-1 - index)[0]) for index in range(16)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    path = work / "decoder.safetensors"
    train(vae.decoder, lambda step: _loss(vae, 10**6 + step, halves, frozen=True), path, steps=decoder_steps, rate=RATE)
    return vae


@torch.no_grad()
def decibels(vae: Any, videos: Tensor) -> float:
    """Peak signal-to-noise ratio of videos `[B, 3, F, H, W]` in [-1, 1] after the published forward, there and back."""
    decoded = vae.decode(vae.encode(videos).latent_dist.mode()).sample
    return float(10 * torch.log10(4 / (decoded - videos).square().mean()))
