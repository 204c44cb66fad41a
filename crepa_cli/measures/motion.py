"""How much moves in a video, by differences of frames or by an optical flow."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor

from crepa_cli.measures.color import luma

TOP_SHARE = 0.05
"""The share of the largest values that counts, as in VBench's dynamic degree: a small object that moves is motion."""
CELLS = 64
STILL = 0.01
"""A video with less motion does not move. Compression changes a still picture by less; generated clips have 0.2."""


def difference_motion(video: Tensor) -> list[float]:
    """The mean of the largest 5 % of the differences in brightness between each frame and the next, F - 1 values.

    Brightness is averaged over square cells, about 64 along the shorter side, so that noise counts for little. The mean
    difference is subtracted first: a picture that turns brighter as a whole does not move.
    """
    size = max(1, min(video.shape[-2:]) // CELLS)
    cells = (F.avg_pool2d(luma(frame)[None], size)[0] for frame in video)
    return [_difference(first, second) for first, second in itertools.pairwise(cells)]


def _difference(first: Tensor, second: Tensor) -> float:
    change = second - first
    return top_mean((change - change.mean()).abs())


def top_mean(values: Tensor) -> float:
    """The mean of the largest 5 % of a tensor, at least of one value."""
    count = max(1, int(TOP_SHARE * values.numel()))
    return float(values.flatten().topk(count).values.mean())
