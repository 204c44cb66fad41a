"""Token relation distillation (VideoREPA, arXiv 2505.23656), with memory that does not grow with the clip.

Hidden states need not equal the features; any two of them shall be as similar as the teacher finds them. With the
unit-length projections P and features Y of the N patches of two frames:

    r(f, k) = mean over patches p, q of relu(|<P[f, p], P[k, q]> - <Y[f, p], Y[k, q]>| - 0.1)
    R(f)    = r(f, f) + sum over the neighbors k of f of exp(-|k - f| / tau) * r(f, k)
    loss    = mean over clips of the sum over f of R(f)

The authors weigh all pairs of a clip's 24 frames equally, and let a convolution reduce them to 150 patches each. Here
a frame is compared with its neighbors, as everywhere in CREPA, and no patch of the comparison grid is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from crepa_cli.alignment.comparison import Comparison, full_precision

MARGIN = 0.1
"""A difference between two cosines that costs nothing, as published."""


class FrameRelations(torch.autograd.Function):
    """R(f) of every frame, and two sums of similarities, each `[B, T]`; the backward recomputes them.

    The similarity of two frames is the correlation (Pearson's) of the student's cosines with the teacher's, over all
    pairs of different patches: 1 if both see the same structure, 0 if the two have nothing in common. The first sum is
    over a frame and its neighbors, with the weights of R(f); the second has the frame with itself alone.

    Each pass projects a frame once, and holds it until it has been compared with its last neighbor.
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
        losses, similarities, own = (comparison.weights.new_zeros(hidden.shape[:2]) for _ in range(3))
        frame_of = partial(_Frame.of, comparison, hidden, features, statistics, parameters)
        with full_precision(hidden.device):
            for clip in range(len(hidden)):
                held: dict[int, _Frame] = {}
                for first in range(hidden.shape[1]):
                    for second in comparison.not_before(first):
                        if second not in held:
                            held[second] = frame_of(clip, second)
                        loss, similarity = _compared(held[first], held[second])
                        weight = comparison.weights[first, second]
                        for frame in {first, second}:
                            losses[clip, frame] += weight * loss
                            similarities[clip, frame] += weight * similarity
                        if first == second:
                            own[clip, first] = similarity
                    del held[first]
        ctx.mark_non_differentiable(similarities, own)
        return losses, similarities, own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        comparison: Comparison = ctx.comparison
        hidden, features, statistics, *parameters = ctx.saved_tensors
        hidden_gradient = torch.zeros_like(hidden)
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        frame_of = partial(_Frame.of, comparison, hidden, features, statistics, parameters)
        with full_precision(hidden.device):
            for clip in range(len(hidden)):
                held: dict[int, _Frame] = {}
                owed: dict[int, Tensor] = {}
                for first in range(hidden.shape[1]):
                    for second in comparison.not_before(first):
                        if second not in held:
                            with torch.enable_grad():
                                held[second] = frame_of(clip, second)
                            owed[second] = torch.zeros_like(held[second].projections)
                        # Both frames' sums have the pair's loss, and the loss of a frame with itself has it as both.
                        scale = comparison.weights[first, second] * (upstream[clip, first] + upstream[clip, second])
                        slope = _slope(held[first], held[second]) * scale
                        owed[first].addmm_(slope, held[second].projections.detach())
                        if first != second:
                            owed[second].addmm_(slope.T, held[first].projections.detach())
                        del slope
                    frame = held.pop(first)
                    part, *rest = torch.autograd.grad(frame.projections, frame.leaves, owed.pop(first))
                    comparison.hidden_of(hidden_gradient, comparison.whole_frame(clip, first)).add_(part)
                    for total, gradient in zip(gradients, rest, strict=True):
                        total.add_(gradient)
        return hidden_gradient, None, None, None, *gradients


class _Frame(NamedTuple):
    """P and Y of one frame, `[N, D]` each, and what P is computed from: the hidden states and the parameters."""

    projections: Tensor
    features: Tensor
    leaves: list[Tensor]

    @classmethod
    def of(
        cls,
        comparison: Comparison,
        hidden: Tensor,
        features: Tensor,
        statistics: Tensor | None,
        parameters: Sequence[Tensor],
        clip: int,
        frame: int,
    ) -> _Frame:
        chunk = comparison.whole_frame(clip, frame)
        leaves = [one.detach().requires_grad_() for one in (comparison.hidden_of(hidden, chunk), *parameters)]
        projections = comparison.project(leaves[0], chunk, tuple(leaves[1:]))
        return cls(projections[0], comparison.unit_features(features, statistics, chunk)[0], leaves)


def _compared(first: _Frame, second: _Frame) -> tuple[Tensor, Tensor]:
    """r(f, k) and the similarity of two frames."""
    ours, theirs = first.projections @ second.projections.T, first.features @ second.features.T
    loss = F.relu((ours - theirs).abs() - MARGIN).mean()
    if first is second and len(ours) > 1:
        ours, theirs = _without_diagonal(ours), _without_diagonal(theirs)
    centered = ((ours - ours.mean()).flatten(), (theirs - theirs.mean()).flatten())
    return loss, F.cosine_similarity(*centered, dim=0)


def _slope(first: _Frame, second: _Frame) -> Tensor:
    """The gradient `[N, N]` of r(f, k) with respect to the student's cosines."""
    ours = first.projections.detach() @ second.projections.detach().T
    difference = ours.sub_(first.features @ second.features.T)
    return difference.sign() * (difference.abs() > MARGIN) / difference.numel()


def _without_diagonal(square: Tensor) -> Tensor:
    """The elements of `[N, N]` that are not on its diagonal, as `[N - 1, N]`."""
    size = len(square)
    return square.flatten()[1:].view(size - 1, size + 1)[:, :-1]
