"""The one module that is trained: a stock transformer whose forward also returns its alignment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from crepa_cli.alignment import Alignment, Crepa, TokenGrid, layersync_loss
from crepa_cli.models.capture import HiddenStateCapture


class AlignedOutput(NamedTuple):
    """The transformer's prediction, how its hidden states align, and the loss of LayerSync: None for what is off."""

    prediction: Tensor
    alignment: Alignment | None
    layersync: Tensor | None


class BlockPair(NamedTuple):
    """A block that is aligned and the deeper one that teaches it; None if an encoder teaches."""

    student: int
    teacher: int | None = None

    def indices(self) -> set[int]:
        """The blocks whose hidden states are needed."""
        return {index for index in self if index is not None}


class AlignedTransformer(nn.Module):
    """A transformer and the alignment of its blocks.

    Hidden states never leave it, so that data parallelism, sharding, activation checkpointing, compilation and
    gradient accumulation see one ordinary module.

    Args:
        transformer: a diffusers transformer, or anything whose output has a `sample`.
        crepa: the alignment, or None for none.
        blocks: the transformer's blocks.
        pair: the block that CREPA aligns, and the block whose detached states are its features, if one is.
        layersync: the two blocks of LayerSync, or None for none.
        row_major: brings a block's hidden states `[B, T * N, H]` to `[B, T, N, H]`.

    Attributes:
        on_host: the parameters that stay on the host, whatever the device.
    """

    def __init__(
        self,
        transformer: nn.Module,
        crepa: Crepa | None,
        *,
        blocks: nn.ModuleList,
        pair: BlockPair,
        layersync: BlockPair | None = None,
        row_major: Callable[[Tensor, TokenGrid], Tensor],
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.crepa = crepa
        self.pair = pair
        self.layersync = layersync
        self.row_major = row_major
        self.on_host: frozenset[nn.Parameter] = frozenset()
        aligned = pair.indices() if crepa else set()
        self.capture = HiddenStateCapture(blocks, aligned | (layersync.indices() if layersync else set()))

    def forward(
        self,
        inputs: Mapping[str, Any],
        student_grid: TokenGrid,
        features: Tensor | None = None,
        teacher_grid: TokenGrid | None = None,
    ) -> AlignedOutput:
        """Run the transformer and compare the captured hidden states.

        Args:
            inputs: the transformer's keyword arguments.
            student_grid: where its tokens are.
            features: `[B, T', N', D]` of the encoder; None if a block is the teacher, and after alignment has ended.
            teacher_grid: the grid of the features.
        """
        with self.capture.recording() as states:
            prediction = self.transformer(**inputs).sample
        alignment = self._align(states, student_grid, features, teacher_grid)
        layersync = None
        if self.layersync is not None:
            student, teacher = (states[index] for index in self.layersync if index is not None)
            layersync = layersync_loss(student, teacher)
        return AlignedOutput(prediction, alignment, layersync)

    def _align(
        self, states: dict[int, Tensor], grid: TokenGrid, features: Tensor | None, teacher_grid: TokenGrid | None
    ) -> Alignment | None:
        if self.crepa is None:
            return None
        if self.pair.teacher is not None:
            features, teacher_grid = self.row_major(states[self.pair.teacher].detach(), grid), grid
        if features is None or teacher_grid is None:
            raise ValueError("this AlignedTransformer needs an encoder's features and their grid")
        hidden = self.row_major(states[self.pair.student], grid)
        alignment: Alignment = self.crepa(hidden, features, grid, teacher_grid)
        return alignment

    def drop_alignment(self) -> None:
        """Stop CREPA for good: no projector is left, and no hook but those of LayerSync."""
        self.crepa = None
        self.capture.keep_only(self.layersync.indices() if self.layersync else ())
