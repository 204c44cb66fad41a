"""Tensors of the cache in fewer bytes: latents in bfloat16, features in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from crepa_cli.models.family import Tensors
from crepa_cli.profile import FeatureDtype

VIDEO_DIMENSIONS = 4
LEVELS = 127


def narrowed(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    """Tensors of a clip, with those on the grid of its latents, `[C, T, h, w]`, in a dtype."""
    return {name: tensor.to(dtype) if tensor.ndim == VIDEO_DIMENSIONS else tensor for name, tensor in tensors.items()}


def in_int8(features: Tensor) -> Tensors:
    """Features `[..., D]` as `features` in int8 and `feature_scales` `[...]`, float32, of each token.

    The largest value of a token becomes 127 or -127. Scales are not finite if a value of their token is not.
    """
    scales = features.float().abs().amax(-1) / LEVELS
    levels = features.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return {"features": levels.round().to(torch.int8), "feature_scales": scales}


def stored_features(features: Tensor, dtype: FeatureDtype) -> Tensors:
    """The tensors of an entry of features, from float16 `[..., D]`."""
    return in_int8(features) if dtype == "int8" else {"features": features}


def restored_features(tensors: Mapping[str, Tensor]) -> Tensor:
    """The features of an entry of the cache, float16 `[..., D]`."""
    features, scales = tensors["features"], tensors.get("feature_scales")
    return features if scales is None else (features * scales[..., None]).half()
