"""What a training takes in memory, which settings lower it, and what still fits: predicted, not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from crepa_cli.data.buckets import Bucket, Size
from crepa_cli.data.prepare import encoder_config
from crepa_cli.doctor.cache_size import measure_clip, teacher_grid
from crepa_cli.doctor.findings import Fitting, Saving
from crepa_cli.doctor.kept import kept
from crepa_cli.doctor.preparation import online_teacher_weights, predict_preparation
from crepa_cli.doctor.step_memory import Clips, predict_training
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.models.hub import go_offline_without_hub
from crepa_cli.profile import Profile
from crepa_cli.teachers.dinov2 import ENCODERS

Item = TypeVar("Item")

LIGHT_ENCODER = "dinov2_vits14"
LIGHT_IMAGE_SIZE = 224
SMALLEST_RANK = 4
IRRELEVANT: Any = {
    "data": True,
    "validation": True,
    "checkpoints": True,
    "report": True,
    "train": {"steps", "learning_rate", "lr_scheduler", "lr_warmup_steps", "seed", "output", "gradient_accumulation"},
}
"""Settings that memory does not depend on, or by the shape of the clips alone."""


@dataclass(frozen=True)
class Prediction:
    """Bytes that training and its preparation take.

    Attributes:
        training: what is held by part at the moment of a step at which most is held.
        preparation: the most that each of its models holds; they are never in memory together.
    """

    training: dict[str, int]
    preparation: dict[str, int]

    @property
    def peak(self) -> int:
        """What a device must have free."""
        return max(sum(self.training.values()), *self.preparation.values())


def predict(profile: Profile, family: Family, bucket: Bucket) -> Prediction:
    """Bytes that a run takes, found again where they were predicted before.

    Args:
        profile: the resolved settings.
        family: of the checkpoint, of which configurations alone are read.
        bucket: the largest shape of its clips.

    Raises:
        UserError: if a configuration cannot be read.
    """
    return Prediction(training_memory(profile, family, bucket), preparation_memory(profile, family, bucket))


def training_memory(profile: Profile, family: Family, bucket: Bucket) -> dict[str, int]:
    """Bytes by part at the peak of a training step; see `predict`."""
    crepa = profile.crepa

    def predict_parts() -> dict[str, int]:
        parts = predict_training(profile, family, clips_of(profile, family, bucket))
        if crepa.encoder_teaches and not crepa.teacher_cache:
            parts["teacher"] = online_teacher_weights(family, crepa)
        return parts

    return kept(["training", *_facts(profile, family, bucket)], predict_parts)


def preparation_memory(profile: Profile, family: Family, bucket: Bucket) -> dict[str, int]:
    """Bytes of each model of the preparation at its own peak; see `predict`."""
    facts = ["preparation", *_facts(profile, family, bucket)]
    return kept(facts, lambda: predict_preparation(profile, family, bucket, clips_of(profile, family, bucket)))


def memory_advice(profile: Profile, family: Family, bucket: Bucket) -> tuple[dict[str, int], list[Saving]]:
    """What is in memory while it trains, by part, and the settings that save most of it, largest saving first.

    Each saving is that of a step that was run on fake tensors with the one setting changed. It takes about ten seconds
    for a setting, once: predictions are kept.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        bucket: the shape of the clips.

    Raises:
        UserError: if a configuration cannot be read.
    """
    # Lighter encoders are looked for too; without network that must not take minutes.
    go_offline_without_hub()
    parts = training_memory(profile, family, bucket)
    return parts, savings(profile, family, bucket, listener=lambda _: None)


def savings(profile: Profile, family: Family, bucket: Bucket, listener: Callable[[str], None]) -> list[Saving]:
    """The settings that lower the peak of training, largest saving first.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        bucket: the shape of the clips.
        listener: is told the setting that is tried.
    """
    before = sum(training_memory(profile, family, bucket).values())
    found = []
    for table, key, value in lighter_settings(profile, family):
        setting = f"{table}.{key}={_shown(value)}"
        listener(setting)
        lighter = with_setting(profile, table, key, value)
        frames = value if key == "frames" and isinstance(value, int) else bucket.frames
        after = training_memory(lighter, family, Bucket(frames, bucket.height, bucket.width))
        found.append(Saving(setting, before - sum(after.values())))
    return sorted((one for one in found if one.saved > 0), key=lambda one: -one.saved)


def lighter_settings(profile: Profile, family: Family) -> list[tuple[str, str, object]]:
    """Table, key and value of the settings that may save memory and differ from the profile's."""
    crepa, train, adapter = profile.crepa, profile.train, profile.adapter
    # A local encoder is there for a reason, and looking for another would take the network.
    heavy_encoder = crepa.encoder_teaches and crepa.encoder in ENCODERS and crepa.encoder != LIGHT_ENCODER
    frames, rank, side = profile.data.frames, adapter.rank, crepa.encoder_image_size
    step = family.frame_multiple
    half = (frames // 2 - 1) // step * step + 1
    candidates: list[tuple[bool, str, str, object]] = [
        (not train.activation_checkpointing, "train", "activation_checkpointing", True),
        (half > step, "data", "frames", half),
        (train.batch_size > 1, "train", "batch_size", 1),
        (profile.model.dtype == "float32", "model", "dtype", "bfloat16"),
        (adapter.kind == "full", "adapter", "kind", "lora"),
        (adapter.kind == "lora" and rank > SMALLEST_RANK, "adapter", "rank", rank // 2),
        (train.ema > 0, "train", "ema", 0.0),
        (crepa.enabled and crepa.spatial_align, "crepa", "spatial_align", False),
        (heavy_encoder, "crepa", "encoder", LIGHT_ENCODER),
        (
            crepa.encoder_teaches and isinstance(side, int) and side > LIGHT_IMAGE_SIZE,
            "crepa",
            "encoder_image_size",
            LIGHT_IMAGE_SIZE,
        ),
    ]
    return [(table, key, value) for applies, table, key, value in candidates if applies]


def with_setting(profile: Profile, table: str, key: str, value: object) -> Profile:
    """The profile with one setting replaced."""
    tables = profile.model_dump(by_alias=True)
    tables[table][key] = value
    return Profile.model_validate(tables)


def largest_that_fits(
    profile: Profile, family: Family, bucket: Bucket, limit: int, listener: Callable[[str], None]
) -> Fitting:
    """The most frames of this size, and the largest size of this length, that take at most `limit` bytes.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        bucket: does not fit.
        limit: bytes that a device has free.
        listener: is told what is tried.
    """

    def fits(frames: int, size: Size) -> bool:
        listener(f"{size.width}x{size.height}, {frames} frames")
        tried = Bucket(frames, size.height, size.width)
        # The preparation is looked at only where training fits.
        if sum(training_memory(profile, family, tried).values()) > limit:
            return False
        return max(preparation_memory(profile, family, tried).values()) <= limit

    size = Size(bucket.width, bucket.height)
    lengths = range(1 + family.frame_multiple, bucket.frames, family.frame_multiple)
    sizes = smaller_sizes(size, family.size_multiple)
    frames = last_that_holds(lengths, lambda frames: fits(frames, size))
    width, height = last_that_holds(sizes, lambda one: fits(bucket.frames, one)) or (None, None)
    return Fitting(frames, width, height)


def smaller_sizes(size: Size, multiple: int) -> list[Size]:
    """Sizes of about the same aspect ratio, below `size`, smallest first."""
    heights = range(multiple, size.height, multiple)
    widths = [max(1, round(height * size.width / size.height / multiple)) * multiple for height in heights]
    return [Size(*one) for one in zip(widths, heights, strict=True)]


def last_that_holds(items: Sequence[Item], holds: Callable[[Item], bool]) -> Item | None:
    """The last of items of which the first ones hold and the others do not, by bisection; None where none does."""
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        if holds(items[middle]):
            low = middle + 1
        else:
            high = middle
    return items[low - 1] if low else None


def clips_of(profile: Profile, family: Family, bucket: Bucket) -> Clips:
    """What clips of a shape become, by their shapes alone."""
    crepa = profile.crepa
    latents = measure_clip(family).empty_latents(family, bucket)
    with torch.device("meta"):
        tensors = {"latents": latents, "fps": torch.empty(())}
        tensors |= family.longest_prompt(torch_dtype(profile.model.dtype))
    if not crepa.encoder_teaches:
        return Clips(tensors, None, family.hidden_size)
    encoder = encoder_config(crepa)
    grid = teacher_grid(family, latents, bucket, crepa, encoder["patch_size"])
    return Clips(tensors, grid, encoder["hidden_size"])


def _facts(profile: Profile, family: Family, bucket: Bucket) -> list[object]:
    """Everything that a prediction depends on."""
    crepa = profile.crepa
    encoder = encoder_config(crepa) if crepa.encoder_teaches else None
    settings = profile.model_dump(mode="json", by_alias=True, exclude=IRRELEVANT)
    return [
        settings,
        asdict(bucket),
        family.config,
        *(family.base.read_config(name) for name in family.encoder_configs),
        encoder,
    ]


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
