"""LTX-Video: text to video, and image to video from a clean first frame (arXiv 2501.00103)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    LTXPipeline,
)
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.models.family import Family, Tensors, TransformerStep
from crepa_cli.models.vae import decoded_video, normalized_latents

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
    # The newest of 2B that has diffusers' layout (LTX-Video-Trainer: model_loader.py); its license is OpenRAIL-M.
    checkpoints = dict.fromkeys(pipelines, "Lightricks/LTX-Video-0.9.5")
    samples_posterior = True
    negative_prompt = "worst quality, inconsistent motion, blurry, jittery, distorted"
    comfyui_names = {
        r"^proj_in$": "patchify_proj",
        r"^time_embed\b": "adaln_single",
        r"\bnorm_([qk])$": r"\1_norm",
    }
    architecture = "ltx-video"
    # Of its authors' code (pipeline_ltx_video.py); the pipelines of diffusers cut at 128 up to version 0.9.1.
    caption_tokens = 256
    takes_frame_rate = True
    guides_in_one_batch = True
    settings = {
        "crepa": {"block_index": 8},
        "adapter": {
            "rank": 32,
            "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
            "export": ["diffusers", "comfyui"],
        },
        # The size of the model card, and the frame rate of the authors' inference.py.
        "data": {"width": 768, "height": 512, "frames": 121, "fps": 30.0},
        # LTX-Video-Trainer: configs/ltxv_2b_lora.yaml and ltxv_13b_lora_template.yaml. The noise is that of LTX-2's.
        "train": {"learning_rate": 2e-4, "timestep_sampling": "stretched"},
        "validation": {"guidance_scale": 3.0},
    }
    # LTX-Video-Trainer: configs/ltxv_2b_full.yaml.
    full_settings = {"train": {"learning_rate": 1e-5, "lr_scheduler": "linear"}}
    published = {
        "Lightricks/LTX-Video": {},
        "Lightricks/LTX-Video-0.9.1": {},
        "Lightricks/LTX-Video-0.9.5": {},
        "Lightricks/LTX-Video-0.9.7-dev": {},
    }

    @property
    def size_multiple(self) -> int:
        """The VAE's compression times the patch: 32 pixels for the published checkpoints."""
        return self._compression[1] * self.patch[2]

    @property
    def frame_multiple(self) -> int:
        """The VAE's compression in time: 8 frames for the published checkpoints."""
        return self._compression[0]

    @property
    def pipeline_class(self) -> str:
        """One pipeline for both tasks from version 0.9.5 on."""
        return "LTXConditionPipeline" if self._causal_positions else super().pipeline_class

    @property
    def comfyui_header(self) -> Mapping[str, str]:
        """Positions of the first frame from version 0.9.5 on, which no tensor tells."""
        if not self._causal_positions:
            return {}
        return {"config": json.dumps({"transformer": {"causal_temporal_positioning": True}})}

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
        """`prompt_embeds` `[256, D]` of the T5 encoder and `prompt_attention_mask` `[256]`."""
        embeds, mask, _, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=self.caption_tokens
        )
        return {"prompt_embeds": embeds[0], "prompt_attention_mask": mask[0]}

    def longest_prompt(self, dtype: torch.dtype) -> Tensors:
        """`prompt_embeds` `[256, D]` and `prompt_attention_mask` `[256]`."""
        embeds = torch.empty(self.caption_tokens, self.config["caption_channels"], dtype=dtype)
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.empty(self.caption_tokens, dtype=torch.bool)}

    def encode_clip(
        self, pipeline: DiffusionPipeline, video: Tensor, generator: torch.Generator | None = None
    ) -> Tensors:
        """`latents` `[C, T, h, w]`, normalized; the first of them is that of the first frame alone."""
        return {"latents": normalized_latents(pipeline.vae, video, generator)}

    def decode_latents(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of `encode_clip`, as far as the VAE is; a denoising decoder gets a noise level of 0."""
        conditioned = pipeline.vae.config.timestep_conditioning
        return decoded_video(pipeline.vae, latents, latents.new_zeros(1) if conditioned else None)

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """Latents are packed into tokens; in image to video those of the first frame are clean, at timestep 0."""
        latents, grid = batch["latents"], self.token_grid(batch["latents"])
        hidden = self._packed(self.noise_process.add_noise(latents, noise, sigmas))
        timestep, weight = sigmas[:, None] * 1000, None
        if self.task == "i2v":
            hidden, timestep, weight = with_first_frame(hidden, self._packed(latents), timestep, grid)
        return TransformerStep(
            inputs={
                "hidden_states": hidden,
                "timestep": timestep,
                "encoder_hidden_states": batch["prompt_embeds"],
                "encoder_attention_mask": batch["prompt_attention_mask"],
                "video_coords": self._positions(grid, batch["fps"]),
            },
            target=self._packed(self.noise_process.target(latents, noise, sigmas)),
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

    @property
    def fewest_sampling_steps(self) -> int:
        """Two if the scheduler stretches the noise levels between the first and the last one."""
        return 2 if self.base.read_config("scheduler/scheduler_config.json").get("shift_terminal") else 1

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:
        """Both prompts, and what a decoder that denoises takes (LTX-Video: configs/ltxv-2b-0.9.5.yaml)."""
        arguments = super().sampling_arguments(prompt, negative_prompt)
        if self.base.read_config("vae/config.json").get("timestep_conditioning"):
            arguments |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
        if self._causal_positions:
            arguments["image_cond_noise_scale"] = 0.025
        return arguments

    def form_arguments(self, *, width: int, height: int, frames: int, fps: float) -> dict[str, Any]:
        """Size, length and frame rate, which scales the positions in time."""
        return super().form_arguments(width=width, height=height, frames=frames, fps=fps) | {"frame_rate": fps}


def with_first_frame(hidden: Tensor, clean: Tensor, timestep: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy tokens `[B, N, C]` with the clean ones of the first frame, at timestep 0, and the weights of the others.

    Args:
        hidden: the noisy tokens.
        clean: the tokens without noise.
        timestep: `[B, 1]`.
        grid: of the tokens.

    Returns:
        Tokens `[B, N, C]`, timesteps `[B, N]`, and weights `[1, N, 1]`, which are 0 for the first frame and 1 else.
    """
    given = torch.arange(hidden.shape[1], device=hidden.device) < grid.tokens
    hidden, timestep = torch.where(given[:, None], clean, hidden), torch.where(given, 0.0, timestep)
    return hidden, timestep, (~given).float()[None, :, None]
