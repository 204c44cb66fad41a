"""A strip of frames in the terminal: the newest validation video below that of the first validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console
from rich.panel import Panel
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from crepa_cli.data.clips import ClipError
from crepa_cli.data.video import decode, probe
from crepa_cli.errors import UserError
from crepa_cli.events import ValidationSampled
from crepa_cli.profile.files import parse_toml, read_text
from crepa_cli.report.chart import PLAIN, Signs
from crepa_cli.report.panels import BORDER, MARGIN, TITLE_MARGIN
from crepa_cli.report.plain import one_line
from crepa_cli.runs.folder import RunFolder

PIXEL_PAIR = "▀"
"""The upper pixel of a cell has the color of the character, the lower one that of its background."""
MOST_FRAMES, HEIGHT = 16, 48
"""Frames of a video that are kept, and their height in pixels."""
FEWEST_FRAMES, LEAST_LINES = 4, 3


@dataclass(frozen=True)
class Strip:
    """Small frames of a validation video from its first to its last, uint8 `[F, 3, H, W]`."""

    step: int
    frames: Tensor


class Strips:
    """The strips of a run, whose videos are read once for each validation."""

    def __init__(self) -> None:
        self.shown: list[ValidationSampled] = []
        self.strips: list[Strip] = []
        self.prompt = ""
        self.drawn: tuple[tuple[int, int], tuple[Segments, int] | None] | None = None
        """The size, and what was drawn for it."""

    def panel(self, run: Path, sampled: Sequence[ValidationSampled], width: int, height: int) -> Panel | None:
        """The strips of the first and the newest validation in a panel; None if there are none, or no room.

        Args:
            run: its folder.
            sampled: its validations, the oldest first.
            width: of the panel.
            height: the most lines of the panel; `Panel.height` says how many it takes.
        """
        shown = [sampled[0], sampled[-1]] if len(sampled) > 1 else list(sampled)
        if shown != self.shown:
            self.shown, self.drawn = shown, None
            self.strips = [strip for event in shown if (strip := read_strip(event)) is not None]
            self.prompt = _prompt(run, shown[-1])
        size = width - MARGIN, height - BORDER
        if self.drawn is None or self.drawn[0] != size:
            self.drawn = size, draw_strips(self.strips, *size)
        if self.drawn[1] is None:
            return None
        segments, lines = self.drawn[1]
        title = Text(shortened(f"validation video: {self.prompt}", width - TITLE_MARGIN))
        return Panel(segments, title=title, title_align="left", border_style="dim", height=lines + BORDER)


def shows_pixels(console: Console, signs: Signs) -> bool:
    """Whether a terminal has the characters and the colors for pictures."""
    return signs is not PLAIN and console.color_system in {"256", "truecolor"} and not console.no_color


def read_strip(event: ValidationSampled) -> Strip | None:
    """The frames of the first video of a validation; None if it cannot be read."""
    with suppress(ClipError, IndexError):
        path = event.paths[0]
        info = probe(path)
        frames = min(MOST_FRAMES, info.frames)
        fps = info.fps * (frames - 1) / (info.frames - 1) if frames > 1 else info.fps
        width = max(1, round(HEIGHT * info.width / info.height))
        return Strip(event.step, decode(path, frames=frames, fps=fps, width=width, height=HEIGHT))
    return None


def draw_strips(strips: Sequence[Strip], width: int, height: int) -> tuple[Segments, int] | None:
    """Strips one below another, each after its step, and the number of their lines; None if two do not fit."""
    labels = [f"step {strip.step:,} " for strip in strips]
    margin = max(map(len, labels), default=0)
    for lines in range(height // 2 if strips else 0, LEAST_LINES - 1, -1):
        count, *_, across = strips[-1].frames.shape
        across = max(1, round(2 * lines * across / HEIGHT))
        fitting = min(count, (width - margin + 1) // (across + 1))
        if fitting >= min(count, FEWEST_FRAMES):
            drawn: list[Segment] = []
            for label, strip in zip(labels, strips, strict=True):
                for row, pixels in enumerate(_rows(strip.frames, fitting, 2 * lines, across)):
                    text = (label if row == 0 else "").ljust(margin)
                    drawn += [Segment(text, Style(dim=True)), *pixels, Segment.line()]
            return Segments(drawn[:-1]), lines * len(strips)
    return None


def _rows(frames: Tensor, count: int, height: int, width: int) -> Iterator[list[Segment]]:
    """The lines of `count` frames side by side, evenly spaced from first to last."""
    chosen = [number * (len(frames) - 1) // max(1, count - 1) for number in range(count)]
    pixels = F.adaptive_avg_pool2d(frames[chosen].float(), (height, width)).round().byte()
    # [rows, upper and lower, frames, columns, colors]
    cells = pixels.permute(2, 0, 3, 1).unflatten(0, (-1, 2)).tolist()
    for upper, lower in cells:
        line: list[Segment] = []
        for above, below in zip(upper, lower, strict=True):
            line.append(Segment(" "))
            line += [Segment(PIXEL_PAIR, _style(*pair)) for pair in zip(above, below, strict=True)]
        yield line[1:]


def _style(upper: Sequence[int], lower: Sequence[int]) -> Style:
    return Style.from_color(Color.from_rgb(*upper), Color.from_rgb(*lower))


def _prompt(run: Path, event: ValidationSampled) -> str:
    """The prompt of the first video of a validation; empty if the settings of the run do not tell."""
    path = RunFolder(run).profile
    try:
        settings = parse_toml(read_text(path, str(path)), str(path))
        return str(settings["validation"]["prompts"][int(event.paths[0].stem)])  # type: ignore[index]
    except (UserError, KeyError, TypeError, ValueError, IndexError):
        return ""


def shortened(text: str, width: int) -> str:
    """A text on one line, at most so many cells wide."""
    line = one_line(text)
    return line if cell_len(line) <= width else f"{set_cell_size(line, max(0, width - 3)).rstrip()}..."
