"""A tiny Wan 2.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from crepa_cli.demo.tiny import normalize_latents, smooth_video, tiny_clip_vision, tiny_t5_tokenizer


def write_tiny(folder: Path, task: str) -> None:
    """Write a checkpoint of Wan 2.1: twelve blocks of width 48, latents of four channels."""
    tokenizer = tiny_t5_tokenizer()
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    normalize_latents(vae, smooth_video(frames=33, size=96))
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "scheduler": scheduler}
    if task == "t2v":
        WanPipeline(**parts, transformer=tiny_transformer()).save_pretrained(folder)
    else:
        image_encoder, image_processor = tiny_clip_vision()
        WanImageToVideoPipeline(
            **parts,
            transformer=tiny_transformer(in_channels=12, image_dim=32, added_kv_proj_dim=48),
            image_encoder=image_encoder,
            image_processor=image_processor,
        ).save_pretrained(folder)


def tiny_transformer(**settings: Any) -> WanTransformer3DModel:
    """Twelve blocks of width 48 for latents of four channels; `settings` replace those of the configuration."""
    sizes = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 12}
    return WanTransformer3DModel(**{**sizes, "text_dim": 32, "freq_dim": 64, "ffn_dim": 128, **settings})
