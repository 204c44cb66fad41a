"""Generated clips for demos and tests: textured shapes that drift and turn over moving textured backgrounds."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from crepa_cli.data.buckets import Size
from crepa_cli.data.video import write_video
from crepa_cli.files import write_whole

FRAMES = 24
FPS = 16
SIZES = (Size(192, 144), Size(144, 144), Size(144, 192))

COLORS = {
    "red": (0.88, 0.22, 0.20),
    "orange": (0.95, 0.55, 0.15),
    "yellow": (0.97, 0.83, 0.25),
    "green": (0.25, 0.65, 0.35),
    "teal": (0.12, 0.60, 0.62),
    "blue": (0.20, 0.40, 0.85),
    "purple": (0.55, 0.30, 0.75),
    "pink": (0.93, 0.50, 0.66),
}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

# The distance from a shape's edge, negative inside, for coordinates in units of its radius.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: torch.hypot(x, y) - 1,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.85,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.28,
    "triangle": lambda x, y: torch.maximum(0.87 * x.abs() + 0.5 * y, -y) - 0.6,
    "star": lambda x, y: torch.hypot(x, y) - 0.8 - 0.25 * torch.cos(5 * torch.atan2(y, x)),
}
# Brightness from -1 to 1; the period is 1.
TEXTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "checkered": lambda x, y: _soft(torch.sin(math.tau * x) * torch.sin(math.tau * y)),
    "striped": lambda x, y: _soft(torch.sin(math.tau * (x + 0.3 * y))),
    "dotted": lambda x, y: _soft(torch.cos(math.tau * x) + torch.cos(math.tau * y) - 0.6),
    "wavy": lambda x, y: _soft(torch.sin(math.tau * (y + 0.2 * torch.sin(math.tau * x)))),
}


def write_demo_clips(folder: Path, *, count: int = 8, seed: int = 0) -> None:
    """Write `count` clips of 24 frames at 16 frames per second, each with its caption in a `.txt` file next to it.

    The clips have three aspect ratios, and the same seed gives the same files. Existing clips are kept.

    Raises:
        UserError: if the disk is full or the folder is not writable.
    """
    for index in range(count):
        video = folder / f"clip-{index:02d}.mp4"
        text = video.with_suffix(".txt")
        if not (video.exists() and text.exists()):
            caption, frames = _scene(index, random.Random(f"{seed}/{index}"))
            write_whole(text, f"{caption}\n".encode())
            write_video(video, frames, FPS)


def _scene(index: int, randomness: random.Random) -> tuple[str, Tensor]:
    """A caption and the frames it describes: uint8 [F, 3, height, width]."""
    # Sizes, shapes and directions alternate, so that a handful of clips shows them all.
    size, shape = SIZES[index % len(SIZES)], list(SHAPES)[index % len(SHAPES)]
    direction = list(DIRECTIONS)[index % len(DIRECTIONS)]
    color, back_color = randomness.sample(list(COLORS), 2)
    texture, back_texture = randomness.sample(list(TEXTURES), 2)
    drift = randomness.choice((-1, 1))

    moment = torch.linspace(-0.5, 0.5, FRAMES)[:, None, None]
    across = ((torch.arange(size.width) + 0.5 - size.width / 2) / min(size)).expand(FRAMES, size.height, -1)
    down = ((torch.arange(size.height) + 0.5 - size.height / 2) / min(size))[:, None].expand(FRAMES, -1, size.width)
    backdrop = TEXTURES[back_texture](across * 3 + 0.6 * drift * moment, down * 3 + 0.3 * moment)
    # From here on, coordinates are in units of the shape's radius, relative to its center.
    x = (across - DIRECTIONS[direction][0] * 0.6 * moment) / 0.3
    y = (down - DIRECTIONS[direction][1] * 0.6 * moment) / 0.3
    x, y = _turned(x, y, 0.6 * drift * moment)
    shadow, cover = torch.sigmoid(-12 * SHAPES[shape](x - 0.12, y - 0.12)), torch.sigmoid(-40 * SHAPES[shape](x, y))
    background = _paint(back_color, 0.62, 0.15 * backdrop) * (1 - 0.45 * shadow[:, None])
    surface = _paint(color, 0.95, 0.24 * TEXTURES[texture](x * 1.2, y * 1.2))
    pictures = torch.lerp(background, surface, cover[:, None])

    article = "an" if color == "orange" else "a"
    caption = f"{article} {color} {texture} {shape} turns and drifts {direction}"
    caption += f" over a slowly moving {back_texture} {back_color} background"
    return caption, (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def _paint(color: str, level: float, brightness: Tensor) -> Tensor:
    """A color modulated by brightness [F, height, width]: [F, 3, height, width], mostly between 0 and 1."""
    return torch.tensor(COLORS[color])[:, None, None] * level + brightness[:, None]


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    sine, cosine = torch.sin(angle), torch.cos(angle)
    return cosine * x + sine * y, cosine * y - sine * x


def _soft(wave: Tensor) -> Tensor:
    """The wave with steep edges, but without the aliasing of hard ones."""
    return torch.tanh(4 * wave)
