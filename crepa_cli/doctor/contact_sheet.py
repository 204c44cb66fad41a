"""A contact sheet of the clips as they are trained on, with their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from crepa_cli.data.scan import PreparedClip, clip_name, clip_pixels
from crepa_cli.data.sheet import COLUMNS, LARGEST, LINE_HEIGHT, frame_row, write_line, write_sheet
from crepa_cli.data.sources import source_folder
from crepa_cli.data.stages import each
from crepa_cli.doctor.findings import Plan
from crepa_cli.doctor.looks import spread
from crepa_cli.errors import UserError, counted
from crepa_cli.events import Event, drained
from crepa_cli.profile import DataSettings

MOST = 200
LETTERS, LINES = 50, 5


def add_contact_sheet(
    plan: Plan, path: Path, clips: Sequence[PreparedClip], data: DataSettings, listen: Callable[[Event], None]
) -> None:
    """Write a contact sheet of the clips and add a check that says so; of many, an evenly spread sample is shown."""
    chosen = spread(clips, MOST)

    def write() -> int:
        _check_place(path, data)
        tiles = drained(each("contact sheet", chosen, tile, name=clip_name), listen)
        if tiles:
            write_sheet(path, [_row(tiles[first : first + COLUMNS]) for first in range(0, len(tiles), COLUMNS)])
        return len(tiles)

    shown = plan.attempt("contact sheet", write)
    if shown:
        sample = f", an evenly spread sample of {len(clips):,}" if len(chosen) < len(clips) else ""
        plan.add("contact sheet", "fine", f"{counted(shown, 'clip')} in {path}{sample}")


def tile(clip: PreparedClip) -> Image.Image:
    """The middle frame of a clip as it is trained on, with its name and its first caption below.

    Raises:
        ClipError: if it cannot be read.
    """
    picture = frame_row(clip_pixels(_middle(clip)))
    drawn = Image.new("RGB", (LARGEST[0], LARGEST[1] + LINES * LINE_HEIGHT))
    drawn.paste(picture, ((LARGEST[0] - picture.width) // 2, LARGEST[1] - picture.height))
    lines = [clip_name(clip), *textwrap.wrap(clip.clip.caption, LETTERS, max_lines=LINES - 1, placeholder=" ...")]
    for number, line in enumerate(lines):
        place = 0, LARGEST[1] + number * LINE_HEIGHT
        write_line(drawn, place, line, LARGEST[0], "white" if number else "yellow")
    return drawn


def _middle(clip: PreparedClip) -> PreparedClip:
    """The middle frame of a clip as a clip."""
    middle = clip.start + clip.bucket.frames // 2 / clip.fps
    return replace(clip, bucket=replace(clip.bucket, frames=1), start=middle)


def _row(tiles: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(one.width for one in tiles), tiles[0].height))
    for number, one in enumerate(tiles):
        row.paste(one, (number * one.width, 0))
    return row


def _check_place(path: Path, data: DataSettings) -> None:
    """Raise a UserError if the sheet would be found as a clip, or take the place of one."""
    for source in data.all_sources:
        if path.resolve().is_relative_to(source_folder(source).resolve()):
            raise UserError(
                f"--contact-sheet {path} is in the clips' folder {source_folder(source)}, in which every picture is a "
                "clip: name another folder"
            )
