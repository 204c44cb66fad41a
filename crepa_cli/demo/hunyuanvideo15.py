"""A tiny HunyuanVideo 1.5."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

from crepa_cli.demo.tiny import smooth_video, tiny_qwen_tokenizer, tiny_siglip_vision

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny(folder: Path, task: str) -> None:
    """Write a checkpoint of twelve blocks of width 48, with latents of four channels.

    Most of its weights are in a layer of 2048 x 2048, whose size is not in the configuration.
    """
    pipeline = HunyuanVideo15Pipeline if task == "t2v" else HunyuanVideo15ImageToVideoPipeline
    tokenizer = _tiny_tokenizer()
    tokenizer_2 = ByT5Tokenizer(extra_ids=0)
    parts: dict[str, Any] = {}
    if task == "i2v":
        parts["image_encoder"], parts["feature_extractor"] = tiny_siglip_vision()
    pipeline(
        tokenizer=tokenizer,
        text_encoder=_tiny_qwen(len(tokenizer)),
        tokenizer_2=tokenizer_2,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(tokenizer_2), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
        transformer=_tiny_transformer(task),
        vae=_tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        **parts,
    ).save_pretrained(folder)


def _tiny_transformer(task: str) -> HunyuanVideo15Transformer3DModel:
    return HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=12,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=32,
        text_embed_2_dim=32,
        image_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
        target_size=32,
        task_type=task,
    )


@torch.no_grad()
def _tiny_vae() -> AutoencoderKLHunyuanVideo15:
    """A VAE whose latents have mean 0 and std 1 after scaling, and next to no variance, as a trained one."""
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 16, 16, 16), layers_per_block=1)
    last = vae.encoder.conv_out.conv
    last.bias[4:] -= 20
    latents = vae.encode(smooth_video(frames=17, size=96)).latent_dist.mode()
    last.bias[:4] -= latents.mean((0, 2, 3, 4))
    vae.register_to_config(scaling_factor=1 / latents.std((0, 2, 3, 4)).mean().item())
    return vae


def _tiny_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer that has as many tokens for the pipelines' instruction as the published one."""
    system = signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
    tokenizer = tiny_qwen_tokenizer(system, pieces=475)
    tokenizer.add_tokens(["You are a helpful assistant. Describe"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tiny_qwen(vocabulary: int) -> Qwen2_5_VLTextModel:
    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=None,
            eos_token_id=vocabulary - 1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        )
    )
