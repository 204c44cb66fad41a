"""The arms of the controlled experiment: runs that share everything but the settings named here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor

from crepa_cli.alignment import Alignment, Crepa, TokenGrid
from crepa_cli.profile.conversion import mean_weight

Tables = Mapping[str, Mapping[str, object]]
LAMBDA = 0.5
WEIGHT = mean_weight(frames=5, distance=1, tau=1.0, cumulative=False)
"""The sum of the weights of a frame and its neighbors in the default."""
BASE = "none"
"""The arm that the others are compared with."""
DEFAULT = "adjacent"
"""The arm that the variations vary."""


class Arm(NamedTuple):
    """What one arm does.

    Attributes:
        label: in words.
        settings: that differ from the default's.
        scrambled: whether features are resampled along the row of all tokens.
    """

    label: str
    settings: Tables
    scrambled: bool = False


ARMS = {
    BASE: Arm("no alignment", {"crepa": {"enabled": False}}),
    "frame": Arm("per frame", {"crepa": {"adjacent_distance": 0}}),
    DEFAULT: Arm("adjacent frames (default)", {}),
    "cumulative": Arm("cumulative to distance 2", {"crepa": {"adjacent_distance": 2, "cumulative_neighbors": True}}),
    "backbone": Arm("a deeper block (LayerSync)", {"crepa": {"enabled": False}, "layersync": {"enabled": True}}),
    "scrambled": Arm("default, positions scrambled", {}, scrambled=True),
    "relation": Arm("relation loss", {"crepa": {"objective": "relation"}}),
    "irepa": Arm("convolution, spatial norm", {"crepa": {"projector": "conv", "spatial_norm": 0.6}}),
    "lambda": Arm("default, lambda x 4", {"crepa": {"lambda": 4 * LAMBDA}}),
    "mean": Arm("default, mean of neighbors", {"crepa": {"lambda": LAMBDA / WEIGHT}}),
    "cutoff": Arm("default, cutoff at 40 %", {"crepa": {"cutoff_step": "40%"}}),
    "tau": Arm("default, tau = 4", {"crepa": {"adjacent_tau": 4.0}}),
}
"""The arms by name. The last four vary what might wash colors out, one thing each."""


@contextmanager
def scrambled_positions() -> Iterator[None]:
    """Within this context features come to the student's tokens by linear interpolation along all tokens of a frame.

    Trainers that do not know the two grids do this. Unless both have equally many columns, a patch meets features of
    other columns.
    """
    forward = Crepa.forward

    def resampled(
        crepa: Crepa, hidden: Tensor, features: Tensor, student_grid: TokenGrid, teacher_grid: TokenGrid
    ) -> Alignment:
        rows = features.float().flatten(0, 1).mT
        rows = F.interpolate(rows, size=student_grid.tokens, mode="linear", align_corners=False)
        grid = TokenGrid(teacher_grid.frames, student_grid.rows, student_grid.columns)
        return forward(crepa, hidden, rows.mT.unflatten(0, features.shape[:2]), student_grid, grid)

    with patch.object(Crepa, "forward", resampled):
        yield


def teaching(arm: Arm) -> Any:
    """The context in which an arm is trained."""
    return scrambled_positions() if arm.scrambled else nullcontext()
