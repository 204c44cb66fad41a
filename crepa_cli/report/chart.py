"""Charts, bars and pictures made of characters: pure functions from numbers to lines of text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

Points = Sequence[tuple[float, float | None]]
"""Places on the width, from 0 to 1, with a value, or None for a gap."""
DASH = 4
"""Dots from the start of one dash to the next."""


@dataclass(frozen=True)
class Signs:
    """The characters that an encoding has for drawing.

    Attributes:
        bits: of each dot of a cell, by row and column.
        cells: the character for every sum of bits.
        full: of the filled part of a bar.
        empty: of the rest of it.
        mark: below a chart, at the current step.
    """

    bits: tuple[tuple[int, ...], ...]
    cells: str
    full: str
    empty: str
    mark: str

    @property
    def dots(self) -> tuple[int, int]:
        """Dots of a cell: across and down."""
        return len(self.bits[0]), len(self.bits)


BRAILLE = Signs(
    ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80)),
    " " + "".join(chr(0x2800 + bits) for bits in range(1, 256)),
    "━",
    "─",
    "▲",
)
BLOCKS = Signs(((1,), (2,)), " ▀▄█", "█", "─", "^")
PLAIN = Signs(((1,), (2,)), " '.:", "=", "-", "^")


def signs_for(encoding: str) -> Signs:
    """The finest characters that an encoding can show."""
    return next((signs for signs in (BRAILLE, BLOCKS) if _encodes(signs, encoding)), PLAIN)


def _encodes(signs: Signs, encoding: str) -> bool:
    try:
        (signs.cells + signs.full + signs.empty + signs.mark).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


@dataclass(frozen=True)
class Line:
    """A line of a chart, from point to point."""

    points: Points
    style: str = ""
    dashed: bool = False


def spread(values: Sequence[float | None], start: float = 0.0, end: float = 1.0) -> Points:
    """Values at equal distances from `start` to `end`; a single one lies at both."""
    values = [*values, *values] if len(values) == 1 else values
    return [(start + (end - start) * index / (len(values) - 1), value) for index, value in enumerate(values)]


def level(value: float | None) -> Line:
    """A dashed line at a value, such as a threshold."""
    return Line(spread([value]), "yellow", dashed=True)


def draw_chart(
    lines: Sequence[Line],
    width: int,
    height: int,
    signs: Signs,
    *,
    steps: tuple[int, int],
    zero: bool = False,
    named: float | None = None,
    mark: float | None = None,
) -> list[Text]:
    """Draw lines into one chart; later ones lie above.

    Args:
        lines: together they have the lowest and the highest value, which are written beside the chart.
        width: in characters, with the values.
        height: in lines, with the one of steps below the chart.
        signs: to draw with.
        steps: the first and the last, which are written below the chart.
        zero: whether the chart reaches down to 0.
        named: another value that is written at its height.
        mark: a place on the width, from 0 to 1, that is marked below the chart.
    """
    values = [value for line in lines for _, value in line.points if value is not None]
    low, high = min([*values, 0.0] if zero else values, default=0.0), max(values, default=0.0)
    rows = max(1, height - 1)
    labels = _labels(low, high, named, rows, signs) if values else {}
    margin = max((len(label) + 1 for label in labels.values()), default=0)
    plot = _Plot(max(1, width - margin), rows, signs, low, high)
    for line in lines:
        plot.draw(line)
    drawn = [
        Text.assemble((f"{labels.get(row, ''):>{margin - 1}} " if margin else "", "dim"), text)
        for row, text in enumerate(plot.texts())
    ]
    below = _steps(steps, plot.width)
    if mark is not None and below[(place := round(mark * (plot.width - 1))) :][:1] == " ":
        below = below[:place] + signs.mark + below[place + 1 :]
    return [*drawn, Text(" " * margin + below, style="dim")][:height]


def _labels(low: float, high: float, named: float | None, rows: int, signs: Signs) -> dict[int, str]:
    """The values beside a chart, by row; the highest alone if there is one row."""
    if low == high:
        return {rows // 2: short(high)}
    labels = {rows - 1: short(low), 0: short(high)}
    if named is not None and low < named < high:
        down = signs.dots[1]
        labels.setdefault(round((high - named) / (high - low) * (rows * down - 1)) // down, short(named))
    return labels


def _steps(steps: tuple[int, int], width: int) -> str:
    first, last = (f"{step:,}" for step in steps)
    if first == last or len(first) + 1 + len(last) > width:
        return (last if len(last) <= width else "").rjust(width)
    return first + last.rjust(width - len(first))


def short(value: float) -> str:
    """A value with three significant digits."""
    return f"{value:.3g}"


class _Plot:
    """A grid of dots, `width` x `height` characters, between a lowest and a highest value."""

    def __init__(self, width: int, height: int, signs: Signs, low: float, high: float) -> None:
        across, down = signs.dots
        self.width, self.height, self.signs = width, height, signs
        self.columns, self.rows = width * across, height * down
        self.low, self.high = low, high
        self.cells = [[0] * width for _ in range(height)]
        self.styles = [[""] * width for _ in range(height)]

    def draw(self, line: Line) -> None:
        """Connect the points of a line; a gap leaves both of its sides unconnected."""
        dots = [None if value is None else self._dot(share, value) for share, value in line.points]
        for point in dots:
            if point is not None:
                self._set(*point, line)
        for start, end in itertools.pairwise(dots):
            if start is not None and end is not None:
                for column, row in _between(start, end):
                    self._set(column, row, line)

    def _dot(self, share: float, value: float) -> tuple[int, int]:
        height = 0.5 if self.high == self.low else (value - self.low) / (self.high - self.low)
        return round(share * (self.columns - 1)), round((1 - height) * (self.rows - 1))

    def _set(self, column: int, row: int, line: Line) -> None:
        if line.dashed and column % DASH >= DASH // 2:
            return
        across, down = self.signs.dots
        x, y = column // across, row // down
        self.cells[y][x] |= self.signs.bits[row % down][column % across]
        self.styles[y][x] = line.style

    def texts(self) -> Iterator[Text]:
        for cells, styles in zip(self.cells, self.styles, strict=True):
            text = Text()
            for style, group in itertools.groupby(zip(cells, styles, strict=True), key=lambda cell: cell[1]):
                text.append("".join(self.signs.cells[bits] for bits, _ in group), style)
            yield text


def _between(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The dots of a straight line, with a dot in every row it passes."""
    (x, y), (to_x, to_y) = start, end
    count = max(abs(to_x - x), abs(to_y - y))
    for index in range(1, count):
        yield x + round((to_x - x) * index / count), y + round((to_y - y) * index / count)


