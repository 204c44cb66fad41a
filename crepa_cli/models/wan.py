"""Wan 2.1 and 2.2 (arXiv 2503.20314): text to video and image to video.

The configuration of the base model tells three layouts apart. Wan 2.1 and the experts of Wan 2.2 A14B take the first
frame in extra input channels; Wan 2.2 TI2V takes it in place of the noisy one, with a timestep of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from crepa_cli.errors import UserError
from crepa_cli.models.base import BaseCheckpoint
from crepa_cli.models.family import Family, Tensors, TransformerStep
from crepa_cli.models.vae import decoded_video, normalized_latents

PROMPT_TOKENS = 512
"""Length of the text sequence in the pipeline's call; the transformer's image attention relies on it."""

SHIFT_480P = 3.0
"""The shift at 832 x 480; it is 5 at 1280 x 720 (diffusers: pipeline_wan.py; Wan2.1: generate.py)."""
A14B_SHIFT = {"t2v": 12.0, "i2v": 5.0}
"""The shift that Wan 2.2 A14B is sampled with (Wan2.2: wan/configs), whatever its scheduler file says."""


class Wan(Family):
    """Wan transformers of any size; hidden states are row-major patches of (1, 2, 2) latents."""

    name = "wan"
    transformer_class = "WanTransformer3DModel"
    blocks_attribute = "blocks"
    token_parts = ("ffn",)
    pipelines = {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline"}
    checkpoints = {"t2v": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "i2v": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"}
    settings = {
        "crepa": {"block_index": 8},
        "adapter": {
            "rank": 32,
            "target_modules": [
                "to_q",
                "to_k",
                "to_v",
                "to_out.0",
                "add_k_proj",
                "add_v_proj",
                "ffn.net.0.proj",
                "ffn.net.2",
            ],
            "export": ["diffusers", "comfyui"],
        },
        # Wan-Video/Wan2.1 and Wan2.2: wan/configs.
        "data": {"width": 832, "height": 480, "frames": 81, "fps": 16.0},
        # DiffSynth-Studio: examples/wanvideo/model_training/lora.
        "train": {"learning_rate": 1e-4},
        "validation": {"guidance_scale": 5.0},
    }
    # DiffSynth-Studio: examples/wanvideo/model_training/full.
    full_settings = {"train": {"learning_rate": 1e-5}}
    published = {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"train": {"timestep_shift": SHIFT_480P}},
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"train": {"timestep_shift": SHIFT_480P}},
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": {"train": {"timestep_shift": SHIFT_480P}},
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": {
            "data": {"width": 1280, "height": 720},
            "train": {"timestep_shift": 5.0},
        },
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {"train": {"timestep_shift": A14B_SHIFT["t2v"]}},
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": {"train": {"timestep_shift": A14B_SHIFT["i2v"]}},
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {
            "data": {"width": 1280, "height": 704, "frames": 121, "fps": 24.0},
            "train": {"timestep_shift": 5.0},
        },
    }
    negative_prompt = (
        "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
        "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, "
        "poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still "
        "picture, messy background, three legs, many people in the background, walking backwards"
    )
    comfyui_names = {
        r"\battn1\b": "self_attn",
        r"\battn2\b": "cross_attn",
        r"\bto_([qkv])$": r"\1",
        r"\bto_out\.0$": "o",
        r"\badd_([kv])_proj$": r"\1_img",
        r"\bnorm_added_k$": "norm_k_img",
        r"\bffn\.net\.0\.proj$": "ffn.0",
        r"\bffn\.net\.2$": "ffn.2",
        r"^condition_embedder\.time_proj$": "time_projection.1",
        r"^condition_embedder\.(time|text)_embedder\.linear_1$": r"\1_embedding.0",
        r"^condition_embedder\.(time|text)_embedder\.linear_2$": r"\1_embedding.2",
        r"^condition_embedder\.image_embedder\.norm1$": "img_emb.proj.0",
        r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$": "img_emb.proj.1",
        r"^condition_embedder\.image_embedder\.ff\.net\.2$": "img_emb.proj.3",
        r"^condition_embedder\.image_embedder\.norm2$": "img_emb.proj.4",
        r"^condition_embedder\.image_embedder\.pos_embed$": "img_emb.emb_pos",
        r"^(blocks\.\d+)\.norm2$": r"\1.norm3",
        r"^(blocks\.\d+)\.scale_shift_table$": r"\1.modulation",
        r"^scale_shift_table$": "head.modulation",
        r"^proj_out$": "head.head",
    }

    def __init__(self, checkpoint: str, task: str, revision: str | None = None, variant: str | None = None) -> None:
        super().__init__(checkpoint, task, revision, variant)
        self.per_token_timesteps = bool(self._index.get("expand_timesteps"))
        if task == "i2v" and self.config.get("image_dim"):
            self.image_components = ("image_encoder", "image_processor")
        takes_image = self.config["in_channels"] != (self.config.get("out_channels") or self.config["in_channels"])
        if not self.per_token_timesteps and takes_image != (task == "i2v"):
            raise UserError(
                f"{checkpoint} generates from {'an image' if takes_image else 'text alone'}, not {task!r}; "
                f"--checkpoint {self.checkpoints[task]} does, and so does leaving --checkpoint out"
            )

    @classmethod
    def published_like(cls, base: BaseCheckpoint, task: str) -> str | None:
        """Those of Wan 2.2; the configuration does not tell the sizes of Wan 2.1 apart."""
        index = base.read_config("model_index.json")
        if index.get("expand_timesteps"):
            return "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
        if index.get("boundary_ratio") is not None:
            return f"Wan-AI/Wan2.2-{task.upper()}-A14B-Diffusers"
        return None

    @cached_property
    def _index(self) -> dict[str, Any]:
        return self.base.read_config("model_index.json")

    @cached_property
    def experts(self) -> Mapping[str, str]:
        """`high` denoises above the boundary in `model_index.json` and `low` below, in Wan 2.2 A14B."""
        return {} if self._boundary is None else {"high": "transformer", "low": "transformer_2"}

    @property
    def architecture(self) -> str:
        """musubi-tuner's name, and the version."""
        return "wan2.2" if self.experts or self.per_token_timesteps else "wan2.1"

    @property
    def _boundary(self) -> float | None:
        return self._index.get("boundary_ratio")

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise levels of the expert that is trained; all of them if both are."""
        if self._boundary is None or self.trains_all:
            return 0.0, 1.0
        return (self._boundary, 1.0) if self.component == "transformer" else (0.0, self._boundary)

    @property
    def lora_loading_arguments(self) -> dict[str, object]:
        """The second expert must be named."""
        return {"load_into_transformer_2": True} if self.component == "transformer_2" else {}

    @property
    def size_multiple(self) -> int:
        """The VAE's compression times the patch: 16 pixels for Wan 2.1 and A14B, 32 for TI2V."""
        vae = self.base.read_config("vae/config.json")
        return int(vae.get("scale_factor_spatial", 8) * self.config["patch_size"][1])

    @property
    def frame_multiple(self) -> int:
        """The VAE's compression of time."""
        return int(self.base.read_config("vae/config.json").get("scale_factor_temporal", 4))

    def load_sampling_pipeline(self, transformer: ModelMixin) -> DiffusionPipeline:
        """The pipeline for sampling videos from encoded prompts, with the published shift."""
        pipeline = super().load_sampling_pipeline(transformer)
        if self._boundary is not None:
            pipeline.scheduler = type(pipeline.scheduler).from_config(
                pipeline.scheduler.config, flow_shift=A14B_SHIFT[self.task]
            )
        return pipeline

    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """`prompt_embeds` `[512, D]` of the T5 encoder, zero after the caption's end."""
        embeds, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
        )
        return {"prompt_embeds": embeds[0]}

    def longest_prompt(self, dtype: torch.dtype) -> Tensors:
        """`prompt_embeds` `[512, D]`."""
        return {"prompt_embeds": torch.empty(PROMPT_TOKENS, self.config["text_dim"], dtype=dtype)}

    def encode_clip(
        self, pipeline: DiffusionPipeline, video: Tensor, generator: torch.Generator | None = None
    ) -> Tensors:
        """`latents` `[C, T, h, w]`, normalized.

        For image to video also `condition` `[4 + C, T, h, w]`, the mask and the latents of the first frame followed by
        gray, and with an image encoder `image_embeds` `[N, D]` of the first frame.
        """
        tensors = {"latents": normalized_latents(pipeline.vae, video, generator)}
        if self.task == "i2v" and not self.per_token_timesteps:
            tensors["condition"] = _first_frame_condition(pipeline, video, tensors["latents"])
        if self.image_components:
            image = pipeline.video_processor.postprocess(video[None, :, 0], output_type="pil")
            tensors["image_embeds"] = pipeline.encode_image(image)[0]
        return tensors

    def decode_latents(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of `encode_clip`, as far as the VAE is."""
        return decoded_video(pipeline.vae, latents)

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """Timesteps are sigmas times 1000: one per clip, or one per token if the base model expects that."""
        latents, timestep, weight = batch["latents"], sigmas * 1000, None
        hidden = self.noise_process.add_noise(latents, noise, sigmas)
        if self.per_token_timesteps:
            weight = _generated_frames(latents, self.task)
            hidden = weight * hidden + (1 - weight) * latents
            timestep = (timestep[:, None] * weight.flatten()).repeat_interleave(self.token_grid(latents).tokens, dim=1)
        if "condition" in batch:
            hidden = torch.cat([hidden, batch["condition"]], dim=1)
        inputs = {"hidden_states": hidden, "timestep": timestep, "encoder_hidden_states": batch["prompt_embeds"]}
        if "image_embeds" in batch:
            inputs["encoder_hidden_states_image"] = batch["image_embeds"]
        return TransformerStep(inputs, self.noise_process.target(latents, noise, sigmas), weight)

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:
        """Prompt and negative prompt with a batch dimension."""
        return {
            "prompt_embeds": prompt["prompt_embeds"][None],
            "negative_prompt_embeds": negative_prompt["prompt_embeds"][None],
        }


def _first_frame_condition(pipeline: DiffusionPipeline, video: Tensor, latents: Tensor) -> Tensor:
    """The mask and latents that the pipeline concatenates to the noise: `[4 + C, T, h, w]`."""
    _, frames, height, width = video.shape
    image = video[None, :, 0].to(pipeline.device)
    prepared = pipeline.prepare_latents(
        image, 1, len(latents), height, width, frames, torch.float32, pipeline.device, latents=latents[None]
    )
    condition: Tensor = prepared[1][0]
    return condition


def _generated_frames(latents: Tensor, task: str) -> Tensor:
    """`[1, 1, T, 1, 1]`: 0 for the given frame of image to video, 1 for generated frames."""
    generated = torch.ones_like(latents[:1, :1, :, :1, :1])
    if task == "i2v":
        generated[:, :, 0] = 0
    return generated
