"""Both experts of a model in one run: which of them each step trains, and the noise levels that it draws.

Each step draws a noise level over the whole range, and trains the expert whose range holds it. The levels of its clips
are drawn anew within that range: over all steps, they have the distribution that they have without experts.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch
from torch import Tensor

from crepa_cli.models.family import Family
from crepa_cli.profile import TrainSettings
from crepa_cli.training.flow import sample_sigmas, seeded_generator

DRAWN_TOGETHER = 1024
"""Levels that are drawn at a time, as each generator takes longer than they do."""


def expert_of_step(family: Family, train: TrainSettings, step: int) -> str:
    """The name in `family.trained` of the expert that a step trains: a pure function of the seed and the step."""
    if not family.trains_all:
        return ""
    # Only Wan has experts, and its shift does not depend on the size of the clips.
    shift = train.timestep_shift or family.timestep_shift(torch.empty(0))
    levels = _levels(train.seed, train.timestep_sampling, shift, step // DRAWN_TOGETHER)
    return expert_of_level(family, levels[step % DRAWN_TOGETHER])


def expert_of_level(family: Family, sigma: float) -> str:
    """The name in `family.trained` of the expert that denoises a level; the upper one at the boundary of two."""
    if not family.trains_all:
        return ""
    lowest = {name: one.sigma_range[0] for name, one in family.trained.items()}
    return max((name for name in lowest if lowest[name] <= sigma), key=lowest.__getitem__)


def steps_by_expert(family: Family, train: TrainSettings) -> Counter[str]:
    """How many steps of a run train each expert."""
    return Counter(expert_of_step(family, train, step) for step in range(train.steps))


def expert_sigmas(count: int, expert: Family, sampling: str, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels `[count]` of `sample_sigmas` over the whole range, without those that belong to another expert.

    `sample_sigmas` with bounds would draw as many uniform levels within any range.

    Args:
        count: how many.
        expert: its recipe; some levels of the whole range must belong to it.
        sampling: see `sample_sigmas`.
        shift: see `sample_sigmas`.
        generator: on the CPU.
    """
    low, high = expert.sigma_range
    found = torch.empty(0)
    while len(found) < count:
        drawn = sample_sigmas(DRAWN_TOGETHER, sampling, shift, generator)
        found = torch.cat([found, drawn[(drawn >= low) & ((drawn < high) | (high == 1))]])
    return found[:count]


@lru_cache
def _levels(seed: int, sampling: str, shift: float, group: int) -> list[float]:
    """The levels that choose the experts of a group of steps."""
    levels: list[float] = sample_sigmas(
        DRAWN_TOGETHER, sampling, shift, seeded_generator(seed, "expert", group)
    ).tolist()
    return levels
