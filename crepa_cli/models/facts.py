"""The facts of a family and of its checkpoint, which need no weights."""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from crepa_cli.errors import UserError
from crepa_cli.models.base import BaseCheckpoint
from crepa_cli.models.noise import Flow, NoiseProcess
from crepa_cli.models.single_file import SingleFile

BOTH = "both"
"""The `model.variant` that trains every expert of a checkpoint."""
Tables = Mapping[str, Mapping[str, object]]
"""Settings by table and key, as they stand in a profile."""


class FamilyFacts(ABC):
    """The facts of a family for one task, and of the checkpoint that it is used with, from its configuration alone.

    Args:
        checkpoint: a local folder in diffusers' layout, or a Hub id. Only its configuration is read.
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
    text_components: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    """Components that `encode_prompt` needs."""
    image_components: tuple[str, ...] = ()
    """Components that encode the first frame beside the VAE."""

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
    def published_like(cls, base: BaseCheckpoint, task: str) -> str | None:  # noqa: ARG003 (for families with several)
        """The published checkpoint whose defaults fit an unpublished one, by its configuration; None for the family's.

        Raises:
            UserError: if the configuration cannot be read.
        """
        return None

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
    def trained(self) -> Mapping[str, Self]:
        """The recipe of each transformer that is trained, by its expert's name; itself under "" if it is one alone."""
        return {name: self._of_expert(name) for name in self.experts} if self.trains_all else {"": self}

    def _of_expert(self, name: str) -> Self:
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

    @property
    def encoding(self) -> dict[str, object]:
        """How clips are encoded, as far as it differs from the mode of an untiled VAE in float32."""
        options = {
            "posterior": "sample" if self.samples_posterior else None,
            "tiling": self.vae_tiling or None,
            "dtype": None if self.vae_dtype == torch.float32 else str(self.vae_dtype),
        }
        return {name: value for name, value in options.items() if value is not None}

    def with_blocks(self, *counts: int) -> Self:
        """The same recipe for a transformer with other `depths`: of the first kinds of blocks, or of all."""
        family = copy(self)
        family.config = self.config | dict(zip(self.depth_settings, counts, strict=False))
        return family

    def with_file(self, path: Path) -> Self:
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

    def without_image_encoder(self) -> Self:
        """The same recipe for a base model without an image encoder."""
        family = copy(self)
        family.image_components = ()
        return family

    def _expert(self, variant: str | None) -> str:
        """The component to train, or the first one of several."""
        if variant is None or (variant == BOTH and self.experts):
            return self.transformer_components[0]
        if variant not in self.experts:
            known = f"one of: {', '.join((*self.experts, BOTH))}" if self.experts else "none: it holds one transformer"
            raise UserError(f"model.variant = {variant!r}: {self.base.name} has no such expert; choose {known}")
        return self.experts[variant]
