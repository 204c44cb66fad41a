"""SANA-Video: text to video, and image to video from a clean first frame (arXiv 2509.24695)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from inspect import signature
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiffusionPipeline,
    ModelMixin,
    SanaVideoPipeline,
)
from diffusers.models.transformers.transformer_sana_video import SanaLinearAttnProcessor3_0
from torch import Tensor, nn

from crepa_cli.alignment.comparison import full_precision
from crepa_cli.models.base import BaseCheckpoint
from crepa_cli.models.family import Family, Tensors, TransformerStep
from crepa_cli.models.precision import under_this_autocast
from crepa_cli.models.vae import decoded_video, normalized_latents

SIZE_MULTIPLE = 32
"""The pipelines accept only multiples of this as width and height."""


class Layers(NamedTuple):
    """The parts of a module that linear attention reads, in a type that can be compiled."""

    heads: int
    norm_q: nn.Module
    norm_k: nn.Module
    to_q: Callable[[Tensor], Tensor]
    to_k: Callable[[Tensor], Tensor]
    to_v: Callable[[Tensor], Tensor]
    to_out: list[Callable[[Tensor], Tensor]]


class LinearAttention(SanaLinearAttnProcessor3_0):  # type: ignore[misc]  # diffusers has no types
    """Linear attention that multiplies in float32, as it does without autocast; its layers follow autocast.

    Its products are sums over all tokens of a clip.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Of the clips to themselves."""
        device = hidden_states.device
        layers = Layers(
            heads=attn.heads,
            norm_q=attn.norm_q,
            norm_k=attn.norm_k,
            to_q=under_this_autocast(attn.to_q, device),
            to_k=under_this_autocast(attn.to_k, device),
            to_v=under_this_autocast(attn.to_v, device),
            to_out=[under_this_autocast(layer, device) for layer in attn.to_out],
        )
        with full_precision(device):
            attended: Tensor = super().__call__(
                layers, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        return attended


class SanaVideo(Family):
    """SANA-Video transformers, with the VAE of Wan (480p) or LTX-2 (720p); hidden states are row-major patches."""

    name = "sanavideo"
    transformer_class = "SanaVideoTransformer3DModel"
    blocks_attribute = "transformer_blocks"
    architecture = "sana-video"
    pipelines = {"t2v": "SanaVideoPipeline", "i2v": "SanaImageToVideoPipeline"}
    checkpoints = dict.fromkeys(pipelines, "Efficient-Large-Model/SANA-Video_2B_480p_diffusers")
    negative_prompt = (
        "A chaotic sequence with misshapen, deformed limbs in heavy motion blur, sudden disappearance, jump cuts,"
        " jerky movements, rapid shot changes, frames out of sync, inconsistent character shapes, temporal "
        "artifacts, jitter, and ghosting effects, creating a disorienting visual experience."
    )
    motion_suffix = " motion score: {}."
    guides_in_one_batch = True
    attention_heads = 0
    settings = {
        "crepa": {"block_index": 10},
        "adapter": {"rank": 32, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "export": ["diffusers"]},
        "data": {"width": 832, "height": 480, "frames": 81, "fps": 16.0},
        # Its authors train with a smaller shift than they sample with.
        "train": {"learning_rate": 1e-4, "timestep_shift": 3.0},
        "validation": {"guidance_scale": 6.0},
    }
    # NVlabs/Sana: configs/sana_video_config/Sana_2000M_480px_AdamW_fsdp.yaml, and that of 720 pixels.
    full_settings = {
        "train": {
            "learning_rate": 5e-5,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 500,
            "max_grad_norm": 0.1,
            "weight_decay": 0.0,
        }
    }
    published = {
        "Efficient-Large-Model/SANA-Video_2B_480p_diffusers": {},
        # NVlabs/Sana: configs/sana_video_config/Sana_2000M_720px_ltx2vae_AdamW_fsdp.yaml, in multiples of 32.
        "Efficient-Large-Model/SANA-Video_2B_720p_diffusers": {"data": {"width": 1280, "height": 704}},
    }

    @classmethod
    def published_like(cls, base: BaseCheckpoint, task: str) -> str | None:  # noqa: ARG003
        """By the VAE, which is that of Wan or that of LTX-2."""
        size = "480p" if base.read_config("vae/config.json").get("_class_name") == "AutoencoderKLWan" else "720p"
        return f"Efficient-Large-Model/SANA-Video_2B_{size}_diffusers"

    @property
    def size_multiple(self) -> int:
        """The VAE's compression times the patch, and a multiple that the pipelines accept."""
        return math.lcm(SIZE_MULTIPLE, self._compression[1] * self.config["patch_size"][1])

    @property
    def frame_multiple(self) -> int:
        """The VAE's compression in time: 4 frames for the 480p checkpoint, 8 for the 720p one."""
        return self._compression[0]

    @cached_property
    def _compression(self) -> tuple[int, int]:
        """Frames and pixels of a clip for each latent."""
        vae = self.base.read_config("vae/config.json")
        if vae["_class_name"] == "AutoencoderKLWan":
            return int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8))
        return int(vae["temporal_compression_ratio"]), int(vae["spatial_compression_ratio"])

    def _adapted(self, transformer: ModelMixin) -> ModelMixin:
        """With linear attention that multiplies in float32."""
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(LinearAttention())
        return super()._adapted(transformer)

    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """`prompt_embeds` `[300, D]` of the Gemma encoder and `prompt_attention_mask` `[300]`.

        A caption follows the pipeline's instruction to enhance it; the empty one, which stands for no prompt, does not.
        """
        if not caption:
            return self.encode_negative_prompt(pipeline, caption)
        instruction = signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        return self._encode(pipeline, caption, instruction)

    def encode_negative_prompt(self, pipeline: DiffusionPipeline, prompt: str) -> Tensors:
        """The same without an instruction."""
        return self._encode(pipeline, prompt, None)

    def _encode(self, pipeline: DiffusionPipeline, text: str, instruction: list[str] | None) -> Tensors:
        embeds, mask, _, _ = pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, complex_human_instruction=instruction
        )
        return {"prompt_embeds": embeds[0], "prompt_attention_mask": mask[0]}

    def longest_prompt(self, dtype: torch.dtype) -> Tensors:
        """`prompt_embeds` `[300, D]` and `prompt_attention_mask` `[300]`."""
        tokens = signature(SanaVideoPipeline.encode_prompt).parameters["max_sequence_length"].default
        embeds = torch.empty(tokens, self.config["caption_channels"], dtype=dtype)
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.empty(tokens, dtype=torch.int64)}

    def encode_clip(
        self, pipeline: DiffusionPipeline, video: Tensor, generator: torch.Generator | None = None
    ) -> Tensors:
        """`latents` `[C, T, h, w]`, normalized; the first of them is that of the first frame alone."""
        return {"latents": normalized_latents(pipeline.vae, video, generator)}

    def decode_latents(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of `encode_clip`, as far as the VAE is."""
        return decoded_video(pipeline.vae, latents)

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """In image to video the first latent frame is clean, and the timestep of its tokens is 0."""
        latents, grid = batch["latents"], self.token_grid(batch["latents"])
        hidden, timestep, weight = self.noise_process.add_noise(latents, noise, sigmas), sigmas * 1000, None
        if self.task == "i2v":
            given = (torch.arange(grid.frames, device=hidden.device) == 0).view(1, 1, -1, 1, 1)
            timestep = torch.where(given, 0.0, timestep.view(-1, 1, 1, 1, 1))
            timestep = timestep.expand(-1, -1, -1, grid.rows, grid.columns)
            hidden = torch.where(given, latents, hidden)
            weight = (~given).float()
        return TransformerStep(
            inputs={
                "hidden_states": hidden,
                "timestep": timestep,
                "encoder_hidden_states": batch["prompt_embeds"],
                "encoder_attention_mask": batch["prompt_attention_mask"],
            },
            target=self.noise_process.target(latents, noise, sigmas),
            weight=weight,
        )

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:
        """Prompt and negative prompt; disables the default negative prompt."""
        return super().sampling_arguments(prompt, negative_prompt) | {"negative_prompt": None}

    def form_arguments(self, *, width: int, height: int, frames: int, fps: float) -> dict[str, Any]:  # noqa: ARG002
        """Size and length as they are, not those of the nearest size that the model was first trained on."""
        return {"width": width, "height": height, "frames": frames, "use_resolution_binning": False}
