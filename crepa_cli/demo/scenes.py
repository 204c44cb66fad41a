"""Scenes of known motion: one shape crosses a plain background. The demo's Wan was trained on them."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crepa_cli.data.buckets import Size
from crepa_cli.data.video import write_video
from crepa_cli.demo.clips import COLORS, DIRECTIONS, FPS, SHAPES, TEXTURES
from crepa_cli.files import write_whole

FRAMES = 17
SIZE = Size(96, 64)

SCENE_TEXTURES = ("plain", "striped", "checkered")
SCENE_COLORS = ("red", "yellow", "green", "blue", "purple")
SCENE_SHAPES = ("disc", "square", "triangle")
UNSEEN_SHAPE = "ring"
"""The shape that the demo fine-tunes on; it is in no clip of the pretraining."""
# Backgrounds are gray, so that whatever has a color belongs to the shape.
BACKGROUNDS = {"black": 0.08, "gray": 0.45, "white": 0.88}
DARK = 0.5
"""Brightness of the dark parts of a texture."""

START = {"left": (0.80, 0.5), "right": (0.20, 0.5), "up": (0.5, 0.76), "down": (0.5, 0.24)}
"""Mean center at the first frame as shares of width and height. A place of its own makes a direction easy to learn."""
TRAVEL = {"left": 0.58, "right": 0.58, "up": 0.50, "down": 0.50}
"""Mean way as a share of the width or height."""
PROMPT = f"a plain yellow {UNSEEN_SHAPE} moves right over a black background"
"""The prompt that the demo samples."""


@dataclass(frozen=True)
class Scene:
    """A shape that crosses a background.

    Attributes:
        texture: one of `SCENE_TEXTURES`.
        color: one of `SCENE_COLORS`.
        shape: one of `SCENE_SHAPES`, or `UNSEEN_SHAPE`.
        direction: left, right, up or down.
        background: one of `BACKGROUNDS`.
    """

    texture: str
    color: str
    shape: str
    direction: str
    background: str

    @property
    def caption(self) -> str:
        """The sentence that describes the scene."""
        return f"a {self.texture} {self.color} {self.shape} moves {self.direction} over a {self.background} background"

    def path(self, seed: int) -> Tensor:
        """Centers of the shape `[F, 2]` as shares of width and height; every seed has a way of its own."""
        return self._geometry(seed)[0]

    def render(self, seed: int) -> Tensor:
        """Frames of the scene, uint8 `[F, 3, height, width]`, along `path(seed)`."""
        path, radius = self._geometry(seed)
        across = torch.arange(SIZE.width) + 0.5
        down = torch.arange(SIZE.height) + 0.5
        # Coordinates relative to the center, in units of the radius.
        x = ((across - path[:, 0, None] * SIZE.width) / radius)[:, None, :]
        y = ((down - path[:, 1, None] * SIZE.height) / radius)[:, :, None]
        x, y = torch.broadcast_tensors(x, y)
        cover = torch.sigmoid(-radius * SHAPES[self.shape](x, y))[:, None]
        bright = torch.ones_like(x) if self.texture == "plain" else _stripes(self.texture, x, y)
        surface = torch.tensor(COLORS[self.color])[:, None, None] * bright[:, None]
        shade = (0.5 - down / SIZE.height)[:, None] * 0.1
        background = (BACKGROUNDS[self.background] + shade).expand(1, 3, -1, SIZE.width)
        return (torch.lerp(background, surface, cover).clamp(0, 1) * 255).round().to(torch.uint8)

    def _geometry(self, seed: int) -> tuple[Tensor, float]:
        """Centers `[F, 2]`, and the radius in pixels."""
        randomness = random.Random(f"{self.caption}/{seed}")
        radius = randomness.uniform(16, 18)
        step = torch.tensor(DIRECTIONS[self.direction])
        start = torch.tensor([share + randomness.uniform(-0.04, 0.04) for share in START[self.direction]])
        # Across its way, a shape may begin anywhere near the middle.
        start += (1 - step.abs()) * randomness.uniform(-0.12, 0.12)
        moment = torch.linspace(0, 1, FRAMES)[:, None]
        return start + moment * step * TRAVEL[self.direction] * randomness.uniform(0.9, 1.1), radius


def _stripes(texture: str, x: Tensor, y: Tensor) -> Tensor:
    """Brightness from `DARK` to 1 of a texture with two periods across the shape."""
    return DARK + (1 - DARK) * (TEXTURES[texture](x * 0.9 + 0.25, y * 0.9 + 0.25) + 1) / 2


def all_scenes(shapes: tuple[str, ...] = SCENE_SHAPES) -> list[Scene]:
    """Every scene with one of these shapes, in a mixed order that is always the same."""
    choices = itertools.product(SCENE_TEXTURES, SCENE_COLORS, shapes, DIRECTIONS, BACKGROUNDS)
    scenes = [Scene(*choice) for choice in choices]
    random.Random(0).shuffle(scenes)
    return scenes


def write_scenes(folder: Path, *, count: int = 8) -> None:
    """Write `count` clips of the unseen shape, each with its caption in a `.txt` file next to it.

    Existing clips are kept.

    Raises:
        UserError: if the disk is full or the folder is not writable.
    """
    for index, scene in enumerate(all_scenes((UNSEEN_SHAPE,))[:count]):
        video = folder / f"clip-{index:02d}.mp4"
        text = video.with_suffix(".txt")
        if not (video.exists() and text.exists()):
            write_whole(text, f"{scene.caption}\n".encode())
            write_video(video, scene.render(index), FPS)
