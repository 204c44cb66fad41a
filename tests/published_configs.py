"""Configurations of published checkpoints, as their files on the Hub have them: what crepa and the models read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A checkpoint's configurations and what they mean.

    `configs` are by file; `clip` has the shapes of a small clip's tensors, as the family's preparation stores them.
    """

    task: str
    blocks: int
    hidden_size: int
    frame_multiple: int
    size_multiple: int
    configs: dict[str, Config]
    clip: dict[str, tuple[int, ...]]


LTX_TRANSFORMER: Config = {
    "_class_name": "LTXVideoTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "attention_out_bias": True,
    "caption_channels": 4096,
    "cross_attention_dim": 2048,
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 32,
    "num_layers": 28,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm_across_heads",
}
LTX_13B = LTX_TRANSFORMER | {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}
LTX_VAE: Config = {
    "_class_name": "AutoencoderKLLTXVideo",
    "latent_channels": 128,
    "patch_size": 4,
    "patch_size_t": 1,
    "scaling_factor": 1.0,
    "spatio_temporal_scaling": [True, True, True, False],
}
LTX_VAE_095 = LTX_VAE | {
    "spatial_compression_ratio": 32,
    "spatio_temporal_scaling": [True, True, True, True],
    "temporal_compression_ratio": 8,
    "timestep_conditioning": True,
}
LTX_SCHEDULER: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 1024,
    "base_shift": 0.95,
    "max_image_seq_len": 4096,
    "max_shift": 2.05,
    "shift": 1.0,
    "shift_terminal": 0.1,
    "use_dynamic_shifting": True,
}
LTX_SCHEDULER_095: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 1.0,
    "shift_terminal": None,
    "use_dynamic_shifting": False,
}
LTX_CLIP = {"latents": (128, 3, 2, 4), "prompt_embeds": (8, 4096), "prompt_attention_mask": (8,)}

