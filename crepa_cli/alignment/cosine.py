"""The objective of CREPA (arXiv 2506.09229, Eq. 6), with memory that does not grow with the clip.

With the hidden states h of one block, teacher features y, and the projector g (LayerNorm, then Linear or Conv2d):

    s(f, k) = mean over patches p of cos(g(h[f, p]), y[k, p])
    S(f)    = s(f, f) + sum over the neighbors k of f of exp(-|k - f| / tau) * s(f, k)
    loss    = - mean over clips of the sum over f of S(f)

With unit-length features Y, S(f) = mean over p of <P[f, p], (W Y)[f, p]> for the unit-length projections P and a banded
matrix W `[T, T]` of the neighbors' weights: one product, whatever the distance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crepa_cli.alignment.comparison import Chunk, Comparison, full_precision


class FrameSimilarities(torch.autograd.Function):
    """-S(f), S(f) and s(f, f) of every frame, `[B, T]` each, chunk by chunk; the backward recomputes each chunk.

    Only the inputs are kept between the two passes. The gradient is that of the first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        features: Tensor,
        statistics: Tensor | None,
        comparison: Comparison,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.comparison = comparison
        ctx.save_for_backward(hidden, features, statistics, *parameters)
        similarities = comparison.weights.new_zeros(hidden.shape[:2])
        self_similarities = torch.zeros_like(similarities)
        with full_precision(hidden.device):
            for chunk in comparison.chunks(len(hidden)):
                mixed, own = _targets(comparison, features, statistics, chunk)
                projections = comparison.project(comparison.hidden_of(hidden, chunk), chunk, parameters)
                at = chunk.clip, chunk.frames
                similarities[at] += (projections * mixed).sum((1, 2)) / comparison.patches
                self_similarities[at] += (projections * own).sum((1, 2)) / comparison.patches
        ctx.mark_non_differentiable(similarities, self_similarities)
        return -similarities, similarities, self_similarities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        comparison: Comparison = ctx.comparison
        hidden, features, statistics, *parameters = ctx.saved_tensors
        hidden_gradient = torch.zeros_like(hidden)
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        with full_precision(hidden.device):
            for chunk in comparison.chunks(len(hidden)):
                mixed = _targets(comparison, features, statistics, chunk)[0]
                leaves = [comparison.hidden_of(hidden, chunk), *parameters]
                leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                with torch.enable_grad():
                    projections = comparison.project(leaves[0], chunk, tuple(leaves[1:]))
                scale = -upstream[chunk.clip, chunk.frames, None, None] / comparison.patches
                part, *rest = torch.autograd.grad(projections, leaves, scale * mixed)
                comparison.hidden_of(hidden_gradient, chunk).add_(part)
                for total, gradient in zip(gradients, rest, strict=True):
                    total.add_(gradient)
        return hidden_gradient, None, None, None, *gradients


def _targets(
    comparison: Comparison, features: Tensor, statistics: Tensor | None, chunk: Chunk
) -> tuple[Tensor, Tensor]:
    """W Y and Y for a chunk's frames, `[T, N, D]` each, in the projector's dtype."""
    near = comparison.with_neighbors(chunk.frames)
    unit = comparison.unit_features(features, statistics, chunk._replace(frames=near))
    own = slice(chunk.frames.start - near.start, chunk.frames.stop - near.start)
    return torch.tensordot(comparison.weights[chunk.frames, near], unit, dims=1), unit[own]
