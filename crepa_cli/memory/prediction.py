"""The memory that a run takes in its preparation, in training and in validations: predicted, not measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from crepa_cli.data.buckets import Bucket
from crepa_cli.data.encoder import encoder_config
from crepa_cli.kept import kept
from crepa_cli.memory.host import predict_pinned
from crepa_cli.memory.preparation import online_teacher_weights, online_teacher_work, predict_preparation
from crepa_cli.memory.shapes import clips_of, validation_bucket
from crepa_cli.memory.step import ACTIVATIONS, ALIGNMENT, GRADIENTS, predict_training
from crepa_cli.memory.validation import predict_validation
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile

IRRELEVANT: Any = {
    "data": True,
    "validation": True,
    "checkpoints": True,
    "report": True,
    "train": {
        "steps",
        "learning_rate",
        "lr_scheduler",
        "lr_warmup_steps",
        "seed",
        "output",
        "gradient_accumulation",
        "attention",
    },
}
"""Settings that memory does not depend on, or only through the shape of the clips."""
OF_THE_BACKWARD = {"offload_activations", "finer_recompute", "keep", "keep_blocks"}
IRRELEVANT_IN_VALIDATION: Any = IRRELEVANT | {
    "validation": {"every", "prompts", "negative_prompt", "motion_score", "images", "steps"},
    "train": IRRELEVANT["train"] | {"activation_checkpointing"},
    "memory": OF_THE_BACKWARD,
}
"""Those that the memory of a validation does not depend on."""
IRRELEVANT_IN_PREPARATION: Any = IRRELEVANT | {
    "train": True,
    "adapter": True,
    "layersync": True,
    "memory": OF_THE_BACKWARD | {"quantize_base"},
}
"""Those that the memory of the preparation does not depend on."""


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes of a run.

    Attributes:
        training: bytes by part at the peak of a training step.
        preparation: peak of each of its models; they are never in memory together.
        validation: peak of a validation; 0 if there is none.
    """

    training: dict[str, int]
    preparation: dict[str, int]
    validation: int

    @property
    def peak(self) -> int:
        """Bytes that a device must have free."""
        return max(self.without_validation, self.validation)

    @property
    def without_validation(self) -> int:
        """The same for a run that samples no videos."""
        return max(sum(self.training.values()), *self.preparation.values())


def predict(profile: Profile, family: Family, bucket: Bucket, device: torch.device) -> Prediction:
    """Predict the memory of a run; predictions are stored and reused.

    Args:
        profile: the resolved settings.
        family: of the checkpoint, of which only configurations are read.
        bucket: the largest shape of its clips.
        device: the device that runs it.

    Raises:
        UserError: if a configuration cannot be read.
    """
    return Prediction(
        training_memory(profile, family, bucket, device),
        preparation_memory(profile, family, bucket, device),
        validation_memory(profile, family, device),
    )


def training_memory(profile: Profile, family: Family, bucket: Bucket, device: torch.device) -> dict[str, int]:
    """Bytes by part at the peak of a training step; see `predict`."""

    def predict_parts() -> dict[str, int]:
        clips = clips_of(profile, family, bucket)
        parts = predict_training(profile, family, clips, device)
        if _teaches_online(profile):
            work = online_teacher_work(family, profile.crepa, clips.tensors["latents"], device)
            # It is over when the step begins; what it takes beyond the step's own tensors raises the peak.
            beyond = max(0, work - parts[ACTIVATIONS] - parts[ALIGNMENT] - parts[GRADIENTS])
            parts["teacher"] = online_teacher_weights(family, profile.crepa, device) + beyond
        return parts

    return kept(["training", *_facts(profile, family, bucket, device)], predict_parts)


def preparation_memory(profile: Profile, family: Family, bucket: Bucket, device: torch.device) -> dict[str, int]:
    """Bytes of each model of the preparation at its own peak; see `predict`."""

    def predict_peaks() -> dict[str, int]:
        return predict_preparation(profile, family, bucket, clips_of(profile, family, bucket), device)

    facts = _facts(profile, family, bucket, device, irrelevant=IRRELEVANT_IN_PREPARATION)
    return kept(["preparation", *facts], predict_peaks)


def validation_memory(profile: Profile, family: Family, device: torch.device) -> int:
    """Bytes at the peak of a validation, with all that training keeps meanwhile; 0 if no video is sampled."""
    if not profile.validation.every:
        return 0
    bucket = validation_bucket(profile, family)

    def predict_peaks() -> dict[str, int]:
        peaks = predict_validation(profile, family, clips_of(profile, family, bucket), device)
        teacher = online_teacher_weights(family, profile.crepa, device) if _teaches_online(profile) else 0
        return {part: peak + teacher for part, peak in peaks.items()}

    experts = [family.base.read_config(f"{name}/config.json") for name in family.transformer_components]
    facts = _facts(profile, family, bucket, device, irrelevant=IRRELEVANT_IN_VALIDATION)
    return max(kept(["validation", experts, *facts], predict_peaks).values())


def pinned_memory(profile: Profile, family: Family, bucket: Bucket, device: torch.device) -> int:
    """The most bytes of the host that a process pins at a time; see `predict`."""
    facts = _facts(profile, family, bucket, device)
    validates = profile.validation.every > 0
    return max(kept(["pinned", validates, *facts], lambda: predict_pinned(profile, family, bucket)).values())


def _teaches_online(profile: Profile) -> bool:
    return profile.crepa.encoder_teaches and not profile.crepa.teacher_cache


def _facts(
    profile: Profile, family: Family, bucket: Bucket, device: torch.device, irrelevant: Any = IRRELEVANT
) -> list[object]:
    """Everything that a prediction depends on, as JSON values."""
    crepa = profile.crepa
    encoder = encoder_config(crepa) if crepa.encoder_teaches else None
    settings = profile.model_dump(mode="json", by_alias=True, exclude=irrelevant)
    return [
        settings,
        asdict(bucket),
        device.type,
        family.config,
        *(family.base.read_config(name) for name in family.encoder_configs),
        encoder,
    ]
