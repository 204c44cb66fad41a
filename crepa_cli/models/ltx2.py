"""LTX-2 and its successors (arXiv 2601.03233): text to video, and image to video from a clean first frame.

The video is trained alone, as its authors' trainer trains it without audio: neither stream attends to the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline, LTX2Pipeline
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift
from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT, LTX2_5_IMAGE_CRF
from torch import Tensor

from crepa_cli.models.family import Family, Tensors, TransformerStep
from crepa_cli.models.ltxvideo import SHIFT, with_first_frame
from crepa_cli.models.vae import decoded_video, normalized_latents


class Ltx2(Family):
    """LTX-2 transformers of any version; hidden states are row-major patches of latents of the video.

    Captions are encoded by Gemma and then by the connectors, which have registers in place of the padding. Both are
    frozen, so that what the connectors return is stored.
    """

    name = "ltx2"
    transformer_class = "LTX2VideoTransformer3DModel"
    blocks_attribute = "transformer_blocks"
    pipelines = {"t2v": "LTX2Pipeline", "i2v": "LTX2ImageToVideoPipeline"}
    checkpoints = dict.fromkeys(pipelines, "Lightricks/LTX-2")
    text_components = ("text_encoder", "tokenizer", "connectors")
    negative_prompt = DEFAULT_NEGATIVE_PROMPT
    comfyui_names = {
        r"^(audio_)?proj_in$": r"\1patchify_proj",
        r"^(audio_)?time_embed\b": r"\1adaln_single",
        r"^(audio_)?prompt_adaln\b": r"\1prompt_adaln_single",
        r"^av_cross_attn_(video|audio)_scale_shift\b": r"av_ca_\1_scale_shift_adaln_single",
        r"^av_cross_attn_(?:video|audio)_(a2v|v2a)_gate\b": r"av_ca_\1_gate_adaln_single",
        r"\b(video|audio)_a2v_cross_attn_scale_shift_table$": r"scale_shift_table_a2v_ca_\1",
        r"\bnorm_([qk])$": r"\1_norm",
    }
    no_audio = (
        "diffusers publishes its audio VAE, but neither the code that makes the VAE's spectrograms from sound nor the "
        "length of their windows"
    )
    # ltx-trainer: scripts/process_captions.py; the pipelines' default too.
    caption_tokens = 1024
    takes_frame_rate = True
    uses_all_weights = False  # the audio takes no part
    guides_in_one_batch = True
    settings = {
        "crepa": {"block_index": 8},
        "adapter": {
            "rank": 32,
            # The attention of the video (ltx-trainer: docs/training-modes.md); that of the audio gets no gradient.
            "target_modules": [
                f"attn{part}.{layer}" for part in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")
            ],
            "export": ["diffusers", "comfyui"],
        },
        # ltx-trainer: docs/quick-start.md and configs/t2v_lora.yaml.
        "data": {"width": 960, "height": 544, "frames": 49, "fps": 24.0},
        "train": {"learning_rate": 1e-4, "timestep_sampling": "stretched"},
        "validation": {"guidance_scale": 3.0},
    }
    # The lowest rate of ltx-trainer's docs/configuration-reference.md, which has none for full fine-tuning alone. For
    # ComfyUI such a file would need the connectors too.
    full_settings = {
        "adapter": {"export": ["diffusers"]},
        "train": {"learning_rate": 1e-5, "lr_scheduler": "linear"},
    }
    published = {
        "Lightricks/LTX-2": {},
        "diffusers/LTX-2.3-Diffusers": {},
        "Lightricks/LTX-2.5-Diffusers": {},
    }

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Gemma and the connectors, which have 1.4 billion weights and more."""
        return ("text_encoder", "connectors")

    @property
    def vae_components(self) -> tuple[str, ...]:
        """The VAE of the video, and what decodes the sound that the pipelines sample with it."""
        return (*super().vae_components, "audio_vae", "vocoder")

    def timestep_shift(self, latents: Tensor) -> float:
        """Grows with the number of latents, as the pipeline's does."""
        return math.exp(calculate_shift(latents[0, 0].numel(), *SHIFT.values()))

    def for_encoded_prompts(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """The pipeline without its connectors, which the prompts have passed already."""
        audio = self._audio_caption_channels

        def passed(embeds: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
            return embeds[..., :-audio], embeds[..., -audio:], mask

        pipeline.connectors = passed
        return pipeline

    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """`prompt_embeds` `[1024, D]` of the connectors for the video, and `audio_prompt_embeds` `[1024, D']`.

        `prompt_attention_mask` `[1024]` is 1 where there are registers too.
        """
        states, mask, _, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=self.caption_tokens
        )
        embeds, audio_embeds, mask = pipeline.connectors(states, mask, padding_side=pipeline.tokenizer.padding_side)
        return {"prompt_embeds": embeds[0], "audio_prompt_embeds": audio_embeds[0], "prompt_attention_mask": mask[0]}

    def run_text_encoders(self, encoders: Sequence[Any], tokens: int) -> None:
        """Gemma with the states of all its layers, which the connectors take."""
        encoder, connectors = encoders
        mask = torch.ones(1, tokens, dtype=torch.int64)
        states = encoder(input_ids=torch.zeros_like(mask), attention_mask=mask, output_hidden_states=True).hidden_states
        connectors(torch.stack(states, dim=-1), mask)

    def longest_prompt(self, dtype: torch.dtype) -> Tensors:
        """Tensors like those of `encode_prompt`, which are as long for every caption."""
        tokens, audio = self.caption_tokens, self._audio_caption_channels
        return {
            "prompt_embeds": torch.empty(tokens, self._caption_channels, dtype=dtype),
            "audio_prompt_embeds": torch.empty(tokens, audio, dtype=dtype),
            "prompt_attention_mask": torch.empty(tokens, dtype=torch.int64),
        }

    @property
    def _caption_channels(self) -> int:
        projected = self.config["use_prompt_embeddings"]
        return int(self.config["caption_channels" if projected else "cross_attention_dim"])

    @property
    def _audio_caption_channels(self) -> int:
        projected = self.config["use_prompt_embeddings"]
        return int(self.config["caption_channels" if projected else "audio_cross_attention_dim"])

    def encode_clip(
        self, pipeline: DiffusionPipeline, video: Tensor, generator: torch.Generator | None = None
    ) -> Tensors:
        """`latents` `[C, T, h, w]`, normalized; the first of them is that of the first frame alone."""
        return {"latents": normalized_latents(pipeline.vae, video, generator)}

    def decode_latents(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of `encode_clip`, as far as the VAE is; a denoising decoder gets a noise level of 0."""
        conditioned = pipeline.vae.config.timestep_conditioning
        return decoded_video(pipeline.vae, latents, latents.new_zeros(1) if conditioned else None)

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """Latents are packed into tokens; in image to video those of the first frame are clean, at timestep 0.

        The audio is one silent token, as the video does not attend to it.
        """
        latents, grid = batch["latents"], self.token_grid(batch["latents"])
        hidden = self._packed(self.noise_process.add_noise(latents, noise, sigmas))
        timestep, weight = sigmas[:, None] * 1000, None
        if self.task == "i2v":
            hidden, timestep, weight = with_first_frame(hidden, self._packed(latents), timestep, grid)
        return TransformerStep(
            inputs={
                "hidden_states": hidden,
                "timestep": timestep,
                "sigma": sigmas * 1000,
                "encoder_hidden_states": batch["prompt_embeds"],
                "encoder_attention_mask": batch["prompt_attention_mask"],
                "video_coords": self._rotary.prepare_video_coords(
                    *latents[:, 0].shape, latents.device, fps=batch["fps"][:, None, None]
                ),
                "audio_hidden_states": latents.new_zeros(len(latents), 1, self.config["audio_in_channels"]),
                "audio_encoder_hidden_states": torch.zeros_like(batch["audio_prompt_embeds"][:, :1]),
                "audio_timestep": sigmas * 1000,
                "audio_num_frames": 1,
                "isolate_modalities": True,
            },
            target=self._packed(self.noise_process.target(latents, noise, sigmas)),
            weight=weight,
        )

    def _packed(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, T, h, w]` as tokens `[B, N, C']`."""
        packed: Tensor = LTX2Pipeline._pack_latents(latents, self.config["patch_size"], self.config["patch_size_t"])
        return packed

    @cached_property
    def _rotary(self) -> LTX2AudioVideoRotaryPosEmbed:
        """The transformer's own, which has no weights, for the positions in seconds and pixels."""
        return LTX2AudioVideoRotaryPosEmbed(
            self.hidden_size,
            self.config["patch_size"],
            self.config["patch_size_t"],
            scale_factors=self.config["vae_scale_factors"],
            causal_offset=self.config["causal_offset"],
        )

    @property
    def fewest_sampling_steps(self) -> int:
        """Two if the scheduler stretches the noise levels between the first and the last one."""
        return 2 if self.base.read_config("scheduler/scheduler_config.json").get("shift_terminal") else 1

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:
        """Both prompts, and what depends on the version: the pipelines' defaults are those of LTX-2.3.

        The embeddings for the video and for the audio are concatenated; see `for_encoded_prompts`.
        """
        arguments: dict[str, Any] = {"use_cross_timestep": self.config["cross_attn_mod"]}
        for prefix, tensors in (("", prompt), ("negative_", negative_prompt)):
            both = torch.cat([tensors["prompt_embeds"], tensors["audio_prompt_embeds"]], dim=-1)
            arguments[f"{prefix}prompt_embeds"] = both[None]
            arguments[f"{prefix}prompt_attention_mask"] = tensors["prompt_attention_mask"][None]
        if not self.config["perturbed_attn"]:
            # Without it, spatio-temporal guidance would run the transformer once more, and change nothing.
            arguments["stg_scale"] = arguments["audio_stg_scale"] = 0.0
        if self.task == "i2v" and self.base.read_config("text_encoder/config.json")["model_type"].startswith("gemma4"):
            # The pipeline would ask the text encoder, which is not loaded.
            arguments["image_crf"] = LTX2_5_IMAGE_CRF
        return arguments

    def form_arguments(self, *, width: int, height: int, frames: int, fps: float) -> dict[str, Any]:
        """Size, length and frame rate, which scales the positions in time."""
        return super().form_arguments(width=width, height=height, frames=frames, fps=fps) | {"frame_rate": fps}
