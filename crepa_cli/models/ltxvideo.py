"""LTX-Video: text to video, and image to video from a clean first frame (arXiv 2501.00103)."""

from __future__ import annotations

import math
from functools import cached_property
from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    LTXPipeline,
)
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.models.family import Family, Tensors, TransformerStep, add_noise, decoded_video, normalized_latents

SHIFT = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
"""Logarithm of the shift, linear in the number of latents, that all versions are trained with (LTX-Video-Trainer)."""


class LtxVideo(Family):
    """LTX transformers of any size; hidden states are row-major patches of latents.

    From version 0.9.5 on, the first latent frame stands for one frame in the positions too, and another pipeline
    generates. Their schedulers do not shift by sequence length, which identifies them.
    """

    name = "ltxvideo"
    transformer_class = "LTXVideoTransformer3DModel"
    blocks_attribute = "transformer_blocks"
    pipelines = {"t2v": "LTXPipeline", "i2v": "LTXImageToVideoPipeline"}
    checkpoints = {"t2v": "Lightricks/LTX-Video", "i2v": "Lightricks/LTX-Video"}
    comfyui_names = {r"^proj_in$": "patchify_proj", r"^time_embed\b": "adaln_single"}
    guides_in_one_batch = True
    settings = {
        "crepa": {"block_index": 8},
        "adapter": {"rank": 32, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
        "data": {"width": 768, "height": 512, "frames": 121, "fps": 25.0},
        "train": {"learning_rate": 2e-4},
        "validation": {"guidance_scale": 3.0},
    }

    @property
    def size_multiple(self) -> int:
        """The VAE's compression times the patch: 32 pixels for the published checkpoints."""
        return self._compression[1] * int(self.config["patch_size"])

    @property
    def frame_multiple(self) -> int:
        """The VAE's compression in time: 8 frames for the published checkpoints."""
        return self._compression[0]

    @property
    def pipeline_class(self) -> str:
        """One pipeline for both tasks from version 0.9.5 on."""
        return "LTXConditionPipeline" if self._causal_positions else super().pipeline_class

    def timestep_shift(self, latents: Tensor) -> float:
        """Grows with the number of latents, as the pipeline's does, whatever the scheduler of later versions says."""
        figures = SHIFT if self._causal_positions else self.base.read_config("scheduler/scheduler_config.json")
        return math.exp(calculate_shift(latents[0, 0].numel(), *(figures[name] for name in SHIFT)))

    @cached_property
    def _causal_positions(self) -> bool:
        return not self.base.read_config("scheduler/scheduler_config.json")["use_dynamic_shifting"]

    @cached_property
    def _compression(self) -> tuple[int, int]:
        """Frames and pixels of a clip for each latent."""
        vae = self.base.read_config("vae/config.json")
        steps = 2 ** sum(vae["spatio_temporal_scaling"])
        frames = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * steps
        pixels = vae.get("spatial_compression_ratio") or vae["patch_size"] * steps
        return int(frames), int(pixels)

    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """`prompt_embeds` `[L, D]` of the T5 encoder and `prompt_attention_mask` `[L]`; L is the pipeline's choice."""
        embeds, mask, _, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds[0], "prompt_attention_mask": mask[0]}

    def longest_prompt(self, dtype: torch.dtype) -> Tensors:
        """`prompt_embeds` `[L, D]` and `prompt_attention_mask` `[L]`."""
        encode = getattr(diffusers, self.pipeline_class).encode_prompt
        tokens = signature(encode).parameters["max_sequence_length"].default
        embeds = torch.empty(tokens, self.config["caption_channels"], dtype=dtype)
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.empty(tokens, dtype=torch.bool)}

    def encode_clip(self, pipeline: DiffusionPipeline, video: Tensor) -> Tensors:
        """`latents` `[C, T, h, w]`, normalized; the first of them is that of the first frame alone."""
        return {"latents": normalized_latents(pipeline.vae, video)}

    def decode_latents(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of `encode_clip`, as far as the VAE is; a denoising decoder gets a noise level of 0."""
        conditioned = pipeline.vae.config.timestep_conditioning
        return decoded_video(pipeline.vae, latents, latents.new_zeros(1) if conditioned else None)

    def token_grid(self, latents: Tensor) -> TokenGrid:
        """One token for each patch of latents `[B, C, T, h, w]`."""
        frames, rows, columns = latents.shape[2:]
        patch = self.config["patch_size"]
        return TokenGrid(frames // self.config["patch_size_t"], rows // patch, columns // patch)

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """Latents are packed into tokens; in image to video those of the first frame are clean, at timestep 0."""
        latents, grid = batch["latents"], self.token_grid(batch["latents"])
        hidden, timestep, weight = self._packed(add_noise(latents, noise, sigmas)), sigmas[:, None] * 1000, None
        if self.task == "i2v":
            given = torch.arange(hidden.shape[1], device=hidden.device) < grid.tokens
            hidden = torch.where(given[:, None], self._packed(latents), hidden)
            timestep = torch.where(given, 0.0, timestep)
            weight = (~given).float()[None, :, None]
        return TransformerStep(
            inputs={
                "hidden_states": hidden,
                "timestep": timestep,
                "encoder_hidden_states": batch["prompt_embeds"],
                "encoder_attention_mask": batch["prompt_attention_mask"],
                "video_coords": self._positions(grid, batch["fps"]),
            },
            target=self._packed(noise - latents),
            weight=weight,
        )

    def _packed(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, T, h, w]` as tokens `[B, N, C']`."""
        packed: Tensor = LTXPipeline._pack_latents(latents, self.config["patch_size"], self.config["patch_size_t"])
        return packed

    def _positions(self, grid: TokenGrid, fps: Tensor) -> Tensor:
        """Position of each token in seconds, rows and columns of pixels: `[B, 3, N]`."""
        temporal, spatial = self._compression
        frames = torch.arange(grid.frames, device=fps.device) * temporal * self.config["patch_size_t"]
        if self._causal_positions:
            frames = (frames + 1 - temporal).clamp(min=0)
        rows, columns = (
            torch.arange(count, device=fps.device) * spatial * self.config["patch_size"]
            for count in (grid.rows, grid.columns)
        )
        positions = torch.cartesian_prod(frames, rows, columns).T.float()
        units = torch.stack([fps, torch.ones_like(fps), torch.ones_like(fps)], dim=1)
        return positions / units[:, :, None]

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:
        """Both prompts, and the decoding timestep that diffusers recommends for VAEs with one (its PR 11516)."""
        arguments = super().sampling_arguments(prompt, negative_prompt)
        if self.base.read_config("vae/config.json").get("timestep_conditioning"):
            arguments["decode_timestep"] = 0.05
        if self._causal_positions:
            arguments["image_cond_noise_scale"] = 0.025
        return arguments

    def form_arguments(self, *, width: int, height: int, frames: int, fps: float) -> dict[str, Any]:
        """Size, length and frame rate, which scales the positions in time."""
        return super().form_arguments(width=width, height=height, frames=frames, fps=fps) | {"frame_rate": fps}
