"""Image files that image to video starts from."""

from __future__ import annotations

from PIL import Image, ImageOps


def first_frame(path: str, width: int, height: int) -> Image.Image:
    """An image file in RGB and upright, resized to cover `width` x `height` pixels and cropped around its center.

    Raises:
        OSError: the file is missing or not an image.
        DecompressionBombError: the image has too many pixels.
    """
    with Image.open(path) as image:
        return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height), Image.Resampling.BICUBIC)
