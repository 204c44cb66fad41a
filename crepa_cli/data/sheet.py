"""Contact sheets of frames, which show flicker and drift of a video at a glance."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from crepa_cli.files import write_whole

COLUMNS = 8
LARGEST = (320, 320)


def frame_row(frames: Tensor) -> Image.Image:
    """A picture of up to `COLUMNS` frames of a video side by side, evenly spaced from first to last.

    Args:
        frames: uint8 [F, 3, H, W] on any device.
    """
    columns = min(COLUMNS, len(frames))
    indices = [column * (len(frames) - 1) // max(1, columns - 1) for column in range(columns)]
    pictures = [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in frames[indices]]
    for picture in pictures:
        picture.thumbnail(LARGEST)
    width, height = pictures[0].size
    row = Image.new("RGB", (width * columns, height))
    for column, picture in enumerate(pictures):
        row.paste(picture, (width * column, 0))
    return row


def write_sheet(path: Path, rows: Sequence[Image.Image]) -> None:
    """Write rows of frames, one below another, as a PNG; the file appears completely or not at all.

    Raises:
        UserError: if the disk is full or the folder is not writable.
    """
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    content = io.BytesIO()
    sheet.save(content, format="png")
    write_whole(path, content.getvalue())
