"""Settings of the video model and of the memory it takes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from crepa_cli.profile.table import FAMILY_DEFAULT, Table, Text, resolved_later


class ModelSettings(Table):
    """The video model that is fine-tuned."""

    family: Text = Field(description="Model family, such as wan or ltxvideo.")
    task: Literal["t2v", "i2v"] = Field(
        default="t2v", description="t2v generates video from text, i2v from an image and text."
    )
    checkpoint: Text = resolved_later(
        FAMILY_DEFAULT,
        example="owner/model",
        description="Hub id or local folder of the base model, or its transformer in one .safetensors file with the "
        "original names.",
    )
    components: Text | None = Field(
        default=None,
        description="Hub id or local folder with everything but the transformer, if checkpoint is a single file. none: "
        "the published model that the file looks like.",
    )
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of the checkpoint on the Hub. none: its main branch."
    )
    variant: Text | None = Field(
        default=None,
        description="Which expert to train if the checkpoint has several, such as high or low; both trains each in "
        "the steps of its own noise levels. none: the first one.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16",
        description="Data type of the frozen weights and of the computation. float32 takes twice the memory.",
    )
    vae_dtype: Literal["bfloat16", "float32"] = Field(
        default="float32",
        description="Data type of the VAE and of the image encoder. bfloat16 takes half the memory and is less exact.",
    )
    vae_tiling: bool | None = Field(
        default=None,
        description="Let the VAE work on overlapping tiles of the frames: far less memory for large videos, a little "
        "slower, and slightly different. none: as the model's own code does.",
    )
    audio: bool = Field(
        default=False,
        description="Train the sound of the clips with the video. No family can yet, and the message says why.",
    )

    @property
    def repository(self) -> str:
        """The Hub id or local folder in the layout of diffusers."""
        return self.components or self.checkpoint


class MemorySettings(Table):
    """Ways to train with less memory on the GPU: all but `quantize_base` leave the result as it is, up to rounding."""

    stream_weights: bool = Field(
        default=False,
        description="Keep the frozen blocks in the host's memory and copy each to the GPU while the one before it "
        "computes: two blocks are on the GPU in place of all. The text encoder is streamed too. For a LoRA with "
        "activation checkpointing.",
    )
    offload_idle_expert: bool = Field(
        default=False,
        description="Keep the frozen blocks of the expert that is not at work in the host's memory: one is on the GPU "
        "in place of two. For model.variant = both.",
    )
    offload_activations: bool = Field(
        default=False,
        description="Let the hidden states between blocks wait for the backward in the host's memory. It needs "
        "activation checkpointing.",
    )
    finer_recompute: bool = Field(
        default=False,
        description="Recompute attention and feed-forward each on their own in the backward: less memory for more "
        "time. The result changes by rounding alone.",
    )
    keep: Literal["nothing", "attention", "all"] = Field(
        default="nothing",
        description="Activations that activation checkpointing keeps instead of recomputing them, for speed: the "
        "results of self-attention, or all, which is the same as turning it off.",
    )
    keep_blocks: int = Field(
        default=0,
        ge=0,
        description="Number of blocks, counted from the last one, that keep all their activations; the others keep "
        "what `keep` says. For memory that is left over.",
    )
    quantize_base: Literal["none", "int8"] = Field(
        default="none",
        description="int8 rounds the frozen linear layers to 8 bits with a scale per row: half the memory of bfloat16, "
        "on the GPU and on the host, and slightly different results. For adapter.kind = lora; exports are unchanged.",
    )
