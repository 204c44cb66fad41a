"""Families of video diffusion transformers: how each turns clips and prompts into inputs and a target.

A family is one subclass in one file. It states facts (classes, defaults, compression), encodes prompts and clips,
builds the transformer's inputs and target, and locates its tokens.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from crepa_cli.alignment import TokenGrid
from crepa_cli.errors import UserError
from crepa_cli.models.base import BaseCheckpoint, check_embedding
from crepa_cli.models.int8 import has_int8, quantize_linears
from crepa_cli.models.noise import Flow, NoiseProcess
from crepa_cli.models.precision import compute_in_own_dtype, in_loaded_dtypes, keep_float32
from crepa_cli.models.single_file import SingleFile
from crepa_cli.models.weights import make_hollow, read_weights

Tensors = dict[str, Tensor]
BOTH = "both"
"""The `model.variant` that trains every expert of a checkpoint."""
Tables = Mapping[str, Mapping[str, object]]
"""Settings by table and key, as they stand in a profile."""


@dataclass(frozen=True)
class TransformerStep:
    """One forward pass to train on: the transformer's keyword arguments and its target.

    `target` has the shape of the prediction. `weight` broadcasts to it and is 0 for parts that are inputs rather
    than predictions, such as the first frame of image to video.
    """

    inputs: Mapping[str, Any]
    target: Tensor
    weight: Tensor | None = None


class Family(ABC):
    """The recipe of one family for one task, with the base model that it is used with.

    Args:
        checkpoint: a local folder in diffusers' layout, or a Hub id. Only its configuration is read here.
        task: `t2v` or `i2v`.
        revision: branch, tag or commit on the Hub.
        variant: the expert to train, of a checkpoint that holds several transformers; `both` for all of them.

    Raises:
        UserError: if the family does not have the task, or the checkpoint is of another family or lacks the expert.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    blocks_attribute: ClassVar[str]
    depth_settings: ClassVar[tuple[str, ...]] = ("num_layers",)
    """The numbers of blocks in the transformer's configuration, one for each kind of block in the order of its run."""
    attention_parts: ClassVar[tuple[str, ...]] = ("attn1", "attn2")
    """The modules of a block that attend."""
    token_parts: ClassVar[tuple[str, ...]] = ()
    """Those that see each token alone, if recomputing them in chunks lowers the peak: wide feed-forwards. Some kinds of
    blocks may lack them."""
    pipelines: ClassVar[Mapping[str, str]]
    """The diffusers pipeline that generates each task."""
    checkpoints: ClassVar[Mapping[str, str]]
    """The default base model of each task."""
    settings: ClassVar[Tables]
    """Defaults of settings."""
    full_settings: ClassVar[Tables]
    """Defaults of full fine-tuning that differ from those of a LoRA."""
    published: ClassVar[Mapping[str, Tables]]
    """The published checkpoints by Hub id, each with its defaults that differ from the family's."""
    caption_tokens: int | None = None
    """Tokens of a caption; None if the pipeline decides."""
    takes_frame_rate: ClassVar[bool] = False
    """Whether the positions in time depend on the frame rate, so that a clip can be trained at its own."""
    vae_dtype: torch.dtype = torch.float32
    vae_tiling: bool = False
    """Whether the VAE works on overlapping tiles of the frames, as the family's own code does; a setting too."""
    streams_text_encoders: bool = False
    """Whether the layers of the text encoders stay on the host while others compute; a setting too."""
    samples_posterior: ClassVar[bool] = False
    """Whether it is trained on samples of the VAE's posterior, rather than on the mode."""
    only_size: tuple[int, int] | None = None
    """Width and height of the only size in pixels that it can be trained at; None for any."""
    noise_process: NoiseProcess = Flow()
    """How its latents are noised, and what it predicts."""
    negative_prompt: ClassVar[str]
    """Published with the model for classifier-free guidance."""
    motion_suffix: ClassVar[str | None] = None
    """How a prompt asks for an amount of motion, if the model knows one: a format with one number."""
    comfyui_names: ClassVar[Mapping[str, str] | None] = None
    """Patterns in module names and their replacements in the original names; None if ComfyUI does not run it."""
    comfyui_joined: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Linear layers that are several in diffusers: the last parts of their names there, by that of the original name.
    The rows of their weights follow each other in this order."""
    comfyui_prefix: ClassVar[str] = "diffusion_model."
    """Before the names of a LoRA for ComfyUI; one that diffusers reads too."""
    no_audio: ClassVar[str] = "it generates videos without sound"
    """Why `model.audio` is refused, about the family."""
    guider: ClassVar[str | None] = None
    """The pipelines' component with the strength of classifier-free guidance; None if their call has an argument."""
    read_on_cpu: ClassVar[frozenset[str]] = frozenset()
    """Tensors of a batch that `step` reads as numbers: on a GPU it would wait for them."""
    first_states_stay: ClassVar[bool] = False
    """Whether the first block's hidden states are a part of a larger tensor, which is not moved to the host."""
    uses_all_weights: ClassVar[bool] = True
    """Whether the loss depends on every weight of the transformer."""
    unused_components: ClassVar[tuple[str, ...]] = ()
    """Those of the checkpoint that neither training nor sampling needs: they are not downloaded."""
    lora_loader: ClassVar[str] = "load_lora_weights"
    """The pipeline's method that loads a LoRA file of diffusers, or that of one of its components."""
    guides_in_one_batch: ClassVar[bool] = False
    """Whether the pipelines run a prompt and its negative as one batch of two, rather than one after the other."""

    def __init__(self, checkpoint: str, task: str, revision: str | None = None, variant: str | None = None) -> None:
        if task not in self.pipelines:
            raise UserError(f"{self.name} is trained for {' and '.join(self.pipelines)}, not for {task!r}")
        self.base = BaseCheckpoint(checkpoint, revision, self.unused_components)
        self.task = task
        self.component = self._expert(variant)
        self.trains_all = variant == BOTH
        self.config = self.base.read_config(f"{self.component}/config.json")
        found = self.config.get("_class_name")
        if found != self.transformer_class:
            raise UserError(
                f"{checkpoint} holds a {found}, the family {self.name} needs a {self.transformer_class}; "
                "check --model and --checkpoint"
            )

    @classmethod
    def published_like(cls, base: BaseCheckpoint, task: str) -> str | None:  # noqa: ARG003
        """The published checkpoint whose defaults fit an unpublished one, by its configuration; None for the family's.

        Raises:
            UserError: if the configuration cannot be read.
        """
        return None

    # Facts of this checkpoint, from its configuration alone.

    @cached_property
    def experts(self) -> Mapping[str, str]:
        """Component of each expert, by its name in `model.variant`; the first is the default, and most have none."""
        return {}

    @property
    def expert(self) -> str | None:
        """The name of the expert that is trained; None if the checkpoint has one transformer, or all are trained."""
        if self.trains_all:
            return None
        return next((name for name, component in self.experts.items() if component == self.component), None)

    @property
    def trained(self) -> Mapping[str, Family]:
        """The recipe of each transformer that is trained, by its expert's name; itself under "" if it is one alone."""
        return {name: self._of_expert(name) for name in self.experts} if self.trains_all else {"": self}

    def _of_expert(self, name: str) -> Family:
        family = copy(self)
        family.trains_all = False
        family.component = self.experts[name]
        family.config = self.base.read_config(f"{family.component}/config.json")
        return family

    @property
    def architecture(self) -> str:
        """The kind of model in the header of exported files, by the name that other trainers give it."""
        return self.name

    @property
    def comfyui_header(self) -> Mapping[str, str]:
        """The entries that ComfyUI reads from the header of a file with all weights."""
        return {}

    def original_name(self, name: str) -> str:
        """The name that a module or parameter of the transformer has in the original checkpoint, which ComfyUI uses."""
        assert self.comfyui_names is not None, "open_family has checked it"
        module, dot, last = name.rpartition(".")
        if last not in ("weight", "bias"):
            module, dot, last = name, "", ""
        for pattern, replacement in self.comfyui_names.items():
            module = re.sub(pattern, replacement, module)
        return f"{module}{dot}{last}"

    def original_rows(self, module: str, tensor: Tensor) -> Tensor:  # noqa: ARG002 (some families have another order)
        """The weight or bias of a linear layer with its rows in the order of the original checkpoint, or back again."""
        return tensor

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest noise level that the transformer denoises."""
        return 0.0, 1.0

    @property
    def needs_compilation(self) -> bool:
        """Whether the transformer takes far more memory on a GPU unless `train.compile` is on."""
        return False

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of the transformer of each kind, in the order of `depth_settings`."""
        return tuple(int(self.config[setting]) for setting in self.depth_settings)

    @property
    def block_count(self) -> int:
        """Blocks of the transformer, of all kinds together."""
        return sum(self.depths)

    @property
    def caption_blocks(self) -> int:
        """Further blocks, of the same width, that see the caption alone."""
        return 0

    @property
    def hidden_size(self) -> int:
        """Width of the blocks' hidden states."""
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    @property
    def attention_heads(self) -> int:
        """Heads of the blocks' self-attention; 0 if it does not compare all tokens with all."""
        return int(self.config["num_attention_heads"])

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents that are one token: in time, height and width."""
        size = self.config["patch_size"]
        if isinstance(size, int):
            return int(self.config.get("patch_size_t") or 1), size, size
        frames, rows, columns = size
        return frames, rows, columns

    @property
    def size_multiple(self) -> int:
        """Width and height of a clip in pixels must be multiples of this: the VAE's compression times the patch."""
        return int(self.base.read_config("vae/config.json")["spatial_compression_ratio"] * self.patch[2])

    @property
    def frame_multiple(self) -> int:
        """A clip has this many frames times k, plus one: the temporal compression of the VAE."""
        return int(self.base.read_config("vae/config.json")["temporal_compression_ratio"])

    @property
    def trains_images(self) -> bool:
        """Whether an image is a clip to train on; image to video is given the first frame, and it has no other."""
        return self.task == "t2v"

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline that generates the task with this checkpoint."""
        return self.pipelines[self.task]

    def timestep_shift(self, latents: Tensor) -> float:  # noqa: ARG002 (some families shift by the size)
        """The shift of sigmas that latents `[B, C, T, h, w]` are sampled with; 1 leaves them as they are."""
        config = self.base.read_config("scheduler/scheduler_config.json")
        return float(config.get("flow_shift") or config.get("shift") or 1.0)

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

    text_components: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    """Components that `encode_prompt` needs."""
    image_components: tuple[str, ...] = ()
    """Components that encode the first frame beside the VAE."""

    @property
    def vae_components(self) -> tuple[str, ...]:
        """Components that `encode_clip` needs."""
        return ("vae", *self.image_components)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Those of `text_components` that have weights."""
        return tuple(name for name in self.text_components if name.startswith("text_encoder"))

    @property
    def image_encoder(self) -> str | None:
        """The one of `image_components` that has weights; None if the base model has none."""
        return self.image_components[0] if self.image_components else None

    @property
    def encoders(self) -> tuple[str, ...]:
        """Every component with weights that a preparation loads."""
        image = (self.image_encoder,) if self.image_encoder else ()
        return ("vae", *self.text_encoders, *image)

    @property
    def encoder_configs(self) -> tuple[str, ...]:
        """Configurations that the memory of a run depends on, beside the transformer's."""
        return ("model_index.json", *(f"{name}/config.json" for name in self.encoders))

    @property
    def lora_loading_arguments(self) -> dict[str, object]:
        """Arguments of the method `lora_loader` that the trained component needs."""
        return {}

    @property
    def transformer_components(self) -> tuple[str, ...]:
        """Every transformer of the checkpoint."""
        return tuple(self.experts.values()) or ("transformer",)

    @property
    def idle_components(self) -> tuple[str, ...]:
        """The transformers that are not trained, and that the pipeline samples with beside those that are."""
        trained = {family.component for family in self.trained.values()}
        return tuple(name for name in self.transformer_components if name not in trained)

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

    @property
    def encoding(self) -> dict[str, object]:
        """How clips are encoded, as far as it differs from the mode of an untiled VAE in float32."""
        options = {
            "posterior": "sample" if self.samples_posterior else None,
            "tiling": self.vae_tiling or None,
            "dtype": None if self.vae_dtype == torch.float32 else str(self.vae_dtype),
        }
        return {name: value for name, value in options.items() if value is not None}

    def with_blocks(self, *counts: int) -> Family:
        """The same recipe for a transformer with other `depths`: of the first kinds of blocks, or of all."""
        family = copy(self)
        family.config = self.config | dict(zip(self.depth_settings, counts, strict=False))
        return family

    def with_file(self, path: Path) -> Family:
        """The same recipe with the weights of its transformer from one file.

        Raises:
            UserError: if several transformers are trained, or it cannot be read or does not fit.
        """
        if self.trains_all:
            raise UserError(
                f"model.variant = {BOTH!r}: {path} holds one expert; train {' or '.join(self.experts)}, or name a "
                "folder or Hub id that has both"
            )
        family, base = copy(self), self.base
        family.base = SingleFile(path, self.transformer_class, self.component, base.name, base.revision)
        return family

    def without_image_encoder(self) -> Family:
        """The same recipe for a base model without an image encoder."""
        family = copy(self)
        family.image_components = ()
        return family

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

    def _expert(self, variant: str | None) -> str:
        """The component to train, or the first one of several."""
        if variant is None or (variant == BOTH and self.experts):
            return self.transformer_components[0]
        if variant not in self.experts:
            known = f"one of: {', '.join((*self.experts, BOTH))}" if self.experts else "none: it holds one transformer"
            raise UserError(f"model.variant = {variant!r}: {self.base.name} has no such expert; choose {known}")
        return self.experts[variant]

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

    def form_arguments(self, *, width: int, height: int, frames: int, fps: float) -> dict[str, Any]:  # noqa: ARG002
        """The arguments of the pipeline's call for the size, length and frame rate of the video."""
        return {"width": width, "height": height, "num_frames": frames}
