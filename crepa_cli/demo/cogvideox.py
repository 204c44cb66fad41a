"""A tiny CogVideoX: version 1.0 for text to video, and 1.5 for image to video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from crepa_cli.demo.tiny import smooth_video, tiny_t5_tokenizer

VERSION_1_5 = {"patch_size_t": 2, "patch_bias": False, "sample_width": 300, "sample_height": 300}
"""Settings of the published transformers of this version."""


def write_tiny(folder: Path, task: str) -> None:
    """Write a checkpoint of twelve blocks of width 48, with latents of four channels."""
    tokenizer = tiny_t5_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    scheduler = CogVideoXDDIMScheduler(
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )
    if task == "t2v":
        pipeline = CogVideoXPipeline(tokenizer, text_encoder, _tiny_vae(), tiny_transformer(), scheduler)
    else:
        transformer = tiny_transformer(in_channels=8, ofs_embed_dim=32, **VERSION_1_5)
        vae = _tiny_vae(invert_scale_latents=True)
        pipeline = CogVideoXImageToVideoPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    pipeline.save_pretrained(folder)


def tiny_transformer(**settings: Any) -> CogVideoXTransformer3DModel:
    """Twelve blocks of width 48 for latents of four channels; `settings` replace those of the configuration."""
    sizes = {"num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 12}
    sizes |= {"time_embed_dim": 32, "text_embed_dim": 32, "sample_width": 12, "sample_height": 8, "sample_frames": 17}
    sizes |= {"max_text_seq_length": 32}
    return CogVideoXTransformer3DModel(**{**sizes, "use_rotary_positional_embeddings": True, **settings})


@torch.no_grad()
def _tiny_vae(**settings: Any) -> AutoencoderKLCogVideoX:
    """A VAE whose latents have mean 0 and std 1 after scaling, and next to no variance, as a trained one."""
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 16, 16),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.7,
        **settings,
    )
    last = vae.encoder.conv_out.conv
    last.weight[4:] = 0
    last.bias[4:] = -20
    latents = vae.encode(smooth_video(frames=17, size=96)).latent_dist.mode()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    factors = 1 / (vae.config.scaling_factor * std)
    last.weight[:4] *= factors.view(-1, 1, 1, 1, 1)
    last.bias[:4] = (last.bias[:4] - mean) * factors
    return vae
