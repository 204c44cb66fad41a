"""Bilinear interpolation of tokens between two grids, by index tensors that are copied to the device once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crepa_cli.alignment.grid import Taps, TokenGrid, interpolation_taps


class Constants:
    """Small tensors of a plan, each copied to the device once: a copy makes the CPU wait for the GPU.

    Args:
        device: of the tensors.
        dtype: of those that are not indices.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._kept: dict[tuple[torch.dtype, tuple[float, ...]], Tensor] = {}

    def indices(self, positions: Sequence[int]) -> Tensor:
        """Positions along an axis, as `[n]` integers."""
        return self._tensor(tuple(positions), torch.int64)

    def fractions(self, values: Sequence[float]) -> Tensor:
        """Weights between two positions, as `[n]`."""
        return self._tensor(tuple(values), self.dtype)

    def _tensor(self, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        key = dtype, values
        if key not in self._kept:
            self._kept[key] = torch.tensor(values, device=self.device, dtype=dtype)
        return self._kept[key]


class Resampling(NamedTuple):
    """Bilinear interpolation from a grid to the comparison grid; without a target, the mean over all patches."""

    source: TokenGrid
    target: TokenGrid | None
    constants: Constants

    @property
    def rows(self) -> int:
        """Rows of the result."""
        return self.target.rows if self.target else 1

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.target.columns if self.target else 1

    def window(self, rows: slice) -> slice:
        """The source rows from which these rows of the result are computed."""
        if self.target is None:
            return slice(0, self.source.rows)
        taps = interpolation_taps(rows, self.source.rows, self.rows)
        return slice(taps.lower[0], taps.upper[-1] + 1)

    def __call__(self, values: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """`[T, source rows of the window, source columns, C]` to `[T, rows * columns, C]` in `dtype`."""
        if self.target is None:
            return values.to(dtype).mean((1, 2))[:, None]
        if self.source.rows == self.rows:
            return self._along_columns(values, dtype).flatten(1, 2)
        taps, start = interpolation_taps(rows, self.source.rows, self.rows), self.window(rows).start
        if self.source.rows < self.rows:
            values = self._interpolate(values, taps.renumbered(range(start, start + values.shape[1])), 1, dtype)
            return self._along_columns(values, dtype).flatten(1, 2)
        # A coarser grid reads only two source rows for each of its own: the others are not even converted.
        needed = sorted({*taps.lower, *taps.upper})
        values = self._along_columns(self._select(values, 1, [row - start for row in needed]), dtype)
        return self._interpolate(values, taps.renumbered(needed), 1, dtype).flatten(1, 2)

    def _along_columns(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if self.source.columns == self.columns:
            return values.to(dtype)
        taps = interpolation_taps(slice(0, self.columns), self.source.columns, self.columns)
        return self._interpolate(values, taps, 2, dtype)

    def _interpolate(self, values: Tensor, taps: Taps, axis: int, dtype: torch.dtype) -> Tensor:
        lower, upper = (self._select(values, axis, positions).to(dtype) for positions in (taps.lower, taps.upper))
        fraction = self.constants.fractions(taps.fraction)
        return torch.lerp(lower, upper, fraction.view([-1 if at == axis else 1 for at in range(values.ndim)]))

    def _select(self, values: Tensor, axis: int, positions: list[int]) -> Tensor:
        return values.index_select(axis, self.constants.indices(positions))
