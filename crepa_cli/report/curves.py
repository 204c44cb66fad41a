"""Curves that stay small, however long the run is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
