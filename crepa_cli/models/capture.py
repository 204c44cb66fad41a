"""Hidden states of blocks, captured by forward hooks during one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class HiddenStateCapture:
    """Forward hooks on some of a transformer's blocks.

    The hooks record within `recording()` alone. Under activation checkpointing the backward runs the blocks, and with
    them the hooks, once more: by then recording is over, so that the states are those of the forward pass and no
    second copy is kept.

    Args:
        blocks: the transformer's blocks.
        indices: those whose hidden states are wanted.
    """

    def __init__(self, blocks: nn.ModuleList, indices: Collection[int]) -> None:
        self._states: dict[int, Tensor] | None = None
        self._handles = {index: blocks[index].register_forward_hook(self._hook(index)) for index in set(indices)}

    def _hook(self, index: int) -> Any:
        def keep(_block: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            if self._states is not None:
                self._states[index] = output if isinstance(output, Tensor) else output[0]

        return keep

    @contextmanager
    def recording(self) -> Iterator[dict[int, Tensor]]:
        """Yields the dictionary, block index to hidden states, that a forward pass inside the context fills."""
        self._states = {}
        try:
            yield self._states
        finally:
            self._states = None

    def keep_only(self, indices: Collection[int]) -> None:
        """Take the hooks off all other blocks."""
        for index in self._handles.keys() - set(indices):
            self._handles.pop(index).remove()
