"""What every family promises for each of its tasks."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import OpenTiny, moving_pattern
from PIL import Image
from torch import Tensor

from crepa_cli.models import FAMILIES, load_family
from crepa_cli.models.family import Family, Tensors
from crepa_cli.training.aligned import HiddenStateCapture
from crepa_cli.training.flow import diffusion_loss, sample_sigmas

CAPTION = "colored waves drift"
TASKS = [(name, task) for name in FAMILIES for task in load_family(name).pipelines]


def encoded_clip(family: Family, frames: int, height: int, width: int) -> tuple[Tensor, Tensors]:
    """A video and the tensors that the preparation stores for it, without a batch dimension."""
    video = moving_pattern(frames, height, width)
    with torch.no_grad():
        tensors = family.encode_clip(family.load_vae_pipeline(), video)
        tensors |= family.encode_prompt(family.load_text_pipeline(torch.float32), CAPTION)
    return video, tensors


def batch_of(tensors: Tensors, size: int) -> Tensors:
    return {name: torch.stack([tensor] * size) for name, tensor in tensors.items()}


def first_frame(video: Tensor) -> Image.Image:
    pixels = ((video[:, 0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_an_overfitted_transformer_gives_its_clip_back(name: str, task: str, open_tiny: OpenTiny) -> None:
    """Noise, target, timesteps, normalization and conditions agree with the published pipeline, or this fails."""
    torch.manual_seed(0)
    family = open_tiny(name, task)
    height = width = 2 * family.size_multiple
    frames = 2 * family.frame_multiple + 1
    video, tensors = encoded_clip(family, frames, height, width)
    batch = batch_of(tensors, 8)

    transformer = family.load_transformer(torch.float32).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=4e-3, weight_decay=0.0)
    steps = 300
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        sigmas = sample_sigmas(8, "logit_normal", family.timestep_shift, generator)
        noise = torch.randn(batch["latents"].shape, generator=generator)
        step = family.step(batch, noise, sigmas)
        prediction = transformer(**step.inputs, return_dict=False)[0]
        diffusion_loss(prediction, step, sigmas, "none").backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    pipeline_class = getattr(diffusers, family.pipelines[task])
    pipeline = pipeline_class.from_pretrained(family.checkpoint, transformer=transformer.eval())
    arguments: dict[str, Any] = {"image": first_frame(video)} if task == "i2v" else {}
    sampled = pipeline(
        prompt=CAPTION,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=30,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **arguments,
    ).frames
    similarity = torch.cosine_similarity(sampled.flatten(), tensors["latents"].flatten(), dim=0)
    assert similarity >= 0.8


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_captured_tokens_are_where_the_grid_says(name: str, task: str, open_tiny: OpenTiny) -> None:
    """One changed patch of one latent frame changes most the state at its own frame, row and column."""
    torch.manual_seed(0)
    family = open_tiny(name, task)
    multiple, frames = family.size_multiple, 3 * family.frame_multiple + 1
    _, tensors = encoded_clip(family, frames, height=4 * multiple, width=6 * multiple)
    batch = batch_of(tensors, 2)
    transformer = family.load_transformer(torch.float32).eval()
    grid = family.token_grid(batch["latents"])
    capture = HiddenStateCapture(family.blocks(transformer), [0])
    noise, sigmas = torch.randn_like(batch["latents"]), torch.full((2,), 0.5)

    def states(noise: Tensor) -> Tensor:
        step = family.step(batch, noise, sigmas)
        with torch.no_grad(), capture.recording() as recorded:
            transformer(**step.inputs, return_dict=False)
        return family.row_major(recorded[0], grid)

    before = states(noise)
    assert before.shape[:3] == (2, grid.frames, grid.tokens)
    scale_t, scale_h, scale_w = (
        size // tokens for size, tokens in zip(noise.shape[2:], (grid.frames, grid.rows, grid.columns), strict=True)
    )
    for clip, frame, row, column in [(0, 1, 0, 1), (1, 2, 3, 4), (0, grid.frames - 1, 2, 0), (1, 1, 1, 5)]:
        changed = noise.clone()
        changed[
            clip,
            :,
            frame * scale_t : (frame + 1) * scale_t,
            row * scale_h : (row + 1) * scale_h,
            column * scale_w : (column + 1) * scale_w,
        ] += 3.0
        change = (states(changed) - before).norm(dim=-1)
        assert change.flatten().argmax() == (clip * grid.frames + frame) * grid.tokens + row * grid.columns + column
