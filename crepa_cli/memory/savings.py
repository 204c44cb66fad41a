"""Settings that reduce the memory of training, and the largest clips that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

import torch

from crepa_cli.data.buckets import Bucket, Size
from crepa_cli.hub.messages import HubError
from crepa_cli.memory.prediction import preparation_memory, training_memory, validation_memory
from crepa_cli.memory.shapes import validation_bucket
from crepa_cli.models.facts import BOTH
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import memory_mistakes
from crepa_cli.teachers.dinov2 import ENCODERS

Item = TypeVar("Item")

LIGHT_ENCODER = "dinov2_vits14"
LIGHT_IMAGE_SIZE = 224
SMALLEST_RANK = 4


class Setting(NamedTuple):
    """A value for a setting."""

    table: str
    key: str
    value: object

    @property
    def name(self) -> str:
        """Table and key."""
        return f"{self.table}.{self.key}"

    def __str__(self) -> str:
        """In the form that `--set` takes."""
        return f"{self.name}={str(self.value).lower() if isinstance(self.value, bool) else self.value}"


@dataclass(frozen=True)
class Saving:
    """A setting in the form that `--set` takes, and the bytes it saves during training."""

    setting: str
    saved: int


@dataclass(frozen=True)
class Fitting:
    """The largest clips and videos that fit a device with the other settings unchanged; None if none do.

    Attributes:
        frames: the most frames of clips.
        width: of the largest clips.
        height: of the largest clips.
        validation_frames: the most frames of validation videos, if their length is what does not fit.
    """

    frames: int | None
    width: int | None
    height: int | None
    validation_frames: int | None


def memory_advice(
    profile: Profile, family: Family, bucket: Bucket, device: torch.device
) -> tuple[dict[str, int], list[Saving]]:
    """The memory of training by part, and the settings that reduce it most, largest saving first.

    Each saving is predicted by running a step on fake tensors with one setting changed. A setting takes a second or two
    the first time; predictions are stored.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        bucket: the shape of the clips.
        device: the device that trains.

    Raises:
        UserError: if a configuration cannot be read.
    """
    parts = training_memory(profile, family, bucket, device)
    return parts, savings(profile, family, bucket, device, report=lambda _: None)


def savings(
    profile: Profile, family: Family, bucket: Bucket, device: torch.device, report: Callable[[str], None]
) -> list[Saving]:
    """The settings that reduce the peak of training, largest saving first.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        bucket: the shape of the clips.
        device: the device that trains.
        report: receives each setting before it is tried.
    """
    before = sum(training_memory(profile, family, bucket, device).values())
    found = []
    for setting in [*lossless_settings(profile, device), *lighter_settings(profile, family)]:
        report(str(setting))
        lighter = with_setting(profile, *setting)
        if memory_mistakes(lighter):  # it needs another setting
            continue
        frames = setting.value if setting.key == "frames" and isinstance(setting.value, int) else bucket.frames
        try:
            after = training_memory(lighter, family, Bucket(frames, bucket.height, bucket.width), device)
        except HubError:  # a mere suggestion, whose configuration cannot be read
            continue
        found.append(Saving(str(setting), before - sum(after.values())))
    return sorted((one for one in found if one.saved > 0), key=lambda one: -one.saved)


def lossless_settings(profile: Profile, device: torch.device) -> list[Setting]:
    """Settings that may reduce the memory of training and change its result by no more than rounding.

    Those that the profile has are left out, and on the CPU those that move tensors to its memory.
    """
    settings = [
        Setting("train", "activation_checkpointing", True),
        Setting("memory", "keep", "nothing"),
        Setting("memory", "keep_blocks", 0),
        Setting("memory", "offload_activations", True),
        Setting("memory", "stream_weights", True),
        Setting("memory", "finer_recompute", True),
    ]
    if profile.model.variant == BOTH:
        settings.append(Setting("memory", "offload_idle_expert", True))
    moving = ("offload_activations", "stream_weights", "offload_idle_expert") if device.type == "cpu" else ()
    return [
        one for one in settings if one.key not in moving and getattr(getattr(profile, one.table), one.key) != one.value
    ]


def lighter_settings(profile: Profile, family: Family) -> list[Setting]:
    """Settings that may reduce the memory of training and change its result; those of the profile are left out."""
    crepa, train, adapter = profile.crepa, profile.train, profile.adapter
    # A local encoder was chosen for a reason, and finding another needs the network.
    heavy_encoder = crepa.encoder_teaches and crepa.encoder in ENCODERS and crepa.encoder != LIGHT_ENCODER
    frames, rank, side = profile.data.frames, adapter.rank, crepa.encoder_image_size
    step = family.frame_multiple
    half = (frames // 2 - 1) // step * step + 1
    candidates: list[tuple[bool, str, str, object]] = [
        (half > step, "data", "frames", half),
        (train.batch_size > 1, "train", "batch_size", 1),
        (profile.memory.quantize_base == "none", "memory", "quantize_base", "int8"),
        (profile.model.dtype == "float32", "model", "dtype", "bfloat16"),
        (adapter.kind == "full", "adapter", "kind", "lora"),
        (adapter.kind == "lora" and rank > SMALLEST_RANK, "adapter", "rank", rank // 2),
        (train.ema > 0, "train", "ema", 0.0),
        (crepa.enabled and crepa.spatial_align and not crepa.needs_patches, "crepa", "spatial_align", False),
        (heavy_encoder, "crepa", "encoder", LIGHT_ENCODER),
        (
            crepa.encoder_teaches and isinstance(side, int) and side > LIGHT_IMAGE_SIZE,
            "crepa",
            "encoder_image_size",
            LIGHT_IMAGE_SIZE,
        ),
    ]
    return [Setting(table, key, value) for applies, table, key, value in candidates if applies]


def with_setting(profile: Profile, table: str, key: str, value: object) -> Profile:
    """The profile with one setting replaced."""
    return with_settings(profile, [Setting(table, key, value)])


def with_settings(profile: Profile, settings: Iterable[Setting]) -> Profile:
    """The profile with some settings replaced."""
    tables = profile.model_dump(by_alias=True)
    for table, key, value in settings:
        tables[table][key] = value
    return Profile.model_validate(tables)


def largest_that_fits(
    profile: Profile, family: Family, bucket: Bucket, device: torch.device, limit: int, report: Callable[[str], None]
) -> Fitting:
    """The clips, and the validation videos of the settings' size, that need at most `limit` bytes.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        bucket: a shape that does not fit.
        device: the device that trains.
        limit: bytes that it has free.
        report: receives each shape before it is tried.
    """

    def fits(frames: int, size: Size) -> bool:
        report(f"clips of {size.width}x{size.height}, {frames} frames")
        tried = Bucket(frames, size.height, size.width)
        # The others matter only if training fits.
        if sum(training_memory(profile, family, tried, device).values()) > limit:
            return False
        if max(preparation_memory(profile, family, tried, device).values()) > limit:
            return False
        data = profile.data.model_copy(update=asdict(tried))
        return validation_memory(profile.model_copy(update={"data": data}), family, device) <= limit

    size = Size(bucket.width, bucket.height)
    lengths = range(1 + family.frame_multiple, bucket.frames, family.frame_multiple)
    sizes = smaller_sizes(size, family.size_multiple)
    frames = last_that_holds(lengths, lambda frames: fits(frames, size))
    width, height = last_that_holds(sizes, lambda one: fits(bucket.frames, one)) or (None, None)
    return Fitting(frames, width, height, _validation_frames(profile, family, device, limit, report))


def _validation_frames(
    profile: Profile, family: Family, device: torch.device, limit: int, report: Callable[[str], None]
) -> int | None:
    """The most frames of validation videos that need at most `limit` bytes; None if all or none do."""

    def fits(frames: int) -> bool:
        report(f"validation videos of {frames} frames")
        return validation_memory(with_setting(profile, "validation", "frames", frames), family, device) <= limit

    frames, step = validation_bucket(profile, family).frames, family.frame_multiple
    return None if fits(frames) else last_that_holds(range(1, frames, step), fits)


def smaller_sizes(size: Size, multiple: int) -> list[Size]:
    """Sizes below `size` with about the same aspect ratio, smallest first."""
    heights = range(multiple, size.height, multiple)
    widths = [max(1, round(height * size.width / size.height / multiple)) * multiple for height in heights]
    return [Size(*one) for one in zip(widths, heights, strict=True)]


def last_that_holds(items: Sequence[Item], holds: Callable[[Item], bool]) -> Item | None:
    """The last item that holds, by bisection; None if none does. No item may hold after one that does not."""
    # Often none does: the weights alone may be too much.
    if not items or not holds(items[0]):
        return None
    low, high = 1, len(items)
    while low < high:
        middle = (low + high) // 2
        if holds(items[middle]):
            low = middle + 1
        else:
            high = middle
    return items[low - 1]
