"""Teacher features computed in every step from the VAE's decoded video, for `teacher_cache = false`."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.alignment.grid import teaching_frames
from crepa_cli.data.encoder import load_teacher
from crepa_cli.models.family import Family
from crepa_cli.profile import CrepaSettings
from crepa_cli.teachers.dinov2 import Dinov2Teacher, input_size


class OnlineTeacher:
    """A VAE's decoder and a vision encoder that stay in memory during the whole training.

    Args:
        family: provides the VAE.
        crepa: the vision encoder, its input, and whether to drop the VAE's own encoder.
        device: the device of both.
    """

    def __init__(self, family: Family, crepa: CrepaSettings, device: torch.device) -> None:
        self.family, self.crepa = family, crepa
        self.pipeline = family.load_vae_pipeline()
        if crepa.drop_vae_encoder:
            self.pipeline.vae.encoder = None
        self.pipeline.to(device)
        self.teacher = load_teacher(crepa, device)

    @torch.no_grad()
    def features(self, latents: Tensor) -> tuple[Tensor, TokenGrid]:
        """Features `[B, T, N, D]` of clean latents `[B, C, T, h, w]`, on the latents' device, and their grid."""
        clips = [clip_features(self.family, self.crepa, self.pipeline, self.teacher, clip) for clip in latents]
        features = torch.stack(clips)
        return features.flatten(2, 3).to(latents.device), TokenGrid(*features.shape[1:4])


def clip_features(
    family: Family, crepa: CrepaSettings, pipeline: DiffusionPipeline, teacher: Dinov2Teacher, latents: Tensor
) -> Tensor:
    """Features `[T, rows, columns, D]` of one clip's latents `[C, T, h, w]`, decoded by a pipeline's VAE."""
    grid = family.token_grid(latents[None])
    video = family.decode_latents(pipeline, latents)
    taught = teaching_frames(video.shape[1], grid.frames, crepa.teacher_frame)
    chosen = video[:, taught].transpose(0, 1)
    frames = ((chosen + 1) * 127.5).round().clamp(0, 255).byte()
    return teacher.features(frames, input_size(crepa.encoder_image_size, grid, teacher.patch_size))
