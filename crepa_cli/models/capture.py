"""Hidden states of blocks, captured by forward hooks during one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class HiddenStateCapture:
    """Forward hooks on some of a transformer's blocks.

    The hooks listen within `recording()` and `watching()` alone. Under activation checkpointing the backward runs the
    blocks, and with them the hooks, once more: by then that is over, so that the states are those of the forward pass
    and no second copy is kept.

    Args:
        blocks: the transformer's blocks.
        indices: those whose hidden states are wanted.
    """

    def __init__(self, blocks: nn.ModuleList, indices: Collection[int]) -> None:
        self._listener: Callable[[int, Tensor], None] | None = None
        self._handles = {index: blocks[index].register_forward_hook(self._hook(index)) for index in set(indices)}

    def _hook(self, index: int) -> Any:
        def hook(_block: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            if self._listener is not None:
                self._listener(index, output if isinstance(output, Tensor) else output[0])

        return hook

    @contextmanager
    def recording(self) -> Iterator[dict[int, Tensor]]:
        """Yields the dictionary, block index to hidden states, that a forward pass inside the context fills."""
        states: dict[int, Tensor] = {}
        with self.watching(states.__setitem__):
            yield states

    @contextmanager
    def watching(self, listener: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Hand each block's index and hidden states to `listener` during a forward pass, and keep none of them."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def keep_only(self, indices: Collection[int]) -> None:
        """Take the hooks off all other blocks."""
        for index in self._handles.keys() - set(indices):
            self._handles.pop(index).remove()
