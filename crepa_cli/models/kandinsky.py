"""The common part of the generations of Kandinsky video models: text encoders, VAE, names in their configurations."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import AutoTokenizer

from crepa_cli.models.family import Family, Tensors
from crepa_cli.models.vae import scaled_latents, video_of_scaled


class Kandinsky(Family):
    """Transformers whose blocks see the video, after text blocks that see its caption alone.

    Captions are stored as long as the longest one can be, zero behind their own length, and are cut in a batch.
    """

    blocks_attribute = "visual_transformer_blocks"
    depth_settings = ("num_visual_blocks",)
    text_components = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    vae_tiling = True
    read_on_cpu = frozenset({"prompt_length"})
    negative_prompt = (
        "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, "
        "deformed, walking backwards"
    )
    prompt_tokens: ClassVar[int]
    """Most tokens of a caption in the pipeline's call."""

    @property
    def caption_blocks(self) -> int:
        """The text blocks of the video."""
        return int(self.config["num_text_blocks"])

    @property
    def hidden_size(self) -> int:
        """Width of the blocks' hidden states."""
        return int(self.config["model_dim"])

    @property
    def attention_heads(self) -> int:
        """Heads of the blocks' self-attention."""
        return int(self.hidden_size // sum(self.config["axes_dims"]))

    @property
    def size_multiple(self) -> int:
        """The VAE's compression times the patch: 16 pixels."""
        return self._pixels * int(self.config["patch_size"][1])

    @property
    def frame_multiple(self) -> int:
        """The VAE's compression of time."""
        return int(self.base.read_config("vae/config.json").get("temporal_compression_ratio", 4))

    @property
    def _pixels(self) -> int:
        return int(self.base.read_config("vae/config.json").get("spatial_compression_ratio", 8))

    def load_text_pipeline(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The pipeline with its text encoders, and the tokenizer alone of the processor that prepares images too.

        The pipeline gives it no image, and the whole of it needs torchvision.
        """
        pipeline = self.base.load_pipeline(
            self.pipeline_class, dtype=dtype, without=("transformer", "vae", "tokenizer")
        )
        pipeline.tokenizer = AutoTokenizer.from_pretrained(self.base.fetch("tokenizer") / "tokenizer")
        return pipeline

    def padded_prompt(self, embeds: Tensor, pooled: Tensor, length: int) -> Tensors:
        """The tensors of a caption: `prompt_embeds` `[prompt_tokens, D]`, `prompt_length` and `pooled_embeds` `[E]`.

        Args:
            embeds: `[L, D]` of Qwen2.5-VL.
            pooled: `[E]` of CLIP.
            length: of the caption; zeros follow it.
        """
        padded = embeds.new_zeros(self.prompt_tokens, embeds.shape[-1])
        padded[:length] = embeds[:length]
        return {"prompt_embeds": padded, "prompt_length": torch.tensor(length), "pooled_embeds": pooled}

    def longest_prompt(self, dtype: torch.dtype) -> Tensors:
        """`prompt_embeds` `[prompt_tokens, D]`, `prompt_length` and `pooled_embeds` `[E]`."""
        return {
            "prompt_embeds": torch.empty(self.prompt_tokens, self.config["in_text_dim"], dtype=dtype),
            "prompt_length": torch.tensor(self.prompt_tokens, device="cpu"),
            "pooled_embeds": torch.empty(self.config["in_text_dim2"], dtype=dtype),
        }

    def encode_clip(
        self, pipeline: DiffusionPipeline, video: Tensor, generator: torch.Generator | None = None
    ) -> Tensors:
        """`latents` `[C, T, h, w]`, and for image to video `first_frame` `[C, 1, h, w]`, encoded on its own."""
        tensors = {"latents": scaled_latents(pipeline.vae, video, generator)}
        if self.task == "i2v":
            tensors["first_frame"] = scaled_latents(pipeline.vae, video[:, :1], generator)
        return tensors

    def decode_latents(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of `encode_clip`, as far as the VAE is."""
        return video_of_scaled(pipeline.vae, latents)
