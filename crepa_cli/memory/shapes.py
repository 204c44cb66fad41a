"""The shapes of what a run reads and trains on, known without reading weights or encoding anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.alignment.grid import matching_frames
from crepa_cli.data.buckets import Bucket, valid_frames
from crepa_cli.data.prepare import ClipForm, encoder_config
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family, Tensors
from crepa_cli.profile import CrepaSettings, Profile
from crepa_cli.teachers.dinov2 import input_size


def form_bucket(profile: Profile, family: Family) -> Bucket:
    """The shape of clips given by the settings."""
    form = ClipForm.of(profile.data)
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


@dataclass(frozen=True)
class ClipSize:
    """The size of a clip's tensors: a part for the first frame, and a part for each further frame.

    Attributes:
        first: bytes per pixel of the first frame.
        further: bytes per pixel of each further frame.
        image: bytes of the first frame's embedding; 0 if the checkpoint has no image encoder.
        channels: of the latents.
        pixels: side of a latent in pixels.
    """

    first: float
    further: float
    image: int
    channels: int
    pixels: int

    def bytes(self, bucket: Bucket) -> int:
        """Bytes of one clip's latents and of the tensors stored with them."""
        area = bucket.height * bucket.width
        return round(area * (self.first + (bucket.frames - 1) * self.further)) + self.image

    def empty_latents(self, family: Family, bucket: Bucket) -> Tensor:
        """Latents `[C, T, h, w]` of one clip on the meta device."""
        frames = (bucket.frames - 1) // family.frame_multiple + 1
        shape = self.channels, frames, bucket.height // self.pixels, bucket.width // self.pixels
        return torch.empty(shape, device="meta")


def measure_clip(family: Family) -> ClipSize:
    """Measure the family's encoding of two small clips without content, on torch's meta device."""
    side, step = 2 * family.size_multiple, family.frame_multiple
    short, long = (encoded_clip(family, Bucket(frames, side, side)) for frames in (1 + step, 1 + 2 * step))
    further = (total_bytes(long) - total_bytes(short)) / (step * side**2)
    latents = short["latents"]
    with torch.device("meta"):
        image = total_bytes(family.empty_image_embedding())
    return ClipSize(
        first=(total_bytes(short) - image) / side**2 - step * further,
        further=further,
        image=image,
        channels=latents.shape[0],
        pixels=side // latents.shape[-1],
    )


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


# It takes seconds for long clips, and most of the settings tried leave the shape as it is.
@cache
@torch.no_grad()
def encoded_clip(family: Family, bucket: Bucket) -> Tensors:
    """The tensors that the family encodes a clip to, without content, on the meta device."""
    with torch.device("meta"):
        video = torch.empty(3, bucket.frames, bucket.height, bucket.width)
        # The image encoder needs pixels; the shape of its result is in its configuration.
        tensors = family.without_image_encoder().encode_clip(family.empty_vae_pipeline(), video)
        return tensors | family.empty_image_embedding()


def total_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())
