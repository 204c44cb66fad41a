"""A tiny LTX-2."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from crepa_cli.demo.tiny import normalize_latents, smooth_video, tiny_gemma_tokenizer
from crepa_cli.models.ltxvideo import SHIFT

CAPTION_WIDTH, CAPTION_LAYERS = 32, 2


def write_tiny(folder: Path, task: str) -> None:  # noqa: ARG001 (one checkpoint serves both tasks)
    """Write a checkpoint of twelve blocks of width 48, with latents of eight channels and audio of width 16."""
    tokenizer = tiny_gemma_tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **SHIFT)
    parts = {"vae": _tiny_vae(), "audio_vae": _tiny_audio_vae(), "vocoder": _tiny_vocoder()}
    LTX2Pipeline(
        scheduler=scheduler,
        tokenizer=tokenizer,
        text_encoder=_tiny_text_encoder(len(tokenizer)),
        connectors=_tiny_connectors(),
        transformer=_tiny_transformer(),
        **parts,
    ).save_pretrained(folder)


def _tiny_transformer() -> LTX2VideoTransformer3DModel:
    transformer = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=12,
        cross_attention_dim=48,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=4,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=16,
        caption_channels=CAPTION_WIDTH,
        num_layers=12,
        rope_type="split",
    )
    for block in transformer.transformer_blocks:
        # The video is trained alone and sampled with sound: what random weights made of that would be noise.
        for attention in (block.audio_to_video_attn, block.video_to_audio_attn):
            torch.nn.init.zeros_(attention.to_out[0].weight)
            torch.nn.init.zeros_(attention.to_out[0].bias)
    return transformer


def _tiny_vae() -> AutoencoderKLLTX2Video:
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    normalize_latents(vae, smooth_video(frames=33, size=192))
    return vae


def _tiny_audio_vae() -> AutoencoderKLLTX2Audio:
    return AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=16
    )


def _tiny_vocoder() -> LTX2Vocoder:
    return LTX2Vocoder(
        in_channels=32,
        hidden_channels=16,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )


def _tiny_text_encoder(vocabulary: int) -> Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": CAPTION_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": CAPTION_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def _tiny_connectors() -> LTX2TextConnectors:
    return LTX2TextConnectors(
        caption_channels=CAPTION_WIDTH,
        text_proj_in_factor=CAPTION_LAYERS + 1,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        rope_type="split",
    )
