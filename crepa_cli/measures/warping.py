"""Frames compared along an optical flow, from any source."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from crepa_cli.measures.motion import top_mean

Flow = Callable[[Tensor, Tensor], Tensor]
"""The way of each pixel from one frame to another: two frames `[3, H, W]` in [0, 1] give `[2, H, W]` in pixels, to the
right and down. `first[y, x]` shows what `second[y + down, x + right]` shows."""


def along_flow(video: Tensor, flow: Flow) -> tuple[list[float], list[float]]:
    """The warping error of each frame and the next, and the motion between them, F - 1 values each.

    The motion is the mean of the largest 5 % of the lengths of the flow, as a share of the shorter side.
    """
    errors, motions = [], []
    shorter = min(video.shape[-2:])
    for first, second in itertools.pairwise(video):
        forward, backward = (flow(*pair).double().cpu() for pair in ((first, second), (second, first)))
        errors.append(warping_error(first, second, forward, backward))
        motions.append(top_mean(forward.norm(dim=0)) / shorter)
    return errors, motions


def warping_error(first: Tensor, second: Tensor, forward: Tensor, backward: Tensor) -> float:
    """The mean squared difference between a frame and the next one moved back along the flow.

    Pixels count that stay in the picture and are visible in both frames. By the test of Sundaram et al. (2010), a pixel
    is hidden if the flow does not lead back: |w + w'|² > 0.01 (|w|² + |w'|²) + 0.5, with w' the backward flow at the
    place to which w leads. If no pixel is left, all of them count.

    Args:
        first: `[3, H, W]`.
        second: the next frame.
        forward: the flow w from the first to the second, `[2, H, W]` in pixels.
        backward: the flow from the second to the first.
    """
    moved, inside = warped(torch.cat([second.double(), backward]), forward)
    back = moved[3:]
    lost = (forward + back).square().sum(0)
    lengths = forward.square().sum(0) + back.square().sum(0)
    visible = inside & (lost <= 0.01 * lengths + 0.5)
    error = (first.double() - moved[:3]).square().mean(0)
    return float(error[visible].mean() if visible.any() else error.mean())


def warped(frame: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """A frame `[C, H, W]` read at the place of each pixel plus its flow, and whether that place is in the frame.

    Places between pixels are interpolated bilinearly, and those outside take the nearest pixel.

    Returns:
        float64 `[C, H, W]`, and bool `[H, W]`.
    """
    height, width = frame.shape[-2:]
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = right + flow[0].double(), down + flow[1].double()
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    # grid_sample counts from -1 to 1 between the centers of the outermost pixels.
    places = torch.stack([2 * x / max(1, width - 1) - 1, 2 * y / max(1, height - 1) - 1], dim=-1)
    read = F.grid_sample(frame.double()[None], places[None], padding_mode="border", align_corners=True)[0]
    return read, inside
