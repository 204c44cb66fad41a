"""Validation videos, sampled through the family's own pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from crepa_cli.data.images import first_frame
from crepa_cli.data.prepare import ClipForm
from crepa_cli.data.sheet import frame_row, write_sheet
from crepa_cli.data.video import write_video
from crepa_cli.models.family import Family, Tensors
from crepa_cli.processes import from_all


def sample_videos(
    family: Family,
    transformer: nn.Module,
    prompts: Sequence[Tensors],
    negative_prompt: Tensors,
    folder: Path,
    *,
    images: Sequence[str],
    form: ClipForm,
    seed: int,
    accelerator: Accelerator,
    **arguments: Any,
) -> tuple[Path, ...]:
    """Sample one mp4 per prompt into a folder, with a sheet of their frames, and return the videos' paths.

    The processes of a run share out the prompts, and the main one writes; a sharded transformer needs them all for
    each prompt.

    Args:
        family: whose pipeline samples.
        transformer: the one that is trained; it is left in training mode.
        prompts: from the cache, one for each video.
        negative_prompt: of classifier-free guidance, from the cache.
        folder: where the videos go.
        images: files of the first frames, one for each video of image to video; none for text to video.
        form: size, length and frame rate of the videos.
        seed: of the noise, the same for each prompt, so that one step's videos can be held against another's.
        accelerator: device and processes.
        arguments: for the pipeline's call: num_inference_steps, guidance_scale.
    """
    device = accelerator.device
    pipeline = family.load_sampling_pipeline(transformer)
    for component in pipeline.components.values():
        # The transformer is in its place already, and its weights cannot be moved where they are sharded.
        if isinstance(component, nn.Module) and component is not transformer:
            component.to(device)
    transformer.eval()
    mine = range(len(prompts))
    if not isinstance(transformer, FSDPModule):
        mine = mine[accelerator.process_index :: accelerator.num_processes]
    videos = []
    for index in mine:
        generator = torch.Generator().manual_seed(seed)
        inputs = family.form_arguments(**form._asdict()) | arguments
        inputs |= family.sampling_arguments(_to(prompts[index], device), _to(negative_prompt, device))
        if images:
            inputs["image"] = first_frame(images[index], form.width, form.height)
        video = pipeline(**inputs, generator=generator, output_type="pt").frames[0]
        videos.append((index, (video.float().clamp(0, 1) * 255).round().byte().cpu()))
    transformer.train()
    del pipeline
    free_memory()
    frames = dict(from_all(videos))
    if accelerator.is_main_process:
        _write_videos(folder, [frames[index] for index in range(len(prompts))], form.fps)
    return tuple(_video_path(folder, index) for index in range(len(prompts)))


def _write_videos(folder: Path, videos: Sequence[Tensor], fps: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, frames in enumerate(videos):
        write_video(_video_path(folder, index), frames, fps)
    write_sheet(folder / "sheet.png", [frame_row(frames) for frames in videos])


def _video_path(folder: Path, index: int) -> Path:
    return folder / f"{index:02d}.mp4"


def _to(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
