"""Validation videos, sampled through the family's own pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import free_memory
from torch import nn

from crepa_cli.data.video import write_video
from crepa_cli.models.family import Family, Tensors


def sample_videos(
    family: Family,
    transformer: nn.Module,
    prompts: Sequence[Tensors],
    negative_prompt: Tensors,
    folder: Path,
    *,
    fps: float,
    seed: int,
    device: torch.device,
    **arguments: Any,
) -> tuple[Path, ...]:
    """Sample one mp4 per prompt into a folder and return their paths.

    Args:
        family: whose pipeline samples.
        transformer: the one that is trained; it is left in training mode.
        prompts: from the cache, one for each video.
        negative_prompt: of classifier-free guidance, from the cache.
        folder: where the videos go.
        fps: of the videos.
        seed: of the noise, the same for each prompt, so that one step's videos can be held against another's.
        device: where the pipeline runs.
        arguments: for the pipeline's call: width, height, num_frames, num_inference_steps, guidance_scale.
    """
    pipeline = family.load_sampling_pipeline(transformer).to(device)
    transformer.eval()
    paths = []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed)
        inputs = family.sampling_arguments(_to(prompt, device), _to(negative_prompt, device))
        video = pipeline(**inputs, **arguments, generator=generator, output_type="pt").frames[0]
        paths.append(folder / f"{index:02d}.mp4")
        write_video(paths[-1], (video.float().clamp(0, 1) * 255).round().byte(), fps)
    transformer.train()
    del pipeline
    free_memory()
    return tuple(paths)


def _to(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
