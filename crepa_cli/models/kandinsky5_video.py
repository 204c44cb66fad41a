"""Kandinsky 5 Video (arXiv 2511.14993): text to video and image to video."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    Kandinsky5T2VPipeline,
    ModelMixin,
)
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5AttnProcessor,
    fractal_unflatten,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from crepa_cli.alignment import TokenGrid
from crepa_cli.models.base import BaseCheckpoint
from crepa_cli.models.family import Tensors, TransformerStep
from crepa_cli.models.kandinsky import Kandinsky

NABLA_PATCH = 8
"""Rows and columns of the squares of tokens that NABLA attention keeps together."""
PRO_WIDTH = 4096
"""Width of the hidden states of the Pro models."""
SD_AREA, HD_AREA = 512 * 768, 1024 * 1024
"""Pixels of a frame in standard and in high definition."""

TEN_SECONDS = {"data": {"frames": 241}}
HD = {"data": {"width": 1280, "height": 768}}
HD_TEN_SECONDS = {"data": HD["data"] | TEN_SECONDS["data"]}


class CaptionAttention(Kandinsky5AttnProcessor):  # type: ignore[misc]  # diffusers has no types
    """Attention to captions of different lengths in one batch: none sees the padding behind its own caption.

    The transformer takes no mask, because its pipelines sample one caption at a time. The extra
    argument `text_lengths` is removed here before the transformer sees it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] | None = None

    def take_lengths(
        self, _transformer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook of the transformer: keeps its argument `text_lengths` for the attention."""
        self.lengths = keywords.get("text_lengths")
        return arguments, {name: value for name, value in keywords.items() if name != "text_lengths"}

    # Compiled, the attention would be compiled anew for every combination of lengths.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type here
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: None = None,
    ) -> Tensor:
        """Of the captions to themselves, or of the clips to the captions."""
        attend = super().__call__
        if self.lengths is None:
            attended: Tensor = attend(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params)
            return attended
        clips = [hidden_states[index : index + 1] for index in range(len(hidden_states))]
        if encoder_hidden_states is not None:
            captions = [encoder_hidden_states[index : index + 1, :length] for index, length in enumerate(self.lengths)]
            return torch.cat([attend(attn, clip, caption) for clip, caption in zip(clips, captions, strict=True)])
        assert rotary_emb is not None, "captions have positions"
        texts = [
            attend(attn, clip[:, :length], rotary_emb=rotary_emb[:, :length])[0]
            for clip, length in zip(clips, self.lengths, strict=True)
        ]
        return pad_sequence(texts, batch_first=True)


class Kandinsky5Video(Kandinsky):
    """Kandinsky 5 transformers of any size; hidden states are patches of latents, row-major or in squares (NABLA)."""

    name = "kandinsky5_video"
    transformer_class = "Kandinsky5Transformer3DModel"
    attention_parts = ("self_attention", "cross_attention")
    token_parts = ("feed_forward",)
    pipelines = {"t2v": "Kandinsky5T2VPipeline", "i2v": "Kandinsky5I2VPipeline"}
    checkpoints = {
        "t2v": "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
        "i2v": "kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers",
    }
    prompt_tokens = 512
    comfyui_names = {}
    comfyui_prefix = "transformer."
    architecture = "Kandinsky-5"
    settings = {
        "crepa": {"block_index": 8},
        "adapter": {
            "rank": 32,
            "target_modules": [
                "to_query",
                "to_key",
                "to_value",
                "self_attention.out_layer",
                "cross_attention.out_layer",
                "feed_forward.in_layer",
                "feed_forward.out_layer",
            ],
            "export": ["diffusers", "comfyui"],
        },
        # The README and configs/ of kandinskylab/kandinsky-5.
        "data": {"width": 768, "height": 512, "frames": 121, "fps": 24.0},
        # musubi-tuner: docs/kandinsky5.md.
        "train": {"learning_rate": 1e-4},
        "validation": {"guidance_scale": 5.0},
    }
    # No full fine-tune is published; that of the other families' authors.
    full_settings = {"train": {"learning_rate": 1e-5}}
    published = {
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers": {},
        "kandinskylab/Kandinsky-5.0-T2V-Lite-pretrain-5s-Diffusers": {},
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s-Diffusers": TEN_SECONDS,
        "kandinskylab/Kandinsky-5.0-T2V-Lite-pretrain-10s-Diffusers": TEN_SECONDS,
        "kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers": {},
        "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers": HD,
        "kandinskylab/Kandinsky-5.0-T2V-Pro-pretrain-5s-Diffusers": HD,
        "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-10s-Diffusers": HD_TEN_SECONDS,
        "kandinskylab/Kandinsky-5.0-T2V-Pro-pretrain-10s-Diffusers": HD_TEN_SECONDS,
        "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers": HD,
    }

    @classmethod
    def published_like(cls, base: BaseCheckpoint, task: str) -> str | None:
        """Pro by its width, and Lite of 10 seconds by its attention."""
        config = base.read_config("transformer/config.json")
        if config.get("model_dim", 0) >= PRO_WIDTH:
            return f"kandinskylab/Kandinsky-5.0-{task.upper()}-Pro-sft-5s-Diffusers"
        if config.get("attention_type") == "nabla":
            return "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s-Diffusers"
        return None

    @property
    def attention_heads(self) -> int:
        """Heads of the blocks' self-attention; 0 with NABLA, which compares some tokens alone."""
        return 0 if self._nabla else super().attention_heads

    @property
    def size_multiple(self) -> int:
        """The VAE's compression times the patch, and times the squares of NABLA: 16 or 128 pixels."""
        return super().size_multiple * (NABLA_PATCH if self._nabla else 1)

    @property
    def needs_compilation(self) -> bool:
        """NABLA attention computes the chosen squares of scores only if it is compiled."""
        return self._nabla

    @property
    def _nabla(self) -> bool:
        return bool(self.config.get("attention_type") == "nabla")

    def _adapted(self, transformer: ModelMixin) -> ModelMixin:
        """With attention that knows the length of each caption of a batch."""
        attend_captions = CaptionAttention()
        transformer.register_forward_pre_hook(attend_captions.take_lengths, with_kwargs=True)
        for block in transformer.text_transformer_blocks:
            block.self_attention.set_processor(attend_captions)
        for block in transformer.visual_transformer_blocks:
            block.cross_attention.set_processor(attend_captions)
            if self._nabla:
                block.self_attention.set_attention_backend("flex")
        return super()._adapted(transformer)

    def load_sampling_pipeline(self, transformer: ModelMixin) -> DiffusionPipeline:
        """The pipeline for sampling videos from encoded prompts, with the rotary scale that is trained."""
        pipeline = super().load_sampling_pipeline(transformer)
        pipeline._get_scale_factor = self.rotary_scale
        return pipeline

    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """`prompt_embeds` `[512, D]` of Qwen2.5-VL, zero from `prompt_length` on, and `pooled_embeds` `[E]` of CLIP."""
        embeds, pooled, ends = pipeline.encode_prompt([caption], max_sequence_length=self.prompt_tokens)
        return self.padded_prompt(embeds[0], pooled[0], int(ends[-1]))

    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """Channels are last; the first frame of image to video is clean and not scored. Timesteps are sigmas * 1000."""
        latents, grid = batch["latents"], self.token_grid(batch["latents"])
        hidden = self.noise_process.add_noise(latents, noise, sigmas)
        given = torch.zeros_like(latents[:, :1])
        if self.task == "i2v":
            hidden = torch.cat([batch["first_frame"], hidden[:, :, 1:]], dim=2)
            given[:, :, 0] = 1
        if self.config["visual_cond"]:
            hidden = torch.cat([hidden, torch.zeros_like(latents), given], dim=1)
        lengths = batch["prompt_length"].tolist()
        inputs = {
            "hidden_states": hidden.movedim(1, -1),
            "timestep": sigmas * 1000,
            "encoder_hidden_states": batch["prompt_embeds"][:, : max(lengths)],
            "pooled_projections": batch["pooled_embeds"],
            "visual_rope_pos": [torch.arange(n, device=latents.device) for n in (grid.frames, grid.rows, grid.columns)],
            "text_rope_pos": torch.arange(max(lengths), device=latents.device),
            "scale_factor": self.rotary_scale(*(size * self._pixels for size in latents.shape[3:])),
            "sparse_params": self._sparse_attention(grid, latents.device) if self._nabla else None,
        }
        if min(lengths) < max(lengths):
            inputs["text_lengths"] = lengths
        target = self.noise_process.target(latents, noise, sigmas)
        return TransformerStep(inputs, target.movedim(1, -1), (1 - given).movedim(1, -1))

    def rotary_scale(self, height: int, width: int) -> tuple[float, float, float]:
        """How far rotary positions are compressed in time, rows and columns, for a size in pixels.

        The Lite models are for standard definition, of 512 x 768 pixels. The Pro models have a configuration for that
        and one for high definition, of 1024 x 1024 pixels (kandinskylab/kandinsky-5: configs/, i2v_pipeline.py): the
        nearer one counts. The pipelines of diffusers go by the sides instead, and miss sizes such as 832 x 464.
        """
        high = self.config["model_dim"] >= PRO_WIDTH and height * width > math.sqrt(SD_AREA * HD_AREA)
        return (1, 3.16, 3.16) if high else (1, 2, 2)

    def _sparse_attention(self, grid: TokenGrid, device: torch.device) -> dict[str, Any]:
        """The mask of squares that always attend to each other, and the parameters of NABLA."""
        windows = {name: self.config[f"attention_{name}"] for name in ("wT", "wH", "wW")}
        rows, columns = grid.rows // NABLA_PATCH, grid.columns // NABLA_PATCH
        mask = Kandinsky5T2VPipeline.fast_sta_nabla(grid.frames, rows, columns, **windows, device=device)
        return {"sta_mask": mask[None, None], "P": self.config["attention_P"], "to_fractal": True}

    def row_major(self, hidden: Tensor, grid: TokenGrid) -> Tensor:
        """Hidden states as `[B, T, N, H]`; under NABLA each square of 8 x 8 tokens is one run in a block."""
        shape = (len(hidden), grid.frames, grid.rows, grid.columns)
        video: Tensor = fractal_unflatten(hidden, shape, block_mask=self._nabla)
        return video.flatten(2, 3)

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:
        """Both prompts without their padding, and their lengths."""
        return _prompt_arguments("", prompt) | _prompt_arguments("negative_", negative_prompt)


def _prompt_arguments(prefix: str, prompt: Tensors) -> dict[str, Tensor]:
    length = int(prompt["prompt_length"])
    return {
        f"{prefix}prompt_embeds_qwen": prompt["prompt_embeds"][None, :length],
        f"{prefix}prompt_embeds_clip": prompt["pooled_embeds"][None],
        f"{prefix}prompt_cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
    }
