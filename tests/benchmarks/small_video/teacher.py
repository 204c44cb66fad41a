"""The small teacher: a DINOv2 that has learned from single frames what a scene shows, and where."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from crepa_cli.demo.scenes import (
    BACKGROUNDS,
    FRAMES,
    SCENE_COLORS,
    SCENE_SHAPES,
    SCENE_TEXTURES,
    SIZE,
    all_scenes,
)
from crepa_cli.teachers.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from small_video.loop import train

WIDTH = 96
PATCH = 8
SIDE = 64
"""Side of the square input in pixels; frames are resized to it, as they are for a run."""
SCENES = 8
FRAMES_OF_EACH = 4
RATE = 1e-3
CHOICES = (SCENE_TEXTURES, SCENE_COLORS, SCENE_SHAPES, tuple(BACKGROUNDS))
PATCH_VALUES = 6
"""For each patch: its mean color, the share that the shape covers, and the way to the shape's center."""


def new_teacher() -> Dinov2Model:
    """Four layers of width 96, patches of 8 pixels."""
    torch.manual_seed(3)
    return Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=4,
            image_size=SIDE,
            patch_size=PATCH,
            layerscale_value=1.0,
        )
    )


class Supervised(nn.Module):
    """A teacher, with the heads that it is trained by and that are thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = new_teacher()
        # It stands for hidden patches, and none is hidden.
        self.teacher.embeddings.mask_token.requires_grad_(False)
        self.labels = nn.Linear(WIDTH, sum(map(len, CHOICES)))
        self.values = nn.Linear(WIDTH, PATCH_VALUES)

    def forward(self, frames: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Scores of the choices, each `[B, choices]`, and values of patches `[B, N, 6]`, of uint8 `[B, 3, H, W]`."""
        pixels = F.interpolate(frames.float() / 255, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        tokens = self.teacher((pixels - mean) / std).last_hidden_state
        return self.labels(tokens[:, 0]).split([len(choice) for choice in CHOICES], dim=1), self.values(tokens[:, 1:])


def frames_of(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frames uint8 `[B, 3, H, W]`, their labels `[B, 4]`, and the centers of their shapes `[B, 2]`."""
    randomness = random.Random(f"teacher/{step}")
    frames, labels, centers = [], [], []
    for scene in randomness.choices(all_scenes(), k=SCENES):
        seed = randomness.randrange(10**6)
        moments = randomness.sample(range(FRAMES), FRAMES_OF_EACH)
        frames.append(scene.render(seed)[moments])
        centers.append(scene.path(seed)[moments])
        words = (scene.texture, scene.color, scene.shape, scene.background)
        label = [choice.index(word) for choice, word in zip(CHOICES, words, strict=True)]
        labels += [label] * FRAMES_OF_EACH
    return torch.cat(frames), torch.tensor(labels), torch.cat(centers)


def _patch_values(frames: Tensor, centers: Tensor) -> Tensor:
    """What the values of each patch should be: `[B, N, 6]`."""
    pixels = F.interpolate(frames.float() / 255, (SIDE, SIDE), mode="area")
    cover = ((pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)) > 0.1).float()
    means = F.avg_pool2d(torch.cat([pixels, cover], dim=1), PATCH).flatten(2).mT
    middle = (torch.arange(SIDE // PATCH) + 0.5) * PATCH / SIDE
    places = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), dim=-1).flatten(0, 1)
    way = (centers[:, None] - places) * torch.tensor([SIZE.width / SIZE.height, 1.0])
    return torch.cat([means, way], dim=2)


def _loss(model: Supervised, step: int) -> Tensor:
    frames, labels, centers = frames_of(step)
    with torch.autocast("cpu", torch.bfloat16):
        scores, values = model(frames)
    loss = (values.float() - _patch_values(frames, centers)).abs().mean() * 4
    for index, score in enumerate(scores):
        loss = loss + 0.25 * F.cross_entropy(score.float(), labels[:, index])
    return loss


def train_teacher(work: Path, *, steps: int) -> Dinov2Model:
    """Train a teacher on frames of the scenes."""
    model = Supervised()
    train(model, lambda step: _loss(model, step), work / "teacher.safetensors", steps=steps, rate=RATE)
    with torch.no_grad():
        frames, labels, _ = frames_of(-1)
        scores, _ = model(frames)
    shares = [f"{float((score.argmax(1) == labels[:, i]).float().mean()):.2f}" for i, score in enumerate(scores)]
    print("teacher: share of new frames with the right texture, color, shape, background:", *shares, flush=True)
    return model.teacher
