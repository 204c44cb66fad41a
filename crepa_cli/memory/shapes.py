"""The shapes of what a run reads and trains on, known without reading weights or encoding anything."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.alignment.grid import matching_frames
from crepa_cli.data.buckets import Bucket, valid_frames
from crepa_cli.data.encoder import encoder_config
from crepa_cli.data.sources import largest_form
from crepa_cli.kept import kept
from crepa_cli.models.attention import Attention
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family, Tensors
from crepa_cli.profile import CrepaSettings, Profile
from crepa_cli.teachers.dinov2 import input_size


def form_bucket(profile: Profile, family: Family) -> Bucket:
    """The shape of clips given by the settings."""
    form = largest_form(profile.data)
    frames = valid_frames(form.frames, form.frames, family.frame_multiple)
    return Bucket(frames or form.frames, form.height, form.width)


def validation_bucket(profile: Profile, family: Family) -> Bucket:
    """The shape of a validation's videos; the pipelines round other lengths, some of them up."""
    steps = math.ceil(((profile.validation.frames or profile.data.frames) - 1) / family.frame_multiple)
    return Bucket(steps * family.frame_multiple + 1, profile.data.height, profile.data.width)


@dataclass(frozen=True)
class Clips:
    """The shapes of a batch of prepared clips.

    Attributes:
        tensors: of one clip and one caption, without a batch dimension, on torch's meta device.
        teacher: grid of an encoder's features; None if no features are read.
        feature_size: width of the features, or of the hidden states if a block is the teacher.
    """

    tensors: Tensors
    teacher: TokenGrid | None
    feature_size: int


def clips_of(profile: Profile, family: Family, bucket: Bucket) -> Clips:
    """The tensors of clips of a shape, without content."""
    crepa = profile.crepa
    with torch.device("meta"):
        tensors = encoded_clip(family, bucket) | {"fps": torch.empty(())}
        tensors |= family.longest_prompt(torch_dtype(profile.model.dtype))
    if not crepa.encoder_teaches:
        return Clips(tensors, None, family.hidden_size)
    encoder = encoder_config(crepa)
    grid = teacher_grid(family, tensors["latents"], bucket, crepa, encoder["patch_size"])
    return Clips(tensors, grid, encoder["hidden_size"])


def teacher_grid(family: Family, latents: Tensor, bucket: Bucket, crepa: CrepaSettings, patch_size: int) -> TokenGrid:
    """The grid of one clip's features.

    Args:
        family: of the checkpoint.
        latents: of the clip, `[C, T, h, w]`.
        bucket: shape of the clip.
        crepa: the encoder's settings.
        patch_size: of the encoder, in pixels.
    """
    grid = family.token_grid(latents[None])
    height, width = input_size(crepa.encoder_image_size, grid, patch_size)
    frames = len(matching_frames(bucket.frames, grid.frames))
    return TokenGrid(frames, height // patch_size, width // patch_size)


def encoded_clip(family: Family, bucket: Bucket) -> Tensors:
    """The tensors that the family encodes a clip to, without content, on the meta device.

    Their sizes grow linearly with the clip's length, height and width. So small clips are encoded, in place of a large
    one, which takes seconds.
    """
    small, encoded, larger = _small_clips(family)
    shapes = {name: list(tensor.shape) for name, tensor in encoded.items()}
    for field, (growth, grown) in larger.items():
        times = (getattr(bucket, field) - getattr(small, field)) / growth
        for name, tensor in encoded.items():
            for axis, (size, more) in enumerate(zip(tensor.shape, grown[name].shape, strict=True)):
                shapes[name][axis] += round((more - size) * times)
    with torch.device("meta"):
        tensors = {name: torch.empty(shapes[name], dtype=one.dtype) for name, one in encoded.items()}
        return tensors | family.empty_image_embedding()


@cache
@torch.no_grad()
def _small_clips(family: Family) -> tuple[Bucket, Tensors, dict[str, tuple[int, Tensors]]]:
    """A small clip, what it is encoded to, and what it is encoded to if one of its sizes grows by some pixels."""
    step, side = family.frame_multiple, family.size_multiple
    small = Bucket(1 + step, 2 * side, 2 * side)
    pipeline = family.empty_vae_pipeline()

    def encoded(bucket: Bucket) -> Tensors:
        with torch.device("meta"):
            video = torch.empty(3, bucket.frames, bucket.height, bucket.width)
            # The image encoder needs pixels; the shape of its result is in its configuration.
            return family.without_image_encoder().encode_clip(pipeline, video)

    larger = {
        field: (growth, encoded(replace(small, **{field: getattr(small, field) + growth})))
        for field, growth in (("frames", step), ("height", side), ("width", side))
    }
    return small, encoded(small), larger


def token_count(family: Family, bucket: Bucket) -> int:
    """Tokens of a clip; stored and reused."""

    def count() -> dict[str, int]:
        grid = family.token_grid(encoded_clip(family, bucket)["latents"][None])
        return {"tokens": grid.frames * grid.tokens}

    facts = [family.name, family.task, family.config, family.base.read_config("vae/config.json"), family.vae_tiling]
    return kept(["tokens", *facts, asdict(bucket)], count)["tokens"]


def largest_attention(profile: Profile, family: Family, buckets: Iterable[Bucket]) -> Attention:
    """The self-attention of a batch of the largest clips, for a family whose blocks compare all tokens with all."""
    tokens = max(token_count(family, bucket) for bucket in buckets)
    return Attention.of(family, torch_dtype(profile.model.dtype), clips=profile.train.batch_size, tokens=tokens)


def hidden_bytes(profile: Profile, family: Family, bucket: Bucket) -> int:
    """Bytes of the hidden states that a batch has between two blocks."""
    return _states_bytes(profile, family, token_count(family, bucket))


def caption_bytes(profile: Profile, family: Family) -> int:
    """Bytes of the hidden states that the longest captions of a batch have between two blocks of their own."""
    with torch.device("meta"):
        caption = family.longest_prompt(torch_dtype(profile.model.dtype))["prompt_embeds"]
    return _states_bytes(profile, family, len(caption))


def _states_bytes(profile: Profile, family: Family, tokens: int) -> int:
    numbers = profile.train.batch_size * tokens * family.hidden_size
    return numbers * (4 if profile.model.dtype == "float32" else 2)


def total_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())
