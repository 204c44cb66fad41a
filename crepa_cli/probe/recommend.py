"""Which block to align: the default with its reason, and the one that a measurement recommends."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

from torch import Tensor

from crepa_cli.models.family import Family
from crepa_cli.probe.measure import Measurement

TOLERANCE = 0.1
"""Of what the best block adds to the mean feature; a block that adds less by no more than that is as good."""
LEAST_GAIN = 0.01
"""Of the cosine: what the best block has to add to the mean feature for the blocks to be told apart."""


class Choice(NamedTuple):
    """A block and why it is chosen."""

    block: int
    reason: str


def default_choice(family: Family) -> Choice:
    """The family's default block, or that of a third of the depth in a checkpoint that does not have it."""
    block, blocks = cast("int", family.defaults(family.task)["crepa"]["block_index"]), family.block_count
    if block >= blocks:
        return Choice(blocks // 3, f"a third of the depth: the family's block {block} is none of these {blocks} blocks")
    return Choice(
        block,
        f"{block + 1} of {blocks} blocks, {(block + 1) / blocks:.0%} of the depth. Early blocks encode the noisy clip, "
        "late ones decode it into a velocity. REPA (arXiv 2410.06940) trained best when aligned at a depth of 8 of 24 "
        "blocks, which leaves later ones free for detail; CREPA (arXiv 2506.09229) aligns such blocks of video models.",
    )


def recommend(measurement: Measurement, default: Choice) -> Choice:
    """The earliest block that is as good as the best.

    A block's score is what CREPA maximizes: the cosine of projected states with the features, of projectors fitted to
    other clips, averaged over noise levels. A block is as good as the best where it keeps nine tenths of what the best
    adds to predicting the mean feature, or where the difference is within one standard error over clips (the
    one-standard-error rule of Breiman et al., 1984). The earliest of these, because all later blocks build on what is
    aligned there, and more of them are left to turn it into a velocity.

    The default is kept where nothing can be told: for one clip, and where the best block adds hardly anything.
    """
    if measurement.projector is None:
        return default._replace(
            reason="the default: a projector needs other clips to be fitted to; measure two or more"
        )
    scores, constant = measurement.projector.cosines.mean(2), measurement.projector.constant
    means = scores.mean(0)
    best = int(means.argmax())
    gain = scores[:, best] - constant
    if float(gain.mean()) < max(LEAST_GAIN, 2 * _standard_error(gain)):
        return default._replace(
            reason="the default: no block predicts the features of other clips better than their mean does, "
            f"whose cosine is {constant.mean():.3f} (the best, block {best}: {means[best]:.3f})"
        )
    leads = scores[:, best : best + 1] - scores
    tolerance = TOLERANCE * float(gain.mean())
    block = next(
        block for block, lead in enumerate(leads.T) if float(lead.mean()) <= max(tolerance, _standard_error(lead))
    )
    return Choice(block, _reason(measurement, means.tolist(), block, best, default.block))


def _reason(measurement: Measurement, means: list[float], block: int, best: int, default: int) -> str:
    strongest = int(measurement.cknna.mean(1).argmax())
    reason = f"a projector fitted to other clips predicts their features with a cosine of {means[block]:.3f}"
    if block == best:
        reason += ", better than from any other block"
    else:
        reason += f"; the best, block {best}, comes to {means[best]:.3f}, and no earlier block comes as close"
    reason += f". The default, block {default}: {means[default]:.3f}. CKNNA is highest at block {strongest}."
    if block >= len(means) * 2 // 3:
        reason += " It is in the last third, which leaves few blocks to build on it: try the default too."
    return reason


def _standard_error(values: Tensor) -> float:
    """Of the mean of `[clips]`, two or more."""
    return float(values.std() / math.sqrt(len(values)))
