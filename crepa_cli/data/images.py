"""Image files from which image-to-video sampling starts."""

from __future__ import annotations

from PIL import Image, ImageOps


def first_frame(path: str, width: int, height: int) -> Image.Image:
    """An image file as RGB, upright, resized to cover `width` x `height` pixels and center-cropped.

    Raises:
        OSError: if the file is missing or not an image.
        DecompressionBombError: if the image has too many pixels.
    """
    with Image.open(path) as image:
        return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height), Image.Resampling.BICUBIC)
