"""A tiny Kandinsky 5 Video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Modulation
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from crepa_cli.demo.tiny import smooth_video, tiny_clip_tokenizer, tiny_qwen_tokenizer


def write_tiny(folder: Path, task: str) -> None:
    """Write a checkpoint of twelve blocks of width 64, with latents of four channels."""
    pipeline_class = Kandinsky5T2VPipeline if task == "t2v" else Kandinsky5I2VPipeline
    pipeline = pipeline_class(
        transformer=tiny_transformer(),
        vae=_tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=tiny_clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    tokenizer = tiny_qwen_tokenizer(pipeline.prompt_template)
    clip = CLIPTextConfig(
        vocab_size=len(pipeline.tokenizer_2),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=pipeline.tokenizer_2.bos_token_id,
        eos_token_id=pipeline.tokenizer_2.eos_token_id,
    )
    pipeline.register_modules(
        tokenizer=tokenizer, text_encoder=_tiny_qwen(len(tokenizer)), text_encoder_2=CLIPTextModel(clip)
    )
    pipeline.save_pretrained(folder)


def tiny_transformer(**settings: Any) -> Kandinsky5Transformer3DModel:
    """Twelve blocks of width 64 for latents of four channels; `settings` replace those of the configuration."""
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 64}
    blocks = {"model_dim": 64, "ff_dim": 128, "num_text_blocks": 2, "num_visual_blocks": 12, "axes_dims": (4, 6, 6)}
    transformer = Kandinsky5Transformer3DModel(**{**sizes, **blocks, "visual_cond": True, **settings})
    for module in transformer.modules():
        # They start at 0, where blocks do nothing and their LoRA learns nothing.
        if isinstance(module, Kandinsky5Modulation):
            nn.init.normal_(module.out_layer.weight, std=0.1)
            nn.init.normal_(module.out_layer.bias, std=0.1)
    return transformer


@torch.no_grad()
def _tiny_vae() -> AutoencoderKLHunyuanVideo:
    """A VAE whose latents have mean 0 and std 1 after scaling, and next to no variance, as a trained one."""
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    )
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = -20
    latents = vae.encode(smooth_video(frames=17, size=96)).latent_dist.mode()
    vae.quant_conv.bias[:4] -= latents.mean((0, 2, 3, 4))
    vae.register_to_config(scaling_factor=1 / latents.std((0, 2, 3, 4)).mean().item())
    return vae


def _tiny_qwen(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": vocabulary - 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
