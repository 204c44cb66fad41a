"""Curves and gauges made of characters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

BARS = " ▁▂▃▄▅▆▇█"
BUCKETS = 512


class Curve:
    """The values of a run so far, averaged into at most `BUCKETS` buckets, however long the run is."""

    def __init__(self) -> None:
        self.steps = 0
        self.steps_per_bucket = 1
        self.buckets: list[tuple[float, int]] = []
        """The sum and the number of the values in each bucket."""

    def add(self, value: float | None) -> None:
        """Add the value of the next step, or None if it has none."""
        if self.steps == BUCKETS * self.steps_per_bucket:
            self.buckets = [
                (a + b, m + n) for (a, m), (b, n) in zip(self.buckets[::2], self.buckets[1::2], strict=True)
            ]
            self.steps_per_bucket *= 2
        if self.steps % self.steps_per_bucket == 0:
            self.buckets.append((0.0, 0))
        if value is not None:
            total, count = self.buckets[-1]
            self.buckets[-1] = total + value, count + 1
        self.steps += 1

    def columns(self, width: int) -> list[float | None]:
        """The mean of each of at most `width` stretches of the run; None for a stretch without values."""
        buckets = self.buckets
        width = min(width, len(buckets))
        edges = [index * len(buckets) // width for index in range(width + 1)] if width > 0 else []
        return [_mean(buckets[a:b]) for a, b in itertools.pairwise(edges)]


def _mean(buckets: Sequence[tuple[float, int]]) -> float | None:
    count = sum(count for _, count in buckets)
    return sum(total for total, _ in buckets) / count if count else None


def draw_bars(columns: Sequence[float | None], height: int, low: float, high: float) -> list[str]:
    """Draw a bar for each column, in `height` lines from top to bottom; the lowest value is a thin bar."""
    top = len(BARS) - 1
    scale = (height * top - 1) / (high - low) if high > low else 0.0
    levels = [0 if value is None else 1 + round((value - low) * scale) for value in columns]
    floors = [top * row for row in reversed(range(height))]
    return ["".join(BARS[max(0, min(top, level - floor))] for level in levels) for floor in floors]


def draw_curve(curve: Curve, width: int, height: int) -> list[str]:
    """Draw a curve between its lowest and its highest value."""
    columns = curve.columns(width)
    values = [value for value in columns if value is not None]
    return draw_bars(columns, height, min(values, default=0.0), max(values, default=0.0))


def draw_gauge(value: float, mark: float | None, width: int) -> str:
    """Draw a bar from 0 to 1, filled up to a value, with an optional mark."""
    filled = round(max(0.0, min(1.0, value)) * width)
    bar = "━" * filled + "─" * (width - filled)
    if mark is None:
        return bar
    place = min(width - 1, round(mark * width))
    return f"{bar[:place]}┃{bar[place + 1 :]}"
