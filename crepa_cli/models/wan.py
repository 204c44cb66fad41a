"""Wan 2.1: text to video (arXiv 2503.20314)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from crepa_cli.alignment import TokenGrid
from crepa_cli.models import checkpoint as checkpoints
from crepa_cli.models.family import Family, Tensors, TransformerStep, add_noise, decoded_video, normalized_latents
from crepa_cli.models.tiny import normalize_latents, smooth_video, tiny_t5_tokenizer

PROMPT_TOKENS = 512
"""Length of the text sequence in the pipeline's call; the transformer's image attention relies on it."""


class Wan(Family):
    """Wan transformers of any size; hidden states are row-major patches of (1, 2, 2) latents."""

    name = "wan"
    transformer_class = "WanTransformer3DModel"
    blocks_attribute = "blocks"
    pipelines = {"t2v": "WanPipeline"}
    checkpoints = {"t2v": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}
    frame_multiple = 4
    settings = {
        "crepa": {"block_index": 8},
        "adapter": {"rank": 32, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]},
        "data": {"width": 832, "height": 480, "frames": 81, "fps": 16.0},
        "train": {"learning_rate": 1e-4},
        "validation": {"guidance_scale": 5.0},
    }

    @property
    def block_count(self) -> int:
        """Blocks of the transformer."""
        return int(self.config["num_layers"])

    @property
    def hidden_size(self) -> int:
        """Width of the blocks' hidden states."""
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    @property
    def size_multiple(self) -> int:
        """The VAE's compression times the patch: 16 pixels for Wan 2.1."""
        vae = checkpoints.read_config(self.checkpoint, "vae/config.json", self.revision)
        return int(vae.get("scale_factor_spatial", 8) * self.config["patch_size"][1])

    @classmethod
    def write_tiny(cls, folder: Path, task: str) -> None:  # noqa: ARG003 (one task so far)
        """A checkpoint of twelve blocks of width 48, with latents of four channels."""
        tokenizer = tiny_t5_tokenizer()
        vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
        normalize_latents(vae, smooth_video(frames=33, size=96))
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
        transformer = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=64,
            ffn_dim=128,
            num_layers=12,
        )
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer).save_pretrained(folder)

    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """`prompt_embeds` `[512, D]` of the T5 encoder, zero after the caption's end."""
        embeds, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
        )
        return {"prompt_embeds": embeds[0]}

    def encode_clip(self, pipeline: DiffusionPipeline, video: Tensor) -> Tensors:
        """`latents` `[C, T, h, w]`, normalized."""
        return {"latents": normalized_latents(pipeline.vae, video)}

    def decode_latents(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of `encode_clip`, as far as the VAE is."""
        return decoded_video(pipeline.vae, latents)

    def token_grid(self, latents: Tensor) -> TokenGrid:
        """One token for each patch of latents `[B, C, T, h, w]`."""
        frames, rows, columns = (
            size // patch for size, patch in zip(latents.shape[2:], self.config["patch_size"], strict=True)
        )
        return TokenGrid(frames, rows, columns)

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """Timesteps are sigmas times 1000."""
        return TransformerStep(
            inputs={
                "hidden_states": add_noise(batch["latents"], noise, sigmas),
                "timestep": sigmas * 1000,
                "encoder_hidden_states": batch["prompt_embeds"],
            },
            target=noise - batch["latents"],
        )

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:
        """Prompt and negative prompt with a batch dimension."""
        return {
            "prompt_embeds": prompt["prompt_embeds"][None],
            "negative_prompt_embeds": negative_prompt["prompt_embeds"][None],
        }
