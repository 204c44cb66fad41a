"""Image files: clips of one frame, and the frames from which image-to-video sampling starts."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from crepa_cli.data.clips import IMAGE_SUFFIXES, ClipError
from crepa_cli.data.video import MAX_PIXELS, VideoInfo, check_aspect
from crepa_cli.files import write_whole

FORMATS = ("PNG", "JPEG", "WEBP")
"""The content, not the name, selects the reader, and readers of other formats start other programs."""
BACKGROUND = "white"
TOO_LARGE = f"has more than {MAX_PIXELS:,} pixels"
# https://developers.google.com/speed/webp/docs/riff_container
WEBP_HEADER = 21
ANIMATED = 2


def is_image(path: Path) -> bool:
    """Whether a clip's file is an image by its name; a WebP is one unless it is animated."""
    suffix = path.suffix.lower()
    if suffix != ".webp":
        return suffix in IMAGE_SUFFIXES
    try:
        with path.open("rb") as file:
            header = file.read(WEBP_HEADER)
    except OSError:
        return False
    return not (header[12:16] == b"VP8X" and len(header) == WEBP_HEADER and header[-1] & ANIMATED)


def probe_image(path: Path) -> VideoInfo:
    """Measure an image by decoding all of it.

    Raises:
        ClipError: if the file is unreadable, damaged or too large.
    """
    with _opened(path) as image:
        width, height = _upright(image).size
    return VideoInfo(1, width, height, fps=0.0, duration=0.0, rounding=0.0, hdr="", interlaced=False, image=True)


def image_pixels(path: Path, width: int, height: int) -> Tensor:
    """An image as a clip of one frame, upright, resized to cover `width` x `height` pixels and center-cropped.

    Transparent parts become white.

    Returns:
        uint8 [1, 3, height, width], RGB from 0 to 255.

    Raises:
        ClipError: if the file is unreadable, damaged or too large.
    """
    with _opened(path) as image:
        picture = _fitted(image, width, height)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, height, width, 3).permute(0, 3, 1, 2).contiguous()


def first_frame(path: str, width: int, height: int) -> Image.Image:
    """An image file as RGB, upright, resized to cover `width` x `height` pixels and center-cropped.

    Raises:
        OSError: if the file is missing or not an image.
        DecompressionBombError: if the image has too many pixels.
    """
    with Image.open(path) as image:
        return _fitted(image, width, height)


def write_frame(path: Path, frame: Tensor) -> None:
    """Write a frame, uint8 `[3, H, W]`, as a PNG, whole or not at all.

    Raises:
        UserError: if the disk is full or the folder is not writable.
    """
    content = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(content, format="png")
    write_whole(path, content.getvalue())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file that is to be decoded inside the block; the errors of decoders become ClipErrors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ClipError(TOO_LARGE)
                check_aspect(*image.size)
                yield image
    except ClipError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ClipError(TOO_LARGE) from error
    except UnidentifiedImageError as error:
        raise ClipError("is not an image that can be read here, or is damaged at its beginning") from error
    except Exception as error:  # decoders of damaged content raise errors of many kinds
        reason = error.strerror if isinstance(error, OSError) else None
        raise ClipError(f"cannot be read: {reason}" if reason else f"is damaged or cut off: {error}") from error


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    return ImageOps.fit(_upright(image), (width, height), Image.Resampling.BICUBIC)


def _upright(image: Image.Image) -> Image.Image:
    """The image as RGB, turned as its EXIF data say, on a white background."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # Pillow would cut 16 bits of gray at 255.
        upright = upright.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, BACKGROUND), upright)
    return upright.convert("RGB")
