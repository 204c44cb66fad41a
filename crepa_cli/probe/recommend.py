"""Which block to align: the default with its reason, and the block that a measurement recommends."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

from torch import Tensor

from crepa_cli.models.family import Family
from crepa_cli.probe.measure import Measurement

TOLERANCE = 0.1
"""Blocks within 10 % of the best gain count as equally good. The gain is over predicting the mean feature."""
LEAST_GAIN = 0.01
"""The smallest gain in cosine of the best block at which the blocks can be told apart."""


class Choice(NamedTuple):
    """A block and the reason for choosing it."""

    block: int
    reason: str


def default_choice(family: Family) -> Choice:
    """The family's default block, or the one at a third of the depth if the checkpoint has too few blocks."""
    block, blocks = cast("int", family.settings["crepa"]["block_index"]), family.block_count
    if block >= blocks:
        return Choice(
            blocks // 3,
            f"a third of the depth: this checkpoint has {blocks} blocks, and the family's default is block {block}",
        )
    return Choice(
        block,
        f"{(block + 1) / blocks:.0%} of the depth ({block + 1} of {blocks} blocks). Early blocks encode the noisy "
        "clip, late ones decode it into a velocity. REPA (arXiv 2410.06940) worked best when aligned after 8 of 24 "
        "blocks, which leaves later blocks free for detail; CREPA (arXiv 2506.09229) aligns video models at a similar "
        "depth.",
    )


def recommend(measurement: Measurement, default: Choice) -> Choice:
    """The earliest block that is as good as the best one.

    A block's score is what CREPA maximizes by default: the cosine between features and linearly projected states, with
    projectors fitted on other clips, averaged over noise levels. It ranks blocks by what they hold of the features, so
    the other objectives get the same answer. Its gain is the score minus that of predicting the mean feature. A block
    is as good as the best one if it has nine tenths of the best gain, or if the difference is within one standard error
    over clips (the one-standard-error rule of Breiman et al., 1984). The earliest such block is recommended, because
    all later blocks build on the aligned states and more of them remain to turn these into a velocity.

    The default is kept if the measurement cannot decide: with a single clip, or if even the best gain is negligible.
    """
    if measurement.projector is None:
        return default._replace(reason="the default: a projector is fitted on other clips, so measure two or more")
    scores, constant = measurement.projector.cosines.mean(2), measurement.projector.constant
    means = scores.mean(0)
    best = int(means.argmax())
    gain = scores[:, best] - constant
    if float(gain.mean()) < max(LEAST_GAIN, 2 * _standard_error(gain)):
        return default._replace(
            reason="the default: no block predicts the features of held-out clips clearly better than their mean does "
            f"(mean: cosine {constant.mean():.3f}; best block, {best}: {means[best]:.3f})"
        )
    leads = scores[:, best : best + 1] - scores
    tolerance = TOLERANCE * float(gain.mean())
    block = next(
        block for block, lead in enumerate(leads.T) if float(lead.mean()) <= max(tolerance, _standard_error(lead))
    )
    return Choice(block, _reason(measurement, means.tolist(), block, best, default.block))


def _reason(measurement: Measurement, means: list[float], block: int, best: int, default: int) -> str:
    strongest = int(measurement.cknna.mean(1).argmax())
    reason = f"a linear projector predicts the features of held-out clips with a cosine of {means[block]:.3f}"
    if block == best:
        reason += ", more than from any other block"
    else:
        reason += f"; the best block, {best}, has {means[best]:.3f}, and no earlier block comes as close"
    reason += f". The default, block {default}, has {means[default]:.3f}. CKNNA is highest at block {strongest}."
    if block >= len(means) * 2 // 3:
        reason += " The block is in the last third, which leaves few blocks to build on it: try the default too."
    return reason


def _standard_error(values: Tensor) -> float:
    """The standard error of the mean of `[clips]`, two or more."""
    return float(values.std() / math.sqrt(len(values)))
