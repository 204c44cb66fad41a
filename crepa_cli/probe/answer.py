"""What `crepa probe-blocks` answers: facts of the configuration, the default, and what a measurement adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crepa_cli.models.family import Family
from crepa_cli.probe.measure import Measurement
from crepa_cli.probe.recommend import Choice, default_choice


@dataclass(frozen=True)
class Answer:
    """Facts of a checkpoint's blocks, the default block, and what was measured.

    Attributes:
        family, task, checkpoint: what was asked about.
        blocks: their number; `crepa.block_index` is one of 0 to blocks - 1.
        hidden_size: width of the hidden states.
        parameters_per_block: of one block.
        default: the family's block.
        configured: the block of the settings, which is the default where they name none.
        measurement, recommended: None where nothing was measured.
    """

    family: str
    task: str
    checkpoint: str
    blocks: int
    hidden_size: int
    parameters_per_block: int
    default: Choice
    configured: int | None
    measurement: Measurement | None = None
    recommended: Choice | None = None

    def to_json(self) -> dict[str, Any]:
        """The answer as JSON values; a figure that does not exist is null."""
        return {
            "family": self.family,
            "task": self.task,
            "checkpoint": self.checkpoint,
            "blocks": self.blocks,
            "hidden_size": self.hidden_size,
            "parameters_per_block": self.parameters_per_block,
            "block_index_range": [0, self.blocks - 1],
            "configured_block": self.configured,
            "default": self.default._asdict(),
            "recommended": self.recommended._asdict() if self.recommended else None,
            "measurement": _measured(self.measurement) if self.measurement else None,
        }


def describe(family: Family, configured: int | None) -> Answer:
    """What the configuration alone says; nothing of the size of the weights is allocated."""
    with torch.device("meta"):
        blocks = family.blocks(family.empty_transformer(torch.bfloat16))
    return Answer(
        family=family.name,
        task=family.task,
        checkpoint=family.base.name,
        blocks=family.block_count,
        hidden_size=family.hidden_size,
        parameters_per_block=sum(parameter.numel() for parameter in blocks[0].parameters()),
        default=default_choice(family),
        configured=configured,
    )


def _measured(measurement: Measurement) -> dict[str, Any]:
    projector = measurement.projector
    columns = {
        "projector_cosine": projector.cosines.mean(0) if projector else None,
        "cknna": measurement.cknna,
        "cka": measurement.cka,
        "drift": measurement.drift,
    }
    return {
        "clips": measurement.clips,
        "sigmas": measurement.sigmas,
        "constant_cosine": float(projector.constant.mean()) if projector else None,
        "blocks": [
            {"block": block} | {name: _row(values, block) for name, values in columns.items()}
            for block in range(len(measurement.cknna))
        ],
    }


def _row(values: Tensor | None, block: int) -> list[float | None] | None:
    """A block's value at each noise level."""
    if values is None:
        return None
    return [float(value) if value.isfinite() else None for value in values[block]]