def draw_bar(share: float, width: int, signs: Signs) -> str:
    """Draw a bar from 0 to 1, filled up to a share."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return signs.full * filled + signs.empty * (width - filled)


def beside(blocks: Sequence[tuple[Sequence[Text], int]]) -> list[Text]:
    """Put blocks of lines next to each other, each as wide as given, with a space between them."""
    height = max((len(lines) for lines, _ in blocks), default=0)
    rows = []
    for row in range(height):
        text = Text()
        for index, (lines, width) in enumerate(blocks):
            cell = lines[row].copy() if row < len(lines) else Text()
            cell.truncate(width, pad=True)
            text.append(" " if index else "").append_text(cell)
        rows.append(text)
    return rows


def widths(total: int, count: int) -> list[int]:
    """The widths of `count` blocks that fill a line with a space between them; the last ones get what is over."""
    free = total - (count - 1)
    return [max(1, (free + index) // count) for index in range(count)]


def fitting(width: int, *texts: str) -> str:
    """The first text that fits into a width; empty if none does."""
    return next((text for text in texts if len(text) <= width), "")


def packed(parts: Iterable[str], width: int, height: int) -> list[str]:
    """Put parts into at most `height` lines, the first that fits; parts without room are left out whole."""
    lines: list[str] = []
    for part in parts:
        index = next((i for i, line in enumerate(lines) if len(line) + 3 + len(part) <= width), None)
        if index is not None:
            lines[index] += f"   {part}"
        elif len(lines) < height and len(part) <= width:
            lines.append(part)
    return lines
