"""LayerSync (arXiv 2510.12581): a block is aligned with a deeper block of the same transformer, without a projector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crepa_cli.alignment.comparison import CHUNK_TOKENS, full_precision
from crepa_cli.alignment.loss import check_tensor


def layersync_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The negative mean cosine similarity of each token's two hidden states: a 0-d tensor in float32 (or float64).

    Args:
        student: `[B, S, H]`, hidden states of the shallower block.
        teacher: `[B, S, H]`, hidden states of the deeper block; they get no gradient.

    Raises:
        TypeError: if `student` or `teacher` is not a tensor.
        ValueError: if the shapes differ.
    """
    check_tensor("student", student)
    check_tensor("teacher", teacher)
    if student.shape != teacher.shape:
        raise ValueError(f"both blocks must have the same shape, got {list(student.shape)} and {list(teacher.shape)}")
    size = max(1, CHUNK_TOKENS // len(student))
    chunks = zip(student.split(size, dim=1), teacher.detach().split(size, dim=1), strict=True)
    # Float32 copies of all tokens would be larger than the states themselves, so the backward recomputes each chunk.
    sums = [checkpoint(_summed_cosines, *chunk, use_reentrant=False) for chunk in chunks]
    return -torch.stack(sums).sum() / (student.shape[0] * student.shape[1])


def _summed_cosines(student: Tensor, teacher: Tensor) -> Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    with full_precision(student.device):
        return F.cosine_similarity(student.to(dtype), teacher.to(dtype), dim=-1).sum()
