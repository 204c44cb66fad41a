"""How often clips are visited in an epoch, so that those of several sources have the shares asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from crepa_cli.errors import UserError

TOLERANCE = 0.01
"""The most by which a ratio of visits may miss the ratio of weights."""
MOST_VISITS = 10**7
"""The most visits of an epoch, whose order is drawn at once."""


class Share(NamedTuple):
    """Clips, by their indices, and how often each is visited in an epoch."""

    clips: Collection[int]
    visits: int


def shares(sources: Mapping[int, int], weights: Sequence[float | None], repeats: int) -> list[Share]:
    """The clips of each source, with visits in the ratios of the weights; all clips are one share without weights.

    Args:
        sources: the source of each clip, by the clip's index.
        weights: of each source, all None for none.
        repeats: how often the clips that are drawn least are visited, at least.

    Raises:
        UserError: if the ratios are too far apart.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [Share(sources.keys(), repeats)]
    counts = Counter(sources.values())
    rates = {source: given[source] / counts[source] for source in counts}
    lowest = min(rates.values())
    visits = _nearly({source: rate / lowest for source, rate in rates.items()})
    if sum(counts[source] * visits[source] for source in counts) * repeats > MOST_VISITS:
        raise UserError(
            "data.sources: the weights are too far apart for the numbers of clips; raise the smallest weight, or leave "
            "clips of its source out"
        )
    members: dict[int, list[int]] = {source: [] for source in sorted(counts)}
    for clip, source in sources.items():
        members[source].append(clip)
    return [Share(frozenset(clips), visits[source] * repeats) for source, clips in members.items()]


def _nearly(ratios: dict[int, float]) -> dict[int, int]:
    """Whole numbers in nearly these ratios, which are 1 and more: the smallest that `TOLERANCE` allows."""
    factor = 1
    while any(abs(round(factor * ratio) / (factor * ratio) - 1) > TOLERANCE for ratio in ratios.values()):
        factor += 1
    return {source: round(factor * ratio) for source, ratio in ratios.items()}
