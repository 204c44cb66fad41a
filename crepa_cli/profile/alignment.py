"""Settings of the alignment losses: CREPA and LayerSync."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from crepa_cli.profile.table import FAMILY_DEFAULT, Table, Text, broken_rule, resolved_later

DINOV2_PATCH = 14
DEFAULT_TAU = 1.0
ENCODERS = tuple(f"dinov2_vit{letter}14{suffix}" for suffix in ("", "_reg") for letter in "sblg")
"""Encoders with a short name; others are given by their Hub id or folder."""
ENCODER_ALIASES = {
    **{spelling: name for name in ENCODERS for spelling in (name, name.replace("_", "-"))},
    **dict.fromkeys(("dino_v2_g", "dinov2_g"), "dinov2_vitg14"),
    **dict.fromkeys(("dino_v2_s", "dinov2_s"), "dinov2_vits14"),
}
"""Their names in other trainers, in lower case."""
Steps = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^(100|[0-9]{1,2}([.][0-9]+)?)%$")]
"""A number of optimizer steps, or a share of the run such as "40%"; `step_count` tells them apart."""


def step_count(steps: int | str, total: int) -> int:
    """The optimizer steps that a setting stands for in a run of `total` steps; a share above 0% is at least one."""
    if isinstance(steps, int):
        return steps
    share = float(steps.removesuffix("%"))
    return max(1, round(share * total / 100)) if share else 0


def _encoder_name(value: object) -> object:
    """The name of an encoder for its other spellings."""
    return ENCODER_ALIASES.get(value.lower(), value) if isinstance(value, str) else value


class CrepaSettings(Table):
    """Cross-frame alignment of hidden states with features of a frozen teacher."""

    enabled: bool = Field(default=True, description="Whether to train with CREPA alignment.")
    block_index: int = resolved_later(
        FAMILY_DEFAULT,
        example=8,
        description="Transformer block whose hidden states are aligned, counted from 0.",
        ge=0,
    )
    lambda_: float = Field(
        default=0.5,
        ge=0,
        alias="lambda",
        description="Peak weight of the alignment loss, relative to the diffusion loss.",
    )
    adjacent_distance: int = Field(
        default=1,
        ge=0,
        description="Distance in latent frames to the neighbors that a frame is aligned with; 0: no neighbors.",
    )
    adjacent_tau: float = Field(
        default=DEFAULT_TAU,
        gt=0,
        description="Decay constant of the neighbor weights: a neighbor's weight is exp(-distance / adjacent_tau).",
    )
    cumulative_neighbors: bool = Field(
        default=False,
        description="Align with all neighbors up to adjacent_distance instead of only the two at that distance.",
    )
    normalize_by_frames: bool = Field(
        default=True,
        description="Divide the alignment loss by the number of frames, so that longer clips do not weigh more.",
    )
    spatial_align: bool = Field(
        default=True,
        description="Align each patch. false aligns the average of each frame, which takes less memory.",
    )
    encoder: Annotated[Text, BeforeValidator(_encoder_name)] = Field(
        default="dinov2_vitg14",
        description="Teacher: dinov2_vits14, dinov2_vitb14, dinov2_vitl14 or dinov2_vitg14 (each also with _reg), "
        "a Hub id or a local folder.",
    )
    encoder_revision: Text | None = Field(
        default=None, description="Branch, tag or commit of the encoder on the Hub. none: its main branch."
    )
    encoder_image_size: Annotated[int, Field(ge=1)] | Literal["grid"] = Field(
        default=518,
        description="Side in pixels of the teacher's square input, a multiple of its patch size. "
        '"grid" keeps the aspect ratio and gives one feature per latent token.',
    )
    use_backbone_features: bool = Field(
        default=False, description="Use a deeper block of the model itself as the teacher instead of an encoder."
    )
    teacher_block_index: int | None = Field(
        default=None, ge=0, description="Teacher block if use_backbone_features is true, counted from 0."
    )
    drop_vae_encoder: bool = Field(
        default=False,
        description="Free the encoder of the VAE when only its decoder is needed (with teacher_cache = false).",
    )
    teacher_cache: bool = Field(
        default=True,
        description="Compute teacher features once and cache them. false: recompute them at every step.",
    )
    scheduler: Literal["constant", "linear", "cosine", "polynomial"] = Field(
        default="constant", description="How the weight goes from lambda to lambda_end after the warmup."
    )
    warmup_steps: Steps = Field(
        default=0,
        description='Optimizer steps over which the weight rises from 0 to lambda, or a share of the run such as "5%".',
    )
    decay_steps: Steps = Field(
        default=0,
        description="Optimizer steps over which the weight goes to lambda_end, or a share of the run; "
        "0 means all steps after the warmup.",
    )
    lambda_end: float = Field(
        default=0.0, ge=0, description="Weight after the decay; the constant scheduler ignores it."
    )
    power: float = Field(default=1.0, gt=0, description="Exponent of the polynomial scheduler.")
    cutoff_step: Steps = Field(
        default=0,
        description='Optimizer step at which alignment is switched off, or a share of the run such as "40%"; '
        "0 means never.",
    )
    similarity_threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Average similarity at which alignment is switched off. none: no threshold.",
    )
    similarity_ema_decay: float = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="Decay per step of the average compared with similarity_threshold; 0 uses the latest value.",
    )
    threshold_mode: Literal["permanent", "recoverable"] = Field(
        default="permanent",
        description="permanent: alignment stays off once the threshold is reached. "
        "recoverable: it is switched on again when the average falls below the threshold.",
    )
    teacher_frame: Literal["last", "middle"] = Field(
        default="last",
        description="Which of the 4 or 8 video frames that a latent frame covers the encoder sees. The middle one "
        "agrees better with all of them if the picture moves.",
    )
    objective: Literal["cosine", "relation"] = Field(
        default="cosine",
        description="cosine: pull each patch to its features. relation: make patches as similar to each other as the "
        "teacher finds them (VideoREPA), which holds them less tightly; the similarity that is logged and compared "
        "with similarity_threshold is then the correlation of the two.",
    )
    projector: Literal["linear", "conv"] = Field(
        default="linear",
        description="linear: project each patch alone. conv: a 3x3 convolution over each frame (iREPA), which keeps "
        "more of the spatial structure and takes about nine times as long as the linear projector.",
    )
    spatial_norm: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Subtract this share of a frame's mean from its features, and divide them by their standard "
        "deviation, so that patches differ more (iREPA, with 0.6). none: features as they are.",
    )
    adjacent_tau_seconds: float | None = Field(
        default=None,
        gt=0,
        description="The decay constant of the neighbor weights in seconds at data.fps, the same in every family; "
        "it replaces adjacent_tau, which is in latent frames of 4 or 8 video frames. none: adjacent_tau counts.",
    )

    @property
    def encoder_teaches(self) -> bool:
        """Whether the alignment targets come from a separate encoder."""
        return self.enabled and not self.use_backbone_features

    @property
    def needs_patches(self) -> bool:
        """Whether several patches of a frame are compared or combined, so that they cannot be averaged first."""
        return self.objective == "relation" or self.projector == "conv" or self.spatial_norm is not None

    def tau(self, seconds: float) -> float:
        """The decay constant of the neighbor weights in latent frames that are `seconds` apart."""
        return self.adjacent_tau if self.adjacent_tau_seconds is None else self.adjacent_tau_seconds / seconds

    @model_validator(mode="after")
    def _a_teacher_block(self) -> CrepaSettings:
        if self.use_backbone_features and self.teacher_block_index is None:
            raise broken_rule(
                "needs crepa.teacher_block_index, the teacher block",
                "use_backbone_features",
                "teacher_block_index",
            )
        return self

    @model_validator(mode="after")
    def _patches_to_compare(self) -> CrepaSettings:
        if self.needs_patches and not self.spatial_align:
            raise broken_rule(
                'leaves one patch per frame, and crepa.objective = "relation", crepa.projector = "conv" and '
                "crepa.spatial_norm need them all: set it to true",
                "spatial_align",
                "objective",
                "projector",
                "spatial_norm",
            )
        return self

    @model_validator(mode="after")
    def _one_tau(self) -> CrepaSettings:
        if self.adjacent_tau_seconds is not None and self.adjacent_tau != DEFAULT_TAU:
            raise broken_rule(
                f"replaces crepa.adjacent_tau, which is set to {self.adjacent_tau:g}: leave one of them out",
                "adjacent_tau_seconds",
                "adjacent_tau",
            )
        return self

    @model_validator(mode="after")
    def _two_blocks(self) -> CrepaSettings:
        if self.use_backbone_features and self.teacher_block_index == self.block_index:
            raise broken_rule(
                f"must differ from crepa.block_index, which is also {self.block_index}",
                "teacher_block_index",
                "block_index",
            )
        return self

    @model_validator(mode="after")
    def _a_known_encoder(self) -> CrepaSettings:
        name = self.encoder
        exists = os.path.exists(name)  # noqa: PTH110 (Path.exists raises for some names)
        if self.encoder_teaches and name not in ENCODERS and Path(name).name == name and not exists:
            nearest = difflib.get_close_matches(name.lower(), ENCODERS, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise broken_rule(
                f"must be one of {', '.join(ENCODERS)}, a Hub id such as owner/name, or a local folder{hint}", "encoder"
            )
        return self

    @model_validator(mode="after")
    def _whole_patches(self) -> CrepaSettings:
        size = self.encoder_image_size
        if self.encoder.startswith("dinov2_vit") and isinstance(size, int) and size % DINOV2_PATCH:
            nearest = max(1, round(size / DINOV2_PATCH)) * DINOV2_PATCH
            raise broken_rule(
                f"must be a multiple of {DINOV2_PATCH}, the patch size of {self.encoder}, such as {nearest}",
                "encoder_image_size",
                "encoder",
            )
        return self


class LayerSyncSettings(Table):
    """Alignment of a block with a deeper block of the same model, in addition to CREPA."""

    enabled: bool = Field(default=False, description="Whether to align a block with a deeper one (LayerSync).")
    student_block: int | None = Field(default=None, ge=0, description="Student block, counted from 0.")
    teacher_block: int | None = Field(
        default=None,
        ge=0,
        description="Teacher block, deeper than the student block, counted from 0. It gets no gradient from this loss.",
    )
    lambda_: float = Field(
        default=0.2, ge=0, alias="lambda", description="Weight of the LayerSync loss, relative to the diffusion loss."
    )

    @model_validator(mode="after")
    def _both_blocks(self) -> LayerSyncSettings:
        if self.enabled and (self.student_block is None or self.teacher_block is None):
            raise broken_rule(
                "needs layersync.student_block and layersync.teacher_block",
                "enabled",
                "student_block",
                "teacher_block",
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_deeper(self) -> LayerSyncSettings:
        if not self.enabled or self.student_block is None or self.teacher_block is None:
            return self
        if self.teacher_block <= self.student_block:
            raise broken_rule(
                f"must be deeper than layersync.student_block, which is {self.student_block}",
                "teacher_block",
                "student_block",
            )
        return self
