"""What the cache will take for a set of clips, from shapes alone: no weights are read, nothing is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        image=family.image_embedding_bytes,
        channels=latents.shape[0],
        pixels=side // latents.shape[-1],
    )


def cache_bytes(
    family: Family, buckets: Sequence[Bucket], texts: int, dtype: torch.dtype, crepa: CrepaSettings | None
) -> dict[str, int]:
    """Bytes that the cache will take, by part; file headers, well under a percent, are left out.

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
        "prompts": texts * _prompt_bytes(family, dtype),
        "features": sum(feature_bytes(family, size, bucket, crepa) for bucket in buckets) if crepa else 0,
    }


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
    return family.without_image_encoder().encode_clip(
        family.empty_vae_pipeline(), torch.empty(3, frames, side, side, device="meta")
    )


def _prompt_bytes(family: Family, dtype: torch.dtype) -> int:
    """Bytes of the tensors of a prompt, which are padded to the longest."""
    with torch.device("meta"):
        return _bytes(family.longest_prompt(dtype))


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
