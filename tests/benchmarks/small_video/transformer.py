"""The small video transformer, trained together with its text encoder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from crepa_cli.demo.scenes import Scene, all_scenes
from small_video import vae as video
from small_video.loop import rank, train, world
from small_video.text import TOKENS, embed, new_text_encoder, new_tokenizer, padding_bias

HELD_OUT = 40
"""Scenes that are never trained on: the first of `all_scenes()`."""
BATCH = 8
"""Clips of a step and process."""
RATE = 1.5e-3
SHIFT = 3.0
"""That of the scheduler; it moves the noise levels up, where directions are decided."""
UNIFORM = 0.15
"""Share of the noise levels that are uniform; the rest is logit-normal."""
EMPTY = 0.12
"""Share of the captions that are left out, for classifier-free guidance."""


def held_out() -> list[Scene]:
    """The scenes that the model has not seen; each of their words it has."""
    return all_scenes()[:HELD_OUT]


def new_transformer() -> WanTransformer3DModel:
    """Ten blocks of width 96 whose output starts at 0."""
    torch.manual_seed(1)
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=video.CHANNELS,
        out_channels=video.CHANNELS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=256,
        num_layers=10,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


class _FewTokens:
    """Cross-attention to few tokens of padding in place of hundreds."""

    def __init__(self) -> None:
        self.bias: Tensor | None = None
        self._published = WanAttnProcessor()

    def __call__(self, attn: Any, hidden: Tensor, text: Tensor, *_: Any) -> Tensor:
        attended: Tensor = self._published(attn, hidden, text, self.bias)
        return attended


@contextmanager
def few_tokens(transformer: Any) -> Iterator[_FewTokens]:
    """Let a transformer attend to a prompt of few tokens, with the bias that the result holds."""
    few = _FewTokens()
    for block in transformer.blocks:
        block.attn2.set_processor(few)
    yield few
    for block in transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())


@torch.no_grad()
def encoded_clips(vae: AutoencoderKLWan, path: Path, scenes: list[Scene], *, seeds: int) -> dict[str, Tensor]:
    """Normalized latents `[N, C, T, h, w]` of `seeds` clips of every scene, and its number `[N]`; kept in a file."""
    if path.exists():
        return load_file(path)
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    latents, numbers = [], []
    for number, scene in enumerate(scenes):
        pixels = torch.stack([scene.render(seed) for seed in range(seeds)]).movedim(1, 2) / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(((video.encode(vae, pixels).float() - mean) / std).half())
        numbers += [number] * seeds
    clips = {"latents": torch.cat(latents).contiguous(), "scenes": torch.tensor(numbers)}
    if rank() == 0:
        save_file(clips, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    return clips


def _batch(step: int, clips: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise, noise levels `[B]`, numbers of the scenes, and which captions are left out, of a step."""
    share = step * world() + rank()
    chosen = torch.tensor(random.Random(f"transformer/{share}").choices(range(len(clips["latents"])), k=BATCH))
    latents = clips["latents"][chosen].float()
    generator = torch.Generator().manual_seed(share)
    noise = torch.randn(latents.shape, generator=generator)
    normal = torch.randn(BATCH, generator=generator).sigmoid()
    uniform, kind, empty = torch.rand(3, BATCH, generator=generator)
    sigmas = torch.where(kind < UNIFORM, uniform, normal)
    sigmas = SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)
    return latents, noise, sigmas, clips["scenes"][chosen], empty < EMPTY


def train_transformer(
    vae: AutoencoderKLWan, work: Path, scenes: list[Scene], *, steps: int, seeds: int, compiled: bool = False
) -> tuple[WanTransformer3DModel, UMT5EncoderModel]:
    """Train the transformer and its text encoder on `seeds` clips of every scene that the VAE has encoded."""
    clips = encoded_clips(vae, work / "latents.safetensors", scenes, seeds=seeds)
    tokenizer = new_tokenizer()
    text_encoder, transformer = new_text_encoder(len(tokenizer)), new_transformer()
    parts = nn.ModuleDict({"text": text_encoder, "transformer": transformer})
    if compiled:
        transformer.compile_repeated_blocks()
    captions = [scene.caption for scene in scenes]
    encoded = tokenizer([*captions, ""], padding="max_length", max_length=TOKENS, return_tensors="pt")

    def loss_of(step: int) -> Tensor:
        latents, noise, sigmas, numbers, empty = _batch(step, clips)
        numbers = torch.where(empty, len(captions), numbers)
        mask = encoded.attention_mask[numbers]
        level = sigmas.view(-1, 1, 1, 1, 1)
        prompt = embed(text_encoder, encoded.input_ids[numbers], mask)
        few.bias = padding_bias(mask)
        noisy = (1 - level) * latents + level * noise
        flow = transformer(noisy, sigmas * 1000, prompt, return_dict=False)[0]
        return (flow - (noise - latents)).square().mean()

    with few_tokens(transformer) as few:
        train(parts, loss_of, work / "transformer.safetensors", steps=steps, rate=RATE, average=0.998)
    return transformer, text_encoder
