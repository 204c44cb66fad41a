"""A tiny LTX-Video of version 0.9.0."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from crepa_cli.demo.tiny import normalize_latents, smooth_video, tiny_t5_tokenizer
from crepa_cli.models.ltxvideo import SHIFT


def write_tiny(folder: Path, task: str) -> None:  # noqa: ARG001 (one checkpoint serves both tasks)
    """Write a checkpoint of twelve blocks of width 48, with latents of eight channels."""
    tokenizer = tiny_t5_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=12,
        cross_attention_dim=48,
        caption_channels=32,
        num_layers=12,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **SHIFT)
    LTXPipeline(scheduler, _tiny_vae(), text_encoder, tokenizer, transformer).save_pretrained(folder)


def _tiny_vae() -> AutoencoderKLLTXVideo:
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 16, 16),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    # The pipeline draws the first frame from the posterior; a trained VAE's is narrow, that of random weights is not.
    torch.nn.init.constant_(vae.encoder.conv_out.conv.bias[-1:], -20.0)
    normalize_latents(vae, smooth_video(frames=33, size=192))
    return vae
