"""Parts of the tiny checkpoints of Kandinsky: its text encoders and its VAE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from crepa_cli.demo.tiny import smooth_video, tiny_clip_text, tiny_qwen_tokenizer

WIDTH = 32
"""Width of the embeddings of captions."""


@torch.no_grad()
def tiny_vae() -> AutoencoderKLHunyuanVideo:
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


def tiny_text_encoders(template: str, pieces: int) -> dict[str, Any]:
    """Qwen2.5-VL and CLIP of width 32 with their tokenizers, by their names in the pipelines.

    Args:
        template: of the pipeline's prompts.
        pieces: of the tokenizer of Qwen2.5-VL; see `tiny_qwen_tokenizer`.
    """
    tokenizer = tiny_qwen_tokenizer(template, pieces)
    return {"tokenizer": tokenizer, "text_encoder": _tiny_qwen(len(tokenizer)), **tiny_clip_text(WIDTH)}


def _tiny_qwen(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
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
