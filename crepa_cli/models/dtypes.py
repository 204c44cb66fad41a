"""Data types of torch by their names in settings."""

from __future__ import annotations

import torch


def torch_dtype(name: str) -> torch.dtype:
    """The data type of a name in `model.dtype`, such as `bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
