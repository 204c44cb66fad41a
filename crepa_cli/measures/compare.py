"""Differences between the videos of two models for the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from crepa_cli.measures.video import Measures

RESAMPLES = 10_000
CONFIDENCE = 0.95
FEWEST_PROMPTS = 5
"""With fewer, chance alone gives all differences the same sign in more than one of ten comparisons."""
WASHED_OUT = 0.55
"""Half of the base's color, and a margin for compression."""
COLORLESS = 0.01
"""A base with less has no color or contrast to lose."""


@dataclass(frozen=True)
class Difference:
    """A measure with a base and a trained model, over the same prompts.

    Attributes:
        base: mean over the prompts.
        trained: mean over the prompts.
        mean: of the differences, trained minus base.
        low: lower end of the 95 % bootstrap interval of `mean`.
        high: its upper end.
        prompts: their number.
    """

    base: float
    trained: float
    mean: float
    low: float
    high: float
    prompts: int

    @property
    def verdict(self) -> str:
        """`higher` or `lower` than the base, `no difference seen`, or `too few prompts to tell`."""
        if self.low <= 0 <= self.high:
            return "no difference seen"
        if self.prompts < FEWEST_PROMPTS:
            return "too few prompts to tell"
        return "higher" if self.mean > 0 else "lower"


def compare(base: Sequence[Measures], trained: Sequence[Measures]) -> dict[str, Difference]:
    """The differences in every measure that all videos have, by its name.

    Intervals are those of the percentile bootstrap over prompts, the same in every call.

    Args:
        base: a video for each prompt.
        trained: the videos for the same prompts, in the same order.

    Raises:
        ValueError: if there are no videos, or not as many on both sides.
    """
    if not base or len(base) != len(trained):
        raise ValueError(f"{len(base)} videos of the base cannot be compared with {len(trained)} others")
    before, after = ([video.values for video in videos] for videos in (base, trained))
    names = [name for name in before[0] if all(name in values for values in before + after)]
    return {name: _difference([v[name] for v in before], [v[name] for v in after]) for name in names}


def washed_out(base: Measures, trained: Measures) -> list[str]:
    """Which of saturation and contrast a video has lost half of, compared with the base's video for the same prompt."""
    before, after = base.values, trained.values
    names = ("saturation", "contrast")
    return [name for name in names if before[name] > COLORLESS and after[name] <= WASHED_OUT * before[name]]


def _difference(base: list[float], trained: list[float]) -> Difference:
    before, after = (torch.tensor(values, dtype=torch.float64) for values in (base, trained))
    differences = after - before
    chosen = torch.randint(len(differences), (RESAMPLES, len(differences)), generator=torch.Generator().manual_seed(0))
    tail = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = differences[chosen].mean(1).quantile(tail).tolist()
    return Difference(float(before.mean()), float(after.mean()), float(differences.mean()), low, high, len(differences))
