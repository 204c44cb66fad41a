"""Teacher features computed in every step from the VAE's decoded video, for `teacher_cache = false`."""

from __future__ import annotations

import torch
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.alignment.grid import teaching_frames
from crepa_cli.data.prepare import load_teacher
from crepa_cli.models.family import Family
from crepa_cli.profile import CrepaSettings
from crepa_cli.teachers.dinov2 import input_size


class OnlineTeacher:
    """A VAE's decoder and a vision encoder that stay in memory during the whole training.

    Args:
        family: provides the VAE.
        crepa: the vision encoder, its input, and whether to drop the VAE's own encoder.
        device: the device of both.
    """

    def __init__(self, family: Family, crepa: CrepaSettings, device: torch.device) -> None:
        self.family = family
        self.image_size, self.teacher_frame = crepa.encoder_image_size, crepa.teacher_frame
        self.pipeline = family.load_vae_pipeline()
        if crepa.drop_vae_encoder:
            self.pipeline.vae.encoder = None
        self.pipeline.to(device)
        self.teacher = load_teacher(crepa, device)

    @torch.no_grad()
    def features(self, latents: Tensor) -> tuple[Tensor, TokenGrid]:
        """Features `[B, T, N, D]` of clean latents `[B, C, T, h, w]`, on the latents' device, and their grid."""
        grid = self.family.token_grid(latents)
        features = torch.stack([self._clip_features(clip, grid) for clip in latents])
        return features.flatten(2, 3).to(latents.device), TokenGrid(*features.shape[1:4])

    def _clip_features(self, latents: Tensor, grid: TokenGrid) -> Tensor:
        video = self.family.decode_latents(self.pipeline, latents)
        taught = teaching_frames(video.shape[1], grid.frames, self.teacher_frame)
        chosen = video[:, taught].transpose(0, 1)
        frames = ((chosen + 1) * 127.5).round().clamp(0, 255).byte()
        size = input_size(self.image_size, grid, self.teacher.patch_size)
        return self.teacher.features(frames, size)
