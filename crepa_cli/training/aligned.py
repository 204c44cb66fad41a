"""The one module that is trained: a stock transformer whose forward also returns its alignment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from crepa_cli.alignment import Alignment, Crepa, TokenGrid
from crepa_cli.models.capture import HiddenStateCapture


class AlignedOutput(NamedTuple):
    """The transformer's prediction and, unless alignment was dropped, how its hidden states align."""

    prediction: Tensor
    alignment: Alignment | None


class AlignedTransformer(nn.Module):
    """A transformer and the alignment of one of its blocks.

    Hidden states never leave it, so that data parallelism, sharding, activation checkpointing, compilation and
    gradient accumulation see one ordinary module.

    Args:
        transformer: a diffusers transformer, or anything that takes keyword arguments and returns a tuple.
        crepa: the alignment, or None for none.
        blocks: the transformer's blocks.
        student_block: index of the block that is aligned.
        teacher_block: index of the block whose detached hidden states are the features, where no encoder gives them.
        row_major: brings a block's hidden states `[B, T * N, H]` to `[B, T, N, H]`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        crepa: Crepa | None,
        *,
        blocks: nn.ModuleList,
        student_block: int,
        teacher_block: int | None = None,
        row_major: Callable[[Tensor, TokenGrid], Tensor],
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.crepa = crepa
        self.student_block = student_block
        self.teacher_block = teacher_block
        self.row_major = row_major
        captured = {student_block, *([] if teacher_block is None else [teacher_block])}
        self.capture = HiddenStateCapture(blocks, captured if crepa else ())

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
            features: `[B, T', N', D]` of the encoder; None where a block is the teacher, and after alignment.
            teacher_grid: where the features are.
        """
        with self.capture.recording() as states:
            prediction = self.transformer(**inputs, return_dict=False)[0]
        if self.crepa is None:
            return AlignedOutput(prediction, None)
        hidden = self.row_major(states[self.student_block], student_grid)
        if self.teacher_block is not None:
            features = self.row_major(states[self.teacher_block].detach(), student_grid)
            teacher_grid = student_grid
        if features is None or teacher_grid is None:
            raise ValueError("this AlignedTransformer needs an encoder's features and their grid")
        return AlignedOutput(prediction, self.crepa(hidden, features, student_grid, teacher_grid))

    def drop_alignment(self) -> None:
        """Stop aligning for good: no hook and no projector is left."""
        self.capture.remove()
        self.crepa = None
