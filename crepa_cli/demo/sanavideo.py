"""A tiny SANA-Video with the VAE of the 480p checkpoint."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from transformers import Gemma2Config, Gemma2Model

from crepa_cli.demo.tiny import normalize_latents, smooth_video, tiny_gemma_tokenizer


def write_tiny(folder: Path, task: str) -> None:  # noqa: ARG001 (one checkpoint serves both tasks)
    """Write a checkpoint of twelve blocks of width 48, with latents of four channels."""
    tokenizer = tiny_gemma_tokenizer()
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    normalize_latents(vae, smooth_video(frames=33, size=96))
    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        num_cross_attention_heads=4,
        cross_attention_head_dim=12,
        cross_attention_dim=48,
        caption_channels=32,
        mlp_ratio=1.0,
        num_layers=12,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    SanaVideoPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
