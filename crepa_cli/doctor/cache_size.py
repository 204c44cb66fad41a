"""What the cache will take for a set of clips, from shapes alone: no weights are read, nothing is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import AutoConfig

from crepa_cli.alignment import TokenGrid
from crepa_cli.alignment.grid import matching_frames
from crepa_cli.data.buckets import Bucket
from crepa_cli.data.prepare import encoder_config
from crepa_cli.models.family import Family, Tensors
from crepa_cli.profile import CrepaSettings
from crepa_cli.teachers.dinov2 import input_size

FEATURE_BYTES = 2


@dataclass(frozen=True)
class ClipSize:
    """How the tensors of a clip grow with it: a part for the first frame, and one for each further frame.

    Attributes:
        first: bytes per pixel of the first frame.
        further: bytes per pixel of each further frame.
        image: bytes of the first frame's embedding, of checkpoints that have one.
        channels: of the latents.
        pixels: side of a latent in pixels.
    """

    first: float
    further: float
    image: int
    channels: int
    pixels: int

    def bytes(self, bucket: Bucket) -> int:
        """Bytes of one clip's latents and what is stored with them."""
        area = bucket.height * bucket.width
        return round(area * (self.first + (bucket.frames - 1) * self.further)) + self.image

    def empty_latents(self, family: Family, bucket: Bucket) -> Tensor:
        """Latents `[C, T, h, w]` of one clip on the meta device."""
        frames = (bucket.frames - 1) // family.frame_multiple + 1
        shape = self.channels, frames, bucket.height // self.pixels, bucket.width // self.pixels
        return torch.empty(shape, device="meta")


def measure_clip(family: Family) -> ClipSize:
    """Run the family's own encoding on two small clips without content, on torch's meta device."""
    side, step = 2 * family.size_multiple, family.frame_multiple
    short, long = (_encoded(family, frames, side) for frames in (1 + step, 1 + 2 * step))
    further = (_bytes(long) - _bytes(short)) / (step * side**2)
    latents = short["latents"]
    return ClipSize(
        first=_bytes(short) / side**2 - step * further,
        further=further,
        image=_image_bytes(family) if family.image_components else 0,
        channels=latents.shape[0],
        pixels=side // latents.shape[-1],
    )


def cache_bytes(
    family: Family, buckets: Sequence[Bucket], texts: int, dtype: torch.dtype, crepa: CrepaSettings | None
) -> dict[str, int]:
    """Bytes that the cache will take, by part; headers of files and masks, of well under a percent, are left out.

    Args:
        family: of the checkpoint.
        buckets: one for each clip.
        texts: different captions and prompts.
        dtype: of the text encoder.
        crepa: the encoder's settings; None where no features are stored.
    """
    size = measure_clip(family)
    return {
        "latents": sum(size.bytes(bucket) for bucket in buckets),
        "prompts": texts * prompt_numbers(family) * dtype.itemsize,
        "features": sum(feature_bytes(family, size, bucket, crepa) for bucket in buckets) if crepa else 0,
    }


def prompt_numbers(family: Family) -> int:
    """Numbers in the embedding of a caption, which the pipelines pad to the length of their own call."""
    call = getattr(diffusers, family.pipeline_class).__call__
    tokens = signature(call).parameters["max_sequence_length"].default
    config = AutoConfig.for_model(**family.read_config("text_encoder/config.json"))
    return int(tokens * config.get_text_config().hidden_size)


def feature_bytes(family: Family, size: ClipSize, bucket: Bucket, crepa: CrepaSettings) -> int:
    """Bytes of one clip's teacher features."""
    encoder = encoder_config(crepa)
    grid = teacher_grid(family, size.empty_latents(family, bucket), bucket, crepa, encoder["patch_size"])
    return int(grid.frames * grid.tokens * encoder["hidden_size"] * FEATURE_BYTES)


def teacher_grid(family: Family, latents: Tensor, bucket: Bucket, crepa: CrepaSettings, patch_size: int) -> TokenGrid:
    """Where the features of one clip are.

    Args:
        family: of the checkpoint.
        latents: of the clip, `[C, T, h, w]`.
        bucket: its shape.
        crepa: the encoder's settings.
        patch_size: of the encoder, in pixels.
    """
    grid = family.token_grid(latents[None])
    height, width = input_size(crepa.encoder_image_size, grid, patch_size)
    frames = len(matching_frames(bucket.frames, grid.frames))
    return TokenGrid(frames, height // patch_size, width // patch_size)


@torch.no_grad()
def _encoded(family: Family, frames: int, side: int) -> Tensors:
    """The tensors of a clip without content, but for the embedding of its first frame, which needs its pixels."""
    family = without_image_encoder(family)
    return family.encode_clip(empty_vae_pipeline(family), torch.empty(3, frames, side, side, device="meta"))


def without_image_encoder(family: Family) -> Family:
    """The family as if its checkpoint had no image encoder."""
    family = copy(family)
    family.image_components = ()
    return family


def empty_vae_pipeline(family: Family) -> Any:
    """The family's pipeline with a VAE on the meta device and nothing else."""
    config = family.read_config("vae/config.json")
    pipeline_class = getattr(diffusers, family.pipeline_class)
    with torch.device("meta"):
        vae = getattr(diffusers, config["_class_name"]).from_config(config)
    required = [name for name, one in signature(pipeline_class).parameters.items() if one.default is Parameter.empty]
    return pipeline_class(**dict.fromkeys(required) | {"vae": vae})


def _image_bytes(family: Family) -> int:
    """Bytes of an image's embedding: the image encoder's hidden states, class token included."""
    config = family.read_config("image_encoder/config.json")
    tokens = (config["image_size"] // config["patch_size"]) ** 2 + 1
    return int(tokens * config["hidden_size"] * family.vae_dtype.itemsize)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
