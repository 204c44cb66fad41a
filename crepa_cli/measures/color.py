"""Brightness, saturation, contrast and stripes of frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2126, 0.7152, 0.0722)
"""The weights of red, green and blue in BT.709."""
STRIPES_WINDOW = 17
"""Pixels of the moving average; the tokens of the families are 16 or 32 pixels wide."""


def luma(frame: Tensor) -> Tensor:
    """The brightness `[H, W]` of a frame `[3, H, W]`, in float64."""
    weights = torch.tensor(LUMA, dtype=torch.float64).view(3, 1, 1)
    return (weights * frame).sum(0)


def saturation(video: Tensor) -> list[float]:
    """The mean chroma of each frame: the largest minus the smallest of red, green and blue."""
    return [float((frame.amax(0).double() - frame.amin(0).double()).mean()) for frame in video]


def contrast(video: Tensor) -> list[float]:
    """The standard deviation of the brightness in each frame."""
    return [float(luma(frame).std(correction=0)) for frame in video]


def stripes(video: Tensor) -> list[float]:
    """The root of the energy of the row and column means of each frame, without what is wider than about 16 pixels."""
    return [_stripes(luma(frame)) for frame in video]


def _stripes(brightness: Tensor) -> float:
    energies = [_narrow(brightness.mean(dim)).square().mean() for dim in (0, 1)]
    return float(torch.stack(energies).sum().sqrt())


def _narrow(means: Tensor) -> Tensor:
    """Means minus their moving average, for as many as have a whole window around them."""
    half = (min(STRIPES_WINDOW, len(means)) - 1) // 2
    smooth = F.avg_pool1d(means[None], 2 * half + 1, stride=1)[0]
    return means[half : len(means) - half] - smooth
