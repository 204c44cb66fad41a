"""Every setting of a run: one class per table, one field per key, strict types and ranges.

The descriptions become the comments of `crepa.toml` and the help texts of editors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

DINOV2_PATCH = 14


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


# TOML gives lists where a frozen model wants tuples, and `--set` gives one bare string.
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_listed), Field(strict=False)]
Export = Literal["diffusers", "comfyui"]
Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"]


class Table(BaseModel):
    """What all tables share: strict types, no unknown keys, no changes, and "none" for the absence of a value."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _none_by_name(cls, values: Any) -> Any:
        """TOML has no null: "none" takes back an optional value that a lower layer has set."""
        if not isinstance(values, dict):
            return values
        optional = {
            field.alias or name
            for name, field in cls.model_fields.items()
            if not field.is_required() and field.default is None
        }
        return {key: None if value == "none" and key in optional else value for key, value in values.items()}


def broken_rule(message: str, *keys: str) -> PydanticCustomError:
    """The error of a rule that relates several keys; the first is the one to report, "table." left out."""
    return PydanticCustomError("rule", "{message}", {"message": message, "keys": keys})


class Model(Table):
    """The video model that is fine-tuned."""

    family: Text = Field(description="Model family, such as wan or ltxvideo.")
    task: Literal["t2v", "i2v"] = Field(
        default="t2v", description="What the model generates from: t2v is text to video, i2v is image to video."
    )
    checkpoint: Text | None = Field(
        default=None, description="Hub id or local folder of the base model. none: the family's default checkpoint."
    )
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of the checkpoint on the Hub. none: its main branch."
    )
    variant: Text | None = Field(
        default=None,
        description="Which expert to train, in families whose checkpoints hold several. none: the family's choice.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16",
        description="Number format of the frozen weights and of the computation. float32 takes twice the memory.",
    )


class Adapter(Table):
    """Which weights are trained, and how they are exported."""

    kind: Literal["lora", "full"] = Field(
        default="lora",
        description="lora trains a small adapter; full trains all weights of the transformer, in far more memory.",
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        description="Rank of the LoRA matrices: more capacity, more memory. none: the family's default.",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="The adapter's output is multiplied by alpha / rank. none: same as rank.",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped in training.")
    target_modules: Texts | None = Field(
        default=None,
        min_length=1,
        description="Names, or ends of names, of the layers that get an adapter. none: the family's attention.",
    )
    export: Annotated[tuple[Export, ...], BeforeValidator(_listed), Field(strict=False)] = Field(
        default=("diffusers",), min_length=1, description="File layouts in which the trained adapter is written."
    )


class Data(Table):
    """The clips to train on."""

    path: Text | None = Field(
        default=None,
        description="Folder of clips with a caption beside each (clip.txt), or with metadata.jsonl or metadata.csv.",
    )
    width: int | None = Field(
        default=None,
        ge=8,
        description="Width of the clips in pixels. With height it sets the area of the aspect-ratio buckets. "
        "none: the family's default.",
    )
    height: int | None = Field(default=None, ge=8, description="Height of the clips in pixels. none: the family's.")
    frames: int | None = Field(
        default=None,
        ge=1,
        description="Frames per clip; clips are cut to the nearest count the model takes. none: the family's default.",
    )
    fps: float | None = Field(
        default=None, gt=0, description="Frames per second that clips are resampled to. none: the family's frame rate."
    )
    repeats: int = Field(default=1, ge=1, description="How often each clip is seen in one epoch.")
    caption_dropout: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of steps that train with an empty caption, which classifier-free guidance relies on.",
    )
    cache: Text | None = Field(
        default=None,
        description="Folder for latents, prompts and teacher features. none: .crepa-cache in the clips' folder.",
    )


