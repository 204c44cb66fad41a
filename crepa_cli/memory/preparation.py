"""Memory of the preparation: its models, which are never loaded together, each run on fake tensors for one clip."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from crepa_cli.alignment import TokenGrid
from crepa_cli.data.buckets import Bucket
from crepa_cli.data.encoder import encoder_config
from crepa_cli.data.online import clip_features
from crepa_cli.kept import kept
from crepa_cli.memory.repeats import run_vae_once_per_shape
from crepa_cli.memory.shapes import Clips
from crepa_cli.memory.step import fake_memory, make_fake
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.models.streaming import place
from crepa_cli.profile import CrepaSettings, Profile
from crepa_cli.teachers.dinov2 import Dinov2Teacher, encoder_dtype


def predict_preparation(
    profile: Profile, family: Family, bucket: Bucket, clips: Clips, device: torch.device
) -> dict[str, int]:
    """Peak bytes of each model of the preparation, weights included.

    Args:
        profile: the resolved settings.
        family: of the checkpoint, of which only configurations are read.
        bucket: the shape of a clip.
        clips: the tensors of clips of this shape.
        device: the device that prepares them.

    Raises:
        UserError: if a configuration cannot be read.
    """
    peaks = _kept_text_encoders(family, clips, torch_dtype(profile.model.dtype)) | {"VAE": vae_peak(family, bucket)}
    if clips.teacher is not None:
        peaks |= _kept_teacher(profile.crepa, bucket, clips.teacher, encoder_dtype(device))
    return peaks


def _kept_text_encoders(family: Family, clips: Clips, dtype: torch.dtype) -> dict[str, int]:
    """The peak of the text encoders, which is stored for all tasks and sizes of clips."""
    configs = [family.base.read_config(f"{name}/config.json") for name in family.text_encoders]
    facts = [family.name, configs, len(clips.tensors["prompt_embeds"]), dtype, family.streams_text_encoders]
    return kept(["text encoder", *facts], lambda: {"text encoder": text_encoders_peak(family, clips, dtype)})


def _kept_teacher(crepa: CrepaSettings, bucket: Bucket, grid: TokenGrid, dtype: torch.dtype) -> dict[str, int]:
    """The peak of the vision encoder, which is stored for all families."""
    facts = [encoder_config(crepa), bucket.height, bucket.width, asdict(grid), dtype]
    return kept(["vision encoder", *facts], lambda: {"vision encoder": _teacher_peak(crepa, bucket, grid, dtype)})


@torch.no_grad()
def text_encoders_peak(family: Family, clips: Clips, dtype: torch.dtype) -> int:
    """The text encoders on the longest caption; instructions that some pipelines add take a few MB more."""
    encoders = [family.base.empty_model(name, dtype) for name in family.text_encoders]
    caption = len(clips.tensors["prompt_embeds"])
    with fake_memory() as live:
        for encoder in encoders:
            make_fake(encoder)
            place(encoder, torch.device("cpu"), streamed=family.streams_text_encoders)
        live.reset_peak()
        family.run_text_encoders(encoders, caption)
        return live.peak


@torch.no_grad()
def vae_peak(family: Family, bucket: Bucket) -> int:
    """The VAE without its decoder on one clip, and the image encoder, if there is one, on its first frame."""
    pipeline = family.empty_vae_pipeline()
    pipeline.vae.decoder = None
    image_encoder = family.base.empty_model(family.image_encoder, family.vae_dtype) if family.image_encoder else None
    with fake_memory() as live:
        make_fake(pipeline.vae)
        run_vae_once_per_shape(pipeline.vae, "encoder", live)
        if image_encoder is not None:
            make_fake(image_encoder)
            side = image_encoder.config.image_size
            image_encoder(torch.empty(1, 3, side, side, dtype=family.vae_dtype), output_hidden_states=True)
        video = torch.empty(3, bucket.frames, bucket.height, bucket.width)
        family.without_image_encoder().encode_clip(pipeline, video)
        return live.peak


def _teacher_peak(crepa: CrepaSettings, bucket: Bucket, grid: TokenGrid, dtype: torch.dtype) -> int:
    """The vision encoder on the frames of one clip."""
    model = _empty_teacher(crepa, dtype)
    patch_size = model.config.patch_size
    with fake_memory() as live:
        make_fake(model)
        frames = torch.empty(grid.frames, 3, bucket.height, bucket.width, dtype=torch.uint8)
        Dinov2Teacher(model).features(frames, (grid.rows * patch_size, grid.columns * patch_size))
        return live.peak


def online_teacher_weights(family: Family, crepa: CrepaSettings, device: torch.device) -> int:
    """Bytes of the VAE and the vision encoder that `teacher_cache = false` keeps in memory."""
    vae = family.empty_vae_pipeline().vae
    if crepa.drop_vae_encoder:
        vae.encoder = None
    teacher = _empty_teacher(crepa, encoder_dtype(device))
    return sum(weight.nbytes for model in (vae, teacher) for weight in model.parameters())


@torch.no_grad()
def online_teacher_work(family: Family, crepa: CrepaSettings, latents: Tensor, device: torch.device) -> int:
    """The most bytes that they hold beside their weights for one clip's latents `[C, T, h, w]`.

    They are freed before the transformer's step begins.
    """
    pipeline, model = family.empty_vae_pipeline(), _empty_teacher(crepa, encoder_dtype(device))
    with fake_memory() as live:
        make_fake(pipeline.vae)
        make_fake(model)
        run_vae_once_per_shape(pipeline.vae, "decoder", live)
        given = torch.empty(latents.shape)
        held = live.live
        clip_features(family, crepa, pipeline, Dinov2Teacher(model), given)
        return live.peak - held


def _empty_teacher(crepa: CrepaSettings, dtype: torch.dtype) -> Any:
    """The vision encoder, on the meta device."""
    config = AutoConfig.for_model(**encoder_config(crepa))
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=dtype)
