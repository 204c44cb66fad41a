"""The models that encode clips: the VAE, and the encoder that the settings name as the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from crepa_cli.alignment.grid import teaching_frames
from crepa_cli.data.buckets import Bucket
from crepa_cli.hub.download import Need, fetch
from crepa_cli.hub.read import read_config
from crepa_cli.models.family import Family
from crepa_cli.profile import CrepaSettings
from crepa_cli.teachers.dinov2 import ENCODERS, Dinov2Teacher, input_size


class TeacherInput(NamedTuple):
    """The frames of a clip that the encoder sees, and the height and width at which it does."""

    frames: list[int]
    size: tuple[int, int]


def load_encoding_vae(family: Family, device: torch.device) -> DiffusionPipeline:
    """The pipeline that `clip_latents` needs."""
    pipeline = family.load_vae_pipeline()
    pipeline.vae.decoder = None  # up to half of the weights, which no clip needs
    return pipeline.to(device)


def load_teacher(crepa: CrepaSettings, device: torch.device) -> Dinov2Teacher:
    """Load the encoder named in the settings."""
    return Dinov2Teacher.load(encoder_folder(crepa), device)


def encoder_need(crepa: CrepaSettings) -> Need:
    """The repository or folder of the encoder."""
    return Need(ENCODERS.get(crepa.encoder, crepa.encoder), crepa.encoder_revision, ("",))


def encoder_folder(crepa: CrepaSettings) -> Path:
    """The local folder of the encoder, downloaded if necessary."""
    return fetch(encoder_need(crepa))


def encoder_config(crepa: CrepaSettings) -> dict[str, Any]:
    """The encoder's configuration, with its patch size and the width of its features."""
    need = encoder_need(crepa)
    return read_config(need.name, "config.json", need.revision)


def teacher_input(family: Family, crepa: CrepaSettings, bucket: Bucket, latents: Tensor) -> TeacherInput:
    """The part of a bucket's clips that the encoder sees, for latents `[C, T, h, w]` of one of them."""
    grid = family.token_grid(latents[None])
    frames = teaching_frames(bucket.frames, grid.frames, crepa.teacher_frame)
    return TeacherInput(frames, input_size(crepa.encoder_image_size, grid, encoder_config(crepa)["patch_size"]))
