"""Families of video diffusion transformers: how each turns clips and prompts into inputs and a target.

A family is one subclass in one file. It states facts (`FamilyFacts`: classes, defaults, compression), encodes prompts
and clips, builds the transformer's inputs and target, and locates its tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from crepa_cli.alignment import TokenGrid
from crepa_cli.models.base import check_embedding
from crepa_cli.models.facts import FamilyFacts
from crepa_cli.models.int8 import has_int8, quantize_linears
from crepa_cli.models.precision import compute_in_own_dtype, in_loaded_dtypes, keep_float32
from crepa_cli.models.weights import make_hollow, read_weights

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TransformerStep:
    """One forward pass to train on: the transformer's keyword arguments and its target.

    `target` has the shape of the prediction. `weight` broadcasts to it and is 0 for parts that are inputs rather
    than predictions, such as the first frame of image to video.
    """

    inputs: Mapping[str, Any]
    target: Tensor
    weight: Tensor | None = None


class Family(FamilyFacts):
    """The recipe of one family for one task, with the base model that it is used with."""

    # Loading.

    def load_transformer(self, dtype: torch.dtype, *, int8: bool = False) -> ModelMixin:
        """The transformer, on the CPU, with parameters that require no gradient.

        Args:
            dtype: of the weights, except those that diffusers keeps in float32.
            int8: whether the linear layers of the blocks are quantized while they are read.

        Raises:
            UserError: if the checkpoint is incomplete.
        """
        return self._load_expert(self.component, dtype, int8=int8).requires_grad_(False)

    def _load_expert(self, component: str, dtype: torch.dtype, *, int8: bool) -> ModelMixin:
        if not int8 and self.base.file is None:
            return self._adapted(self.base.load_model(self.transformer_class, component, dtype))
        # Not from_single_file: it would cast the weights that from_pretrained keeps in float32.
        transformer = self._without_weights(component, dtype, int8=int8)
        read_weights(transformer, self.base.stored(component), self.base.source(component))
        return transformer.eval()

    def _without_weights(self, component: str, dtype: torch.dtype, *, int8: bool) -> ModelMixin:
        # torch.device("meta") would take the content of buffers too, which is in no checkpoint.
        with init_empty_weights():
            return self._from_config(self.base.read_config(f"{component}/config.json"), dtype, int8=int8)

    def hollow_transformer(self, dtype: torch.dtype, *, int8: bool = False) -> ModelMixin:
        """The transformer of `load_transformer` before `read_weights`: a LoRA may be added and its weights sharded.

        Its parameters take no memory; its buffers have their content.
        """
        transformer = self._without_weights(self.component, dtype, int8=int8)
        make_hollow(transformer)
        return transformer

    def read_weights(self, transformer: ModelMixin) -> None:
        """Give the parameters of a transformer on the meta device their weights; a sharded one its share of them.

        Raises:
            UserError: if the checkpoint is incomplete.
        """
        read_weights(transformer, self.base.stored(self.component), self.base.source(self.component))

    def empty_transformer(self, dtype: torch.dtype, *, int8: bool = False) -> ModelMixin:
        """The transformer of `load_transformer` without its weights, from the configuration alone.

        In `torch.device("meta")` or in a FakeTensorMode it takes no memory.
        """
        return self._from_config(self.config, dtype, int8=int8)

    def _from_config(self, config: Mapping[str, Any], dtype: torch.dtype, *, int8: bool) -> ModelMixin:
        transformer = in_loaded_dtypes(getattr(diffusers, self.transformer_class).from_config(config), dtype)
        if int8:
            quantize_linears(transformer, self.blocks(transformer))
        return self._adapted(transformer)

    def _adapted(self, transformer: ModelMixin) -> ModelMixin:
        """A stock transformer after the family has changed what it must in how it computes."""
        return keep_float32(transformer)

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """The transformer's blocks, in order."""
        blocks = getattr(transformer, self.blocks_attribute)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def load_text_pipeline(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The pipeline with the components that `encode_prompt` needs.

        Raises:
            UserError: if transformers has left the text encoder without its embedding.
        """
        return self._load_text_pipeline(dtype)

    def _load_text_pipeline(self, dtype: torch.dtype, **components: Any) -> DiffusionPipeline:
        without = (*self.transformer_components, *self.vae_components)
        pipeline = self.base.load_pipeline(self.pipeline_class, dtype=dtype, without=without, **components)
        for name in self.text_encoders:
            check_embedding(getattr(pipeline, name))
        return pipeline

    def load_vae_pipeline(self) -> DiffusionPipeline:
        """The pipeline with the components that `encode_clip` and `decode_latents` need."""
        without = (*self.transformer_components, *self.text_components)
        return self._with_tiling(self.base.load_pipeline(self.pipeline_class, dtype=self.vae_dtype, without=without))

    def empty_vae_pipeline(self) -> Any:
        """The pipeline with a VAE on the meta device and no other component."""
        config = self.base.read_config("vae/config.json")
        pipeline_class = getattr(diffusers, self.pipeline_class)
        with torch.device("meta"):
            vae = getattr(diffusers, config["_class_name"]).from_config(config).to(self.vae_dtype)
        required = [
            name for name, one in signature(pipeline_class).parameters.items() if one.default is Parameter.empty
        ]
        return self._with_tiling(pipeline_class(**dict.fromkeys(required) | {"vae": vae}))

    def _with_tiling(self, pipeline: Any) -> Any:
        if self.vae_tiling:
            pipeline.vae.enable_tiling()
        return pipeline

    def empty_image_embedding(self) -> Tensors:
        """`image_embeds` `[N, D]` of a first frame, without content, class token included; none without an encoder."""
        if self.image_encoder is None:
            return {}
        config = self.base.read_config(f"{self.image_encoder}/config.json")
        tokens = (config["image_size"] // config["patch_size"]) ** 2 + 1
        return {"image_embeds": torch.empty(tokens, config["hidden_size"], dtype=self.vae_dtype)}

    def load_sampling_pipeline(self, transformer: ModelMixin) -> DiffusionPipeline:
        """The pipeline for sampling videos from encoded prompts; its VAE keeps to `vae_dtype` under autocast.

        If several experts are trained, the pipeline lacks all but the first one.
        """
        frozen = {
            name: self._load_expert(name, transformer.dtype, int8=has_int8(transformer))
            for name in self.idle_components
        }
        trained = dict.fromkeys(self.transformer_components) | {self.component: transformer}
        pipeline = self.base.load_pipeline(
            self.pipeline_class, dtype=self.vae_dtype, without=self.text_components, **trained | frozen
        )
        compute_in_own_dtype(pipeline.vae)
        return self._with_tiling(self.for_encoded_prompts(pipeline))

    def for_encoded_prompts(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """A pipeline that takes the prompts of `sampling_arguments`, if it must be changed for that, in place."""
        return pipeline

    # Preparation: once per clip, before training.

    @abstractmethod
    def encode_prompt(self, pipeline: DiffusionPipeline, caption: str) -> Tensors:
        """The tensors of a caption, without batch dimensions, as the pipeline's call makes them.

        `prompt_embeds` `[L, D]` is among them.
        """

    def encode_negative_prompt(self, pipeline: DiffusionPipeline, prompt: str) -> Tensors:
        """The tensors of a negative prompt; see `encode_prompt`."""
        return self.encode_prompt(pipeline, prompt)

    def run_text_encoders(self, encoders: Sequence[Any], tokens: int) -> None:
        """Run the models of `text_encoders` as `encode_prompt` does, on a caption without content.

        Args:
            encoders: in the order of `text_encoders`.
            tokens: of the caption.
        """
        for encoder in encoders:
            limit = getattr(encoder.config.get_text_config(), "max_position_embeddings", tokens)
            encoder(input_ids=torch.zeros(1, min(tokens, limit), dtype=torch.int64))

    @abstractmethod
    def longest_prompt(self, dtype: torch.dtype) -> Tensors:
        """Tensors like those of `encode_prompt` for the longest caption that fits, without content.

        Args:
            dtype: of the text encoder.
        """

    @abstractmethod
    def encode_clip(
        self, pipeline: DiffusionPipeline, video: Tensor, generator: torch.Generator | None = None
    ) -> Tensors:
        """The tensors of a clip, each without a batch dimension; `latents` `[C, T, h, w]` are among them.

        Args:
            pipeline: from `load_vae_pipeline`.
            video: `[3, F, H, W]` in [-1, 1].
            generator: draws the latents from the VAE's posterior; None takes its mode.
        """

    @abstractmethod
    def decode_latents(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The video of a clip's latents `[C, T, h, w]`: `[3, F, H, W]` in [-1, 1]."""

    # Training.

    def token_grid(self, latents: Tensor) -> TokenGrid:
        """The grid of tokens of latents `[B, C, T, h, w]`: one for each patch."""
        frames, rows, columns = (size // patch for size, patch in zip(latents.shape[2:], self.patch, strict=True))
        return TokenGrid(frames, rows, columns)

    @abstractmethod
    def step(self, batch: Tensors, noise: Tensor, sigmas: Tensor) -> TransformerStep:
        """The transformer's inputs and target for a batch of clips.

        Args:
            batch: tensors of clips and captions with a batch dimension: `latents` `[B, C, T, h, w]`, `fps` `[B]` and
                those of this family.
            noise: like `latents`, standard normal.
            sigmas: noise levels `[B]` in [0, 1], already shifted.
        """

    def row_major(self, hidden: Tensor, grid: TokenGrid) -> Tensor:
        """Hidden states of a block as `[B, T, N, H]`, each frame's tokens row-major, whatever order the block uses."""
        return hidden.view(len(hidden), grid.frames, grid.tokens, -1)

    # Sampling.

    @property
    def fewest_sampling_steps(self) -> int:
        """The fewest steps that the pipeline's scheduler can take."""
        return 1

    def sampling_arguments(self, prompt: Tensors, negative_prompt: Tensors) -> dict[str, Any]:
        """The prompt arguments of the pipeline's call, from the tensors of `encode_prompt`.

        By default the tensors have the names of the arguments.
        """
        negative = {f"negative_{name}": tensor for name, tensor in negative_prompt.items()}
        return {name: tensor[None] for name, tensor in (prompt | negative).items()}

    def guide(self, pipeline: DiffusionPipeline, scale: float) -> dict[str, Any]:
        """The arguments of the pipeline's call for the strength of classifier-free guidance.

        A pipeline that has a component for it is changed in place instead.
        """
        if self.guider is None:
            return {"guidance_scale": scale}
        getattr(pipeline, self.guider).guidance_scale = scale
        return {}

    def form_arguments(self, *, width: int, height: int, frames: int, fps: float) -> dict[str, Any]:  # noqa: ARG002 (some take fps)
        """The arguments of the pipeline's call for the size, length and frame rate of the video."""
        return {"width": width, "height": height, "num_frames": frames}