SANA_TRANSFORMER: Config = {
    "_class_name": "SanaVideoTransformer3DModel",
    "attention_bias": False,
    "attention_head_dim": 112,
    "caption_channels": 2304,
    "cross_attention_dim": 2240,
    "cross_attention_head_dim": 112,
    "dropout": 0.0,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
    "in_channels": 16,
    "interpolation_scale": None,
    "mlp_ratio": 3.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 20,
    "num_cross_attention_heads": 20,
    "num_layers": 20,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "sample_size": 30,
}
# Of the 720p checkpoint, the transformer's file is put together from its authors' training configuration.
SANA_720P = SANA_TRANSFORMER | {"in_channels": 128, "out_channels": 128, "patch_size": [1, 1, 1], "sample_size": 22}
LTX2_VAE: Config = {
    "_class_name": "AutoencoderKLLTX2Video",
    "latent_channels": 128,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
SANA_PROMPT = {"prompt_embeds": (300, 2304), "prompt_attention_mask": (300,)}

WAN_TRANSFORMER: Config = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
WAN_14B = WAN_TRANSFORMER | {"ffn_dim": 13824, "num_attention_heads": 40, "num_layers": 40}
WAN_14B_I2V = WAN_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
WAN_A14B_I2V = WAN_14B | {"in_channels": 36}
WAN_5B = WAN_TRANSFORMER | {"ffn_dim": 14336, "in_channels": 48, "num_attention_heads": 24, "out_channels": 48}
WAN_VAE: Config = {"_class_name": "AutoencoderKLWan", "z_dim": 16}
WAN_VAE_22 = WAN_VAE | {"z_dim": 48, "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4}
WAN_INDEX: Config = {"_class_name": "WanPipeline"}
WAN_PROMPT = {"prompt_embeds": (512, 4096)}
WAN_FIRST_FRAME = {"condition": (20, 3, 4, 8)}


def wan(task: str, transformer: Config, clip: dict[str, tuple[int, ...]], **index: object) -> Published:
    """Of Wan 2.1, and of Wan 2.2 A14B, which have the same VAE."""
    return Published(
        task=task,
        blocks=transformer["num_layers"],
        hidden_size=transformer["num_attention_heads"] * 128,
        frame_multiple=4,
        size_multiple=16,
        configs={
            "model_index.json": WAN_INDEX | index,
            "transformer/config.json": transformer,
            "vae/config.json": WAN_VAE,
        },
        clip={"latents": (16, 3, 4, 8)} | WAN_PROMPT | clip,
    )


# Of Kandinsky 5, the transformer's file is put together from its authors' configuration of inference.
KANDINSKY_LITE: Config = {
    "_class_name": "Kandinsky5Transformer3DModel",
    "attention_type": "regular",
    "axes_dims": [16, 24, 24],
    "ff_dim": 7168,
    "in_text_dim": 3584,
    "in_text_dim2": 768,
    "in_visual_dim": 16,
    "model_dim": 1792,
    "num_text_blocks": 2,
    "num_visual_blocks": 32,
    "out_visual_dim": 16,
    "patch_size": [1, 2, 2],
    "time_dim": 512,
    "visual_cond": True,
}
KANDINSKY_PRO = KANDINSKY_LITE | {
    "axes_dims": [32, 48, 48],
    "ff_dim": 16384,
    "model_dim": 4096,
    "num_text_blocks": 4,
    "num_visual_blocks": 60,
    "time_dim": 1024,
}
HUNYUAN_VAE: Config = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "latent_channels": 16,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
}
KANDINSKY_CLIP = {"latents": (16, 3, 4, 8), "prompt_embeds": (512, 3584), "pooled_embeds": (768,)}

PUBLISHED: dict[tuple[str, str], Published] = {
    ("ltxvideo", "Lightricks/LTX-Video"): Published(
        task="t2v",
        blocks=28,
        hidden_size=2048,
        frame_multiple=8,
        size_multiple=32,
        configs={
            "transformer/config.json": LTX_TRANSFORMER,
            "vae/config.json": LTX_VAE,
            "scheduler/scheduler_config.json": LTX_SCHEDULER,
        },
        clip=LTX_CLIP,
    ),
    ("ltxvideo", "Lightricks/LTX-Video-0.9.7-dev"): Published(
        task="i2v",
        blocks=48,
        hidden_size=4096,
        frame_multiple=8,
        size_multiple=32,
        configs={
            "transformer/config.json": LTX_13B,
            "vae/config.json": LTX_VAE_095,
            "scheduler/scheduler_config.json": LTX_SCHEDULER_095,
        },
        clip=LTX_CLIP,
    ),
    ("sanavideo", "Efficient-Large-Model/SANA-Video_2B_480p_diffusers"): Published(
        task="i2v",
        blocks=20,
        hidden_size=2240,
        frame_multiple=4,
        size_multiple=32,
        configs={"transformer/config.json": SANA_TRANSFORMER, "vae/config.json": {"_class_name": "AutoencoderKLWan"}},
        clip={"latents": (16, 3, 4, 8)} | SANA_PROMPT,
    ),
    ("sanavideo", "Efficient-Large-Model/SANA-Video_2B_720p_diffusers"): Published(
        task="t2v",
        blocks=20,
        hidden_size=2240,
        frame_multiple=8,
        size_multiple=32,
        configs={"transformer/config.json": SANA_720P, "vae/config.json": LTX2_VAE},
        clip={"latents": (128, 3, 2, 4)} | SANA_PROMPT,
    ),
    ("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"): wan("t2v", WAN_TRANSFORMER, {}),
    ("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers"): wan("t2v", WAN_14B, {}),
    ("wan", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"): wan(
        "i2v", WAN_14B_I2V, WAN_FIRST_FRAME | {"image_embeds": (257, 1280)}
    ),
    ("wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"): wan("t2v", WAN_14B, {}, boundary_ratio=0.875),
    ("wan", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"): wan("i2v", WAN_A14B_I2V, WAN_FIRST_FRAME, boundary_ratio=0.9),
    ("wan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"): Published(
        task="i2v",
        blocks=30,
        hidden_size=3072,
        frame_multiple=4,
        size_multiple=32,
        configs={
            "model_index.json": WAN_INDEX | {"expand_timesteps": True},
            "transformer/config.json": WAN_5B,
            "vae/config.json": WAN_VAE_22,
        },
        clip={"latents": (48, 3, 2, 4)} | WAN_PROMPT,
    ),
    ("kandinsky5_video", "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"): Published(
        task="t2v",
        blocks=32,
        hidden_size=1792,
        frame_multiple=4,
        size_multiple=16,
        configs={"transformer/config.json": KANDINSKY_LITE, "vae/config.json": HUNYUAN_VAE},
        clip=KANDINSKY_CLIP,
    ),
    ("kandinsky5_video", "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers"): Published(
        task="i2v",
        blocks=60,
        hidden_size=4096,
        frame_multiple=4,
        size_multiple=16,
        configs={"transformer/config.json": KANDINSKY_PRO, "vae/config.json": HUNYUAN_VAE},
        clip=KANDINSKY_CLIP | {"first_frame": (16, 1, 4, 8)},
    ),
}
