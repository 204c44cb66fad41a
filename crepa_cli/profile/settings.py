"""Every setting of a run: one class per table, one field per key, strict types and ranges.

The descriptions become the comments of `crepa.toml` and the help texts of editors.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import Field, model_validator

from crepa_cli.profile.alignment import CrepaSettings, LayerSyncSettings
from crepa_cli.profile.model import MemorySettings, ModelSettings
from crepa_cli.profile.sources import SourceSettings
from crepa_cli.profile.table import (
    FAMILY_DEFAULT,
    LISTED,
    SAME_AS_RANK,
    Table,
    Text,
    Texts,
    broken_rule,
    resolved_later,
)

Export = Literal["diffusers", "comfyui"]
FeatureDtype = Literal["float16", "int8"]
Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"]


class AdapterSettings(Table):
    """Trained weights and their export."""

    kind: Literal["lora", "full"] = Field(
        default="lora",
        description="lora trains a small adapter; full trains the whole transformer and takes far more memory.",
    )
    rank: int = resolved_later(
        FAMILY_DEFAULT,
        example=32,
        description="Rank of the LoRA matrices. A higher rank gives more capacity and takes more memory.",
        ge=1,
    )
    alpha: float = resolved_later(
        SAME_AS_RANK,
        example=32.0,
        description="The adapter's output is multiplied by alpha / rank.",
        gt=0,
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout probability of the adapter's inputs during training."
    )
    target_modules: Texts = resolved_later(
        FAMILY_DEFAULT,
        example=("to_q", "to_k", "to_v", "to_out.0"),
        description="Layers that get an adapter, by name or by the end of the name.",
        min_length=1,
    )
    init_from: Text | None = Field(
        default=None,
        description="LoRA to start from, of the same rank: a file, a folder, a Hub id, or owner/repository/file, for "
        "diffusers or ComfyUI. none: a new one, without effect.",
    )
    export: Annotated[tuple[Export, ...], LISTED, Field(strict=False)] = resolved_later(
        FAMILY_DEFAULT,
        example=("diffusers", "comfyui"),
        description="Programs to export the trained weights for, each with its own names of layers.",
        min_length=1,
    )
    export_dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Data type of the exported weights. float32 takes twice the space."
    )


class DataSettings(Table):
    """The clips to train on."""

    path: Text | None = Field(
        default=None,
        description="Folder of videos and images, with a caption beside each (clip.txt), or with metadata.jsonl or "
        "metadata.csv.",
    )
    sources: Annotated[tuple[SourceSettings, ...], Field(strict=False)] = Field(
        default=(),
        description="Several folders or datasets of the Hub in place of path, each as a table [[data.sources]].",
    )
    caption_lines: bool = Field(
        default=False,
        description="Take each line of clip.txt, or of a text in the metadata, as a caption of its own: one is drawn "
        "whenever the clip is trained on. false: lines belong to one caption. A list of texts in metadata.jsonl always "
        "stands for several captions.",
    )
    width: int = resolved_later(
        FAMILY_DEFAULT,
        example=832,
        description="Width of the clips in pixels. Width and height set the area of the aspect-ratio buckets.",
        ge=8,
    )
    height: int = resolved_later(
        FAMILY_DEFAULT,
        example=480,
        description="Height of the clips in pixels.",
        ge=8,
    )
    frames: int = resolved_later(
        FAMILY_DEFAULT,
        example=81,
        description="Frames per clip; clips are cut to the nearest count that the model accepts.",
        ge=1,
    )
    fps: float = resolved_later(
        FAMILY_DEFAULT,
        example=16.0,
        description="Frame rate that clips are resampled to. Slower clips keep their own if the rate is an "
        "input of the model; otherwise some of their frames are repeated.",
        gt=0,
    )
    sampling: Literal["head", "uniform", "windows"] = Field(
        default="head",
        description="Part of a long clip that is trained on: its head, one of several windows spread over it, drawn "
        "anew each time, or all of it, cut into windows.",
    )
    windows: int = Field(default=4, ge=1, description="Windows of a clip that uniform sampling draws from.")
    overlap: float = Field(
        default=0.0, ge=0, le=0.9, description="Share of a window that the next one repeats, if sampling is windows."
    )
    split_scenes: bool = Field(
        default=False, description="Divide videos at hard cuts, so that no clip crosses one; each scene is sampled."
    )
    repeats: int = Field(default=1, ge=1, description="Number of times each clip is used per epoch.")
    caption_dropout: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Probability of training a clip with an empty caption, which classifier-free guidance needs.",
    )
    cache: Text | None = Field(
        default=None,
        description="Cache of latents, prompts and teacher features. none: .crepa-cache in the clips' folder.",
    )
    feature_dtype: FeatureDtype = Field(
        default="float16",
        description="Data type of teacher features in the cache. int8, with a scale for each patch, takes half the "
        "space and rounds them.",
    )
    validation_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the clips, such as 0.1, that is never trained on: every validation measures the loss of "
        "these held-out clips. none: no clips.",
    )
    validation_path: Text | None = Field(
        default=None,
        description="Folder of held-out clips with captions, in place of a share. none: no folder.",
    )

    @model_validator(mode="after")
    def _one_kind_of_held_out_clips(self) -> DataSettings:
        if self.validation_share is not None and self.validation_path is not None:
            raise broken_rule(
                "choose one: validation_share holds out some of the clips, validation_path those of another folder",
                "validation_share",
                "validation_path",
            )
        return self

    @model_validator(mode="after")
    def _clear_sources(self) -> DataSettings:
        if self.path is not None and self.sources:
            raise broken_rule("choose one: path is one folder, sources are several", "path", "sources")
        if any((one.path is None) == (one.hub is None) for one in self.sources):
            raise broken_rule("each source needs either a path or a hub", "sources")
        if len({one.weight is None for one in self.sources}) > 1:
            raise broken_rule("give each source a weight, or none of them", "sources")
        return self

    @property
    def all_sources(self) -> tuple[SourceSettings, ...]:
        """The sources; a folder in `path` is the only one. Empty if the settings name no clips."""
        return self.sources or ((SourceSettings(path=self.path),) if self.path is not None else ())


class TrainSettings(Table):
    """Training length, optimizer and noise schedule."""

    steps: int = Field(default=2000, ge=1, description="Total number of optimizer steps.")
    batch_size: int = Field(default=1, ge=1, description="Clips per step on each device.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Number of batches accumulated per optimizer step.")
    learning_rate: float = resolved_later(
        FAMILY_DEFAULT,
        example=1e-4,
        description="Peak learning rate.",
        gt=0,
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = Field(
        default="adamw",
        description="adamw8bit stores its state in 8 bits (it needs bitsandbytes), adafactor stores next to none, and "
        "prodigy finds the learning rate (it needs prodigyopt, and learning_rate = 1).",
    )
    beta1: float = Field(
        default=0.9, ge=0, lt=1, description="Decay of the optimizer's average of the gradient; adafactor has none."
    )
    beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Decay of its average of the squared gradient; adafactor has its own."
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the optimizer's denominator; adafactor has its own.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay of the optimizer.")
    lr_scheduler: Literal[
        "constant", "linear", "cosine", "polynomial", "constant_with_warmup", "cosine_with_restarts"
    ] = Field(default="constant", description="Learning rate schedule, by its name in diffusers.")
    lr_warmup_steps: int = Field(
        default=0, ge=0, description="Optimizer steps over which the learning rate rises from 0; 'constant' ignores it."
    )
    lr_floor: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the learning rate at which its schedule ends, such as 0.1, in place of 0.",
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Maximum gradient norm for clipping; 0 turns clipping off."
    )
    max_skipped_steps: int = Field(
        default=10,
        ge=0,
        description="How many consecutive steps with a non-finite loss or gradient are skipped; one more ends the run.",
    )
    sharding: bool = Field(
        default=False,
        description="Shard weights and optimizer state across processes (FSDP2), for models too large for one GPU.",
    )
    activation_checkpointing: bool = Field(
        default=True,
        description="Recompute activations in the backward pass: far less memory, but about a third slower.",
    )
    attention: Literal["auto", "native", "flash", "cudnn", "efficient"] = Field(
        default="auto",
        description="Kernel of torch that computes self-attention. native lets torch choose; auto measures them at the "
        "start of a run on a GPU, for its largest clips, and takes the fastest.",
    )
    compile: bool = Field(
        default=False,
        description="Compile each of the transformer's blocks with torch.compile: slower to start, faster per step.",
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay per step of the moving average of the trained weights, such as 0.999; 0 turns it off.",
    )
    timestep_sampling: Literal["logit_normal", "stretched", "uniform"] = Field(
        default="logit_normal",
        description="Distribution of the noise levels, or timesteps. logit_normal favors the middle ones; stretched "
        "spreads it over all levels after the shift, for models whose shift grows with the clip.",
    )
    timestep_shift: float | None = Field(
        default=None,
        gt=0,
        description="Shift of the noise levels; above 1 trains more on high noise. none: as in the model's scheduler.",
    )
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field(
        default="none", description="How the diffusion loss of flow matching is weighted by noise level."
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="Random seed of the run.")
    output: Text | None = Field(default=None, description="Output folder of the run. none: a new folder in runs/.")


class ValidationSettings(Table):
    """Validation videos sampled during training."""

    every: int = Field(
        default=500,
        ge=0,
        description="Optimizer steps between validations, the first of which comes before training; 0 turns them off.",
    )
    prompts: Texts = Field(
        default=(),
        description="Prompts to sample videos from, one video per prompt. Without any, two captions of the clips are "
        "taken, and for image to video the first frames of these clips.",
    )
    negative_prompt: str | None = Field(
        default=None,
        description='What the videos should not look like. none: as published with the model; "" for nothing.',
    )
    images: Texts = Field(
        default=(),
        description="Image files used as first frames for image to video, one per prompt, in the same order.",
    )
    motion_score: int | None = Field(
        default=None, ge=0, description="Amount of motion that the prompts ask SANA-Video for, such as 30. none: none."
    )
    steps: int = Field(default=30, ge=1, description="Denoising steps per video.")
    guidance_scale: float = resolved_later(
        FAMILY_DEFAULT,
        example=5.0,
        description="Strength of classifier-free guidance.",
        ge=0,
    )
    frames: int | None = Field(default=None, ge=1, description="Frames per video. none: same as data.frames.")

    @model_validator(mode="after")
    def _an_image_per_prompt(self) -> ValidationSettings:
        if self.images and len(self.images) != len(self.prompts):
            raise broken_rule(
                f"needs one image per prompt: {len(self.images)} images, {len(self.prompts)} prompts",
                "images",
                "prompts",
            )
        return self


class CheckpointsSettings(Table):
    """Checkpoints for resuming."""

    every: int = Field(default=500, ge=0, description="Optimizer steps between checkpoints; 0 saves only at the end.")
    keep: int = Field(default=3, ge=1, description="Number of checkpoints to keep; older ones are deleted.")


class ReportSettings(Table):
    """Logging and trackers."""

    every: int = Field(
        default=10, ge=1, description="Optimizer steps between log lines and between values sent to trackers."
    )
    trackers: Annotated[tuple[Tracker, ...], LISTED, Field(strict=False)] = Field(
        default=(),
        description="Experiment trackers to log to, by their names in Accelerate; each needs its own package.",
    )


class Profile(Table):
    """All settings of a run."""

    model: ModelSettings
    memory: MemorySettings = MemorySettings()
    adapter: AdapterSettings
    data: DataSettings
    train: TrainSettings
    validation: ValidationSettings
    checkpoints: CheckpointsSettings = CheckpointsSettings()
    report: ReportSettings = ReportSettings()
    crepa: CrepaSettings
    layersync: LayerSyncSettings = LayerSyncSettings()

    @property
    def recomputes_blocks(self) -> bool:
        """Whether the backward recomputes the blocks, all but what is kept of them."""
        return self.train.activation_checkpointing and self.memory.keep != "all"


TABLES = {name: cast("type[Table]", field.annotation) for name, field in Profile.model_fields.items()}
"""The class of each table, by its name in TOML."""
LISTED_TABLES: dict[str, type[Table]] = {"data.sources": SourceSettings}
"""The class of the tables of which there may be several, by table and key."""
