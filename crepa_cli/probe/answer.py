"""The answer of `crepa probe-blocks`: facts from the configuration, the default block, and any measurement."""

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
    """Facts about a checkpoint's blocks, the default block, and the measurement, if there is one.

    Attributes:
        family, task, checkpoint: the model in question.
        blocks: number of blocks; `crepa.block_index` ranges from 0 to blocks - 1.
        hidden_size: width of the hidden states.
        parameters_per_block: number of parameters of one block.
        default: the family's default block.
        configured: the block in the settings; the default if they name none.
        measurement, recommended: None if nothing was measured.
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
        """The answer as JSON values; missing figures are null."""
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
    """The answer from the configuration alone; no weights are allocated."""
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
