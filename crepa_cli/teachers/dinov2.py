"""DINOv2 (arXiv 2304.07193) as the frozen teacher: one feature for each patch of each frame."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from crepa_cli.alignment import TokenGrid
from crepa_cli.errors import UserError

ENCODERS = {
    f"dinov2_vit{letter}14{suffix}": f"facebook/dinov2-{registers}{size}"
    for letter, size in {"s": "small", "b": "base", "l": "large", "g": "giant"}.items()
    for suffix, registers in {"": "", "_reg": "with-registers-"}.items()
}
"""Hub ids of the encoders by name."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FRAMES_AT_ONCE = 8


def input_size(image_size: int | str, grid: TokenGrid, patch_size: int) -> tuple[int, int]:
    """Height and width of the encoder's input in pixels.

    Args:
        image_size: the side of a square input, or `"grid"` for one whose patches are the tokens of `grid`.
        grid: the student's tokens.
        patch_size: the encoder's patch in pixels.

    Raises:
        UserError: if the side is not a multiple of the patch.
    """
    if isinstance(image_size, str):
        return grid.rows * patch_size, grid.columns * patch_size
    if image_size % patch_size:
        lower = image_size // patch_size * patch_size
        raise UserError(
            f"crepa.encoder_image_size = {image_size} is not a multiple of the encoder's patch size {patch_size}; "
            f"take {lower or patch_size} or {lower + patch_size}"
        )
    return image_size, image_size


def encoder_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which an encoder runs on a device: float16 on CUDA, float32 elsewhere."""
    return torch.float16 if device.type == "cuda" else torch.float32


class Dinov2Teacher:
    """A DINOv2 encoder, with or without registers.

    Args:
        model: of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Dinov2Teacher:
        """The encoder of a local folder, in the layout of transformers.

        Args:
            folder: with its files.
            device: to run on; in float16 on a GPU, in float32 on the CPU.
        """
        model = AutoModel.from_pretrained(folder, dtype=encoder_dtype(device), use_safetensors=True)
        return cls(model.to(device))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.model.config.patch_size)

    @torch.no_grad()
    def features(self, frames: Tensor, size: tuple[int, int]) -> Tensor:
        """Final-norm patch features of frames, without class and register tokens.

        Args:
            frames: uint8 `[F, 3, H, W]`.
            size: height and width of the encoder's input in pixels; frames are resized to it.

        Returns:
            float16 `[F, rows, columns, D]` on the CPU.
        """
        return torch.cat([self._features(part, size) for part in frames.split(FRAMES_AT_ONCE)])

    def _features(self, frames: Tensor, size: tuple[int, int]) -> Tensor:
        device, dtype = self.model.device, self.model.dtype
        pixels = frames.to(device, torch.float32) / 255
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        tokens = self.model(((pixels - mean) / std).to(dtype)).last_hidden_state
        rows, columns = size[0] // self.patch_size, size[1] // self.patch_size
        features: Tensor = tokens[:, -rows * columns :].unflatten(1, (rows, columns))
        return features.half().cpu()