class Train(Table):
    """Length, optimizer and noise of the training."""

    steps: int = Field(default=2000, ge=1, description="Optimizer steps of the whole run.")
    batch_size: int = Field(default=1, ge=1, description="Clips per step on each device.")
    gradient_accumulation: int = Field(
        default=1, ge=1, description="Batches whose gradients are summed into one optimizer step."
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate. none: the family's default for this kind of training."
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="adamw8bit keeps its state in 8 bits (needs the extra 'bnb') and saves memory."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay of the optimizer.")
    lr_scheduler: Literal[
        "constant", "linear", "cosine", "polynomial", "constant_with_warmup", "cosine_with_restarts"
    ] = Field(default="constant", description="Course of the learning rate over the run, by diffusers' names.")
    lr_warmup_steps: int = Field(
        default=0, ge=0, description="Optimizer steps in which the learning rate rises from 0; 'constant' ignores it."
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are clipped to this norm; 0 turns it off.")
    max_skipped_steps: int = Field(
        default=10,
        ge=0,
        description="Steps in a row that are skipped when a loss or gradient is not finite; one more ends the run.",
    )
    sharding: bool = Field(
        default=False,
        description="Share weights and optimizer out over the processes (FSDP2), for models too large for one GPU.",
    )
    activation_checkpointing: bool = Field(
        default=True, description="Recompute activations in the backward pass: far less memory, about a third slower."
    )
    compile: bool = Field(
        default=False, description="Compile the transformer with torch.compile: slow to start, then faster steps."
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay per step of a moving average of the trained weights, such as 0.999; 0 turns it off.",
    )
    timestep_sampling: Literal["logit_normal", "uniform"] = Field(
        default="logit_normal", description="How noise levels are drawn; logit_normal prefers the middle ones."
    )
    timestep_shift: float | None = Field(
        default=None,
        gt=0,
        description="Shift of the noise levels; above 1 trains more on strong noise. none: as the model's scheduler.",
    )
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field(
        default="none", description="Weight of the diffusion loss by noise level."
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="Seed of everything random in the run.")
    output: Text | None = Field(default=None, description="Folder of the run. none: a new folder inside runs/.")


class Validation(Table):
    """Videos sampled while the model trains."""

    every: int = Field(default=500, ge=0, description="Optimizer steps between validation videos; 0 makes none.")
    prompts: Texts = Field(default=(), description="Prompts to sample, one video each.")
    images: Texts = Field(default=(), description="First frames for image to video: files, one per prompt, in order.")
    steps: int = Field(default=30, ge=1, description="Denoising steps per video.")
    guidance_scale: float | None = Field(
        default=None, ge=0, description="Strength of classifier-free guidance. none: the pipeline's default."
    )
    frames: int | None = Field(default=None, ge=1, description="Frames per video. none: as many as data.frames.")

    @model_validator(mode="after")
    def _an_image_per_prompt(self) -> Validation:
        if self.images and len(self.images) != len(self.prompts):
            raise broken_rule(
                f"needs one image per prompt: {len(self.images)} images, {len(self.prompts)} prompts",
                "images",
                "prompts",
            )
        return self


class Checkpoints(Table):
    """What is kept to go on from."""

    every: int = Field(default=500, ge=0, description="Optimizer steps between checkpoints; 0 writes only the last.")
    keep: int = Field(default=3, ge=1, description="Newest checkpoints that stay on disk; older ones are deleted.")


class Report(Table):
    """What a run tells about itself."""

    every: int = Field(
        default=10, ge=1, description="Optimizer steps between lines of the plain log and points sent to trackers."
    )
    trackers: Annotated[tuple[Tracker, ...], BeforeValidator(_listed), Field(strict=False)] = Field(
        default=(), description="Experiment trackers to report to, by Accelerate's names; each needs its own package."
    )


class Crepa(Table):
    """Cross-frame alignment of hidden states with the features of a frozen teacher."""

    enabled: bool = Field(default=True, description="Whether alignment is part of the training at all.")
    block_index: int | None = Field(
        default=None,
        ge=0,
        description="Transformer block whose hidden states are aligned, counted from 0. none: the family's default.",
    )
    lambda_: float = Field(
        default=0.5, ge=0, alias="lambda", description="Peak weight of the alignment loss beside the diffusion loss."
    )
    adjacent_distance: int = Field(
        default=1,
        ge=0,
        description="Latent frames between a frame and the neighbors it is aligned with; 0 aligns each frame alone.",
    )
    adjacent_tau: float = Field(
        default=1.0,
        gt=0,
        description="How slowly the weight of a neighbor falls with its distance: exp(-distance / adjacent_tau).",
    )
    cumulative_neighbors: bool = Field(
        default=False,
        description="Align with all neighbors up to adjacent_distance, not just the two at that distance.",
    )
    normalize_by_frames: bool = Field(
        default=True, description="Divide the alignment loss by the number of frames, so that long clips weigh no more."
    )
    spatial_align: bool = Field(
        default=True,
        description="Align patch by patch. false aligns the average of each frame, which takes less memory.",
    )
    encoder: Text = Field(
        default="dinov2_vitg14",
        description="Teacher: dinov2_vits14, dinov2_vitb14, dinov2_vitl14 or dinov2_vitg14 (each also with _reg), "
        "a hub id or a local folder.",
    )
    encoder_image_size: Annotated[int, Field(ge=1)] | Literal["grid"] = Field(
        default=518,
        description="Side in pixels of the square that the teacher sees, a multiple of its patch size. "
        '"grid" keeps the aspect ratio and gives one feature per latent token.',
    )
    use_backbone_features: bool = Field(
        default=False, description="Take a deeper block of the model itself as the teacher and load no encoder."
    )
    teacher_block_index: int | None = Field(
        default=None, ge=0, description="Block that teaches when use_backbone_features is true, counted from 0."
    )
    drop_vae_encoder: bool = Field(
        default=False,
        description="Free the encoder half of the VAE when only its decoder is needed (with teacher_cache = false).",
    )
    teacher_cache: bool = Field(
        default=True,
        description="Compute teacher features once and store them. false: every step anew, for augmented clips.",
    )
    scheduler: Literal["constant", "linear", "cosine", "polynomial"] = Field(
        default="constant", description="Course of the weight from lambda to lambda_end after the warmup."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Optimizer steps during which the weight rises to lambda.")
    decay_steps: int = Field(
        default=0, ge=0, description="Optimizer steps from lambda to lambda_end; 0 means all that follow the warmup."
    )
    lambda_end: float = Field(default=0.0, ge=0, description="Weight after the decay; a constant scheduler ignores it.")
    power: float = Field(default=1.0, gt=0, description="Exponent of the polynomial scheduler.")
    cutoff_step: int = Field(default=0, ge=0, description="Optimizer step from which alignment is off; 0 means never.")
    similarity_threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Average similarity at which alignment is switched off. none: similarity never does that.",
    )
    similarity_ema_decay: float = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="Decay per step of the average that is compared with similarity_threshold; 0: the latest value.",
    )
    threshold_mode: Literal["permanent", "recoverable"] = Field(
        default="permanent",
        description="permanent: off for good once the threshold is reached. "
        "recoverable: back on when the average falls below it.",
    )

    @model_validator(mode="after")
    def _a_teacher_block(self) -> Crepa:
        if self.use_backbone_features and self.teacher_block_index is None:
            raise broken_rule(
                "needs crepa.teacher_block_index, the block that teaches",
                "use_backbone_features",
                "teacher_block_index",
            )
        return self

    @model_validator(mode="after")
    def _two_blocks(self) -> Crepa:
        if self.use_backbone_features and self.teacher_block_index == self.block_index is not None:
            raise broken_rule(
                f"must differ from crepa.block_index, which is {self.block_index} too",
                "teacher_block_index",
                "block_index",
            )
        return self

    @model_validator(mode="after")
    def _whole_patches(self) -> Crepa:
        size = self.encoder_image_size
        if self.encoder.startswith("dinov2_vit") and isinstance(size, int) and size % DINOV2_PATCH:
            nearest = max(1, round(size / DINOV2_PATCH)) * DINOV2_PATCH
            raise broken_rule(
                f"must be a multiple of {DINOV2_PATCH}, the patch size of {self.encoder}, such as {nearest}",
                "encoder_image_size",
                "encoder",
            )
        return self


class LayerSync(Table):
    """Alignment of a block with a deeper block of the same model, beside CREPA."""

    enabled: bool = Field(default=False, description="Whether a block is also aligned with a deeper one (LayerSync).")
    student_block: int | None = Field(default=None, ge=0, description="Block that learns, counted from 0.")
    teacher_block: int | None = Field(
        default=None, ge=0, description="Deeper block that teaches, without gradient, counted from 0."
    )
    lambda_: float = Field(
        default=0.2, ge=0, alias="lambda", description="Weight of the LayerSync loss beside the diffusion loss."
    )

    @model_validator(mode="after")
    def _both_blocks(self) -> LayerSync:
        if self.enabled and (self.student_block is None or self.teacher_block is None):
            raise broken_rule(
                "needs layersync.student_block and layersync.teacher_block",
                "enabled",
                "student_block",
                "teacher_block",
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_deeper(self) -> LayerSync:
        if not self.enabled or self.student_block is None or self.teacher_block is None:
            return self
        if self.teacher_block <= self.student_block:
            raise broken_rule(
                f"must be deeper than layersync.student_block, which is {self.student_block}",
                "teacher_block",
                "student_block",
            )
        return self


class Profile(Table):
    """Settings of a crepa run."""

    model: Model
    adapter: Adapter = Adapter()
    data: Data = Data()
    train: Train = Train()
    validation: Validation = Validation()
    checkpoints: Checkpoints = Checkpoints()
    report: Report = Report()
    crepa: Crepa = Crepa()
    layersync: LayerSync = LayerSync()


TABLES: dict[str, type[Table]] = {
    table.__name__.lower(): table
    for table in (Model, Adapter, Data, Train, Validation, Checkpoints, Report, Crepa, LayerSync)
}
