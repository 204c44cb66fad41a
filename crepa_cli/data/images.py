"""Image files from which image-to-video sampling starts, read and written."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from crepa_cli.files import write_whole


def first_frame(path: str, width: int, height: int) -> Image.Image:
    """An image file as RGB, upright, resized to cover `width` x `height` pixels and center-cropped.

    Raises:
        OSError: if the file is missing or not an image.
        DecompressionBombError: if the image has too many pixels.
    """
    with Image.open(path) as image:
        return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height), Image.Resampling.BICUBIC)


def write_frame(path: Path, frame: Tensor) -> None:
    """Write a frame, uint8 `[3, H, W]`, as a PNG, whole or not at all.

    Raises:
        UserError: if the disk is full or the folder is not writable.
    """
    content = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(content, format="png")
    write_whole(path, content.getvalue())
