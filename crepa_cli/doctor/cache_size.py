"""The size of the cache for a set of clips, from shapes alone: no weights are read, nothing is encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from crepa_cli.data.buckets import Bucket
from crepa_cli.data.compact import narrowed
from crepa_cli.data.encoder import encoder_config
from crepa_cli.memory.shapes import encoded_clip, teacher_grid, total_bytes
from crepa_cli.models.family import Family
from crepa_cli.profile import CrepaSettings, FeatureDtype

SCALE_BYTES = 4


def cache_bytes(
    family: Family,
    buckets: Sequence[Bucket],
    texts: int,
    dtype: torch.dtype,
    crepa: CrepaSettings | None,
    feature_dtype: FeatureDtype,
) -> dict[str, int]:
    """Predicted bytes of the cache by part, without file headers, which are well under one percent.

    Args:
        family: of the checkpoint.
        buckets: one for each clip.
        texts: number of distinct captions and prompts.
        dtype: of the text encoder and of the latents.
        crepa: the encoder's settings; None if no features are stored.
        feature_dtype: of the features.
    """
    counts = Counter(buckets).items()

    def feature_bytes(bucket: Bucket) -> int:
        return _feature_bytes(family, bucket, crepa, feature_dtype) if crepa else 0

    return {
        "latents": sum(count * total_bytes(narrowed(encoded_clip(family, bucket), dtype)) for bucket, count in counts),
        "prompts": texts * _prompt_bytes(family, dtype),
        "features": sum(count * feature_bytes(bucket) for bucket, count in counts),
    }


def _feature_bytes(family: Family, bucket: Bucket, crepa: CrepaSettings, dtype: FeatureDtype) -> int:
    """Bytes of one clip's teacher features."""
    encoder = encoder_config(crepa)
    grid = teacher_grid(family, encoded_clip(family, bucket)["latents"], bucket, crepa, encoder["patch_size"])
    size = encoder["hidden_size"]
    return int(grid.frames * grid.tokens * (size + SCALE_BYTES if dtype == "int8" else 2 * size))


def _prompt_bytes(family: Family, dtype: torch.dtype) -> int:
    """Bytes of the tensors of one prompt, padded to the longest."""
    with torch.device("meta"):
        return total_bytes(family.longest_prompt(dtype))
