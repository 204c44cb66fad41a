"""Contact sheets of frames, which show flicker and drift of a video at a glance."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from crepa_cli.files import write_whole

COLUMNS = 8
LARGEST = (320, 320)
OWN_HEIGHT = "height-without-clips"
"""The note in a sheet that says where its rows of clips begin."""
FONT_SIZE, LINE_HEIGHT = 11, 14
MARGIN = 2


def frame_row(frames: Tensor) -> Image.Image:
    """A picture of up to `COLUMNS` frames of a video side by side, evenly spaced from first to last.

    Args:
        frames: uint8 [F, 3, H, W] on any device.
    """
    pictures = [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in frames[_chosen(len(frames))]]
    for picture in pictures:
        picture.thumbnail(LARGEST)
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for column, picture in enumerate(pictures):
        row.paste(picture, (width * column, 0))
    return row


def _chosen(count: int) -> list[int]:
    """The indices of the frames of a row."""
    columns = min(COLUMNS, count)
    return [column * (count - 1) // max(1, columns - 1) for column in range(columns)]


def labeled_row(frames: Tensor, fps: float, label: str) -> Image.Image:
    """A row of frames, below a label and above the time of each.

    Args:
        frames: uint8 [F, 3, H, W] on any device.
        fps: frames per second.
        label: cut to the width of the row.
    """
    row, chosen = frame_row(frames), _chosen(len(frames))
    labeled, size = Image.new("RGB", (row.width, row.height + 2 * LINE_HEIGHT)), row.width // len(chosen)
    labeled.paste(row, (0, LINE_HEIGHT))
    write_line(labeled, (0, 0), label, row.width, "yellow")
    for column, index in enumerate(chosen):
        write_line(labeled, (column * size, LINE_HEIGHT + row.height), f"{index / fps:.2f} s", size)
    return labeled


def write_line(picture: Image.Image, place: tuple[int, int], text: str, width: int, color: str = "white") -> None:
    """Write a line of text into a picture; what is wider than `width` pixels is cut, with dots in its place."""
    font, line, room = ImageFont.load_default(FONT_SIZE), " ".join(text.split()), width - MARGIN
    if font.getlength(line) > room:
        fitting = bisect_right(range(len(line)), room, key=lambda end: math.ceil(font.getlength(f"{line[:end]}...")))
        line = f"{line[: fitting - 1]}..." if fitting else ""
    ImageDraw.Draw(picture).text((place[0] + MARGIN, place[1]), line, color, font)


def write_sheet(path: Path, rows: Sequence[Image.Image], clips: Sequence[Image.Image] = ()) -> None:
    """Write rows of frames, one below another, as a PNG; the file appears completely or not at all.

    Args:
        path: of the file.
        rows: pictures of frames.
        clips: further rows, of clips that are trained on; `without_clips` leaves them out.

    Raises:
        UserError: if the disk is full or the folder is not writable.
    """
    every = [*rows, *clips]
    sheet = Image.new("RGB", (max(row.width for row in every), sum(row.height for row in every)))
    top = 0
    for row in every:
        sheet.paste(row, (0, top))
        top += row.height
    notes = PngInfo()
    notes.add_text(OWN_HEIGHT, str(sum(row.height for row in rows)))
    content = io.BytesIO()
    sheet.save(content, format="png", pnginfo=notes)
    write_whole(path, content.getvalue())


def without_clips(path: Path) -> bytes:
    """A sheet without its rows of clips, which are not for everybody's eyes, as a PNG."""
    content = io.BytesIO()
    with Image.open(path) as sheet:
        height = int(sheet.info.get(OWN_HEIGHT, sheet.height))
        sheet.crop((0, 0, sheet.width, height)).save(content, format="png")
    return content.getvalue()
