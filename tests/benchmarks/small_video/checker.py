"""Reads off a video what a scene shows: the way of its shape, and its color."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crepa_cli.demo.clips import COLORS, DIRECTIONS
from crepa_cli.demo.scenes import SCENE_COLORS, Scene

COLORED = 0.16
"""Difference of the largest and the smallest channel from which on a pixel belongs to the shape."""
SMALLEST = 0.02
"""Share of the pixels that have to be the shape's for it to be seen."""


class Checked(NamedTuple):
    """Whether a video shows the color and the direction of its scene."""

    color: bool
    direction: bool


def check(video: Tensor, scene: Scene) -> Checked:
    """Compare a video, uint8 `[F, 3, H, W]`, with the scene that it should show."""
    return Checked(color_of(video) == scene.color, direction_of(video) == scene.direction)


def path_of(video: Tensor) -> Tensor:
    """Centers of the shape in a video, uint8 `[F, 3, H, W]`: `[F, 2]` as shares of width and height.

    They are NaN in frames that show no shape.
    """
    weights = _shape_weights(video)
    height, width = weights.shape[1:]
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    total = weights.sum((1, 2))
    centers = torch.stack([(weights.sum(1) * x).sum(1), (weights.sum(2) * y).sum(1)], dim=1) / total[:, None]
    seen = (weights > 0).float().mean((1, 2)) >= SMALLEST
    return torch.where(seen[:, None], centers, torch.nan)


def direction_of(video: Tensor) -> str | None:
    """Direction in which the shape of a video moves, or `None` if it stays where it is or is not seen."""
    path = path_of(video)
    path = path[~path.isnan().any(1)]
    if len(path) < len(video) // 2:
        return None
    third = len(path) // 3
    way = path[-third:].mean(0) - path[:third].mean(0)
    if way.abs().max() < 0.1:
        return None
    return max(DIRECTIONS, key=lambda name: float(way @ torch.tensor(DIRECTIONS[name])))


def color_of(video: Tensor) -> str | None:
    """Color of the scenes that is nearest to that of a video's shape, or `None` if none is seen."""
    weights = _shape_weights(video)
    if (weights > 0).float().mean() < SMALLEST:
        return None
    mean = (video.float() * weights[:, None]).sum((0, 2, 3))
    return max(SCENE_COLORS, key=lambda name: float(_hue(mean) @ _hue(torch.tensor(COLORS[name]))))


def _shape_weights(video: Tensor) -> Tensor:
    """How strongly each pixel is colored, 0 where it is gray: `[F, H, W]`."""
    pixels = video.float() / 255
    return (pixels.amax(1) - pixels.amin(1) - COLORED).clamp(min=0)


def _hue(color: Tensor) -> Tensor:
    """The direction in which a color differs from gray, of length 1."""
    return torch.nn.functional.normalize(color - color.mean(), dim=0)
