"""Frozen weights that stay on the host: each block's visit the device while it computes, one block copied ahead."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crepa_cli.models.host import host_buffer

ALIGNMENT = 256
"""Bytes to which the start of each parameter is rounded up, as the allocators of devices do."""


def stream(blocks: nn.ModuleList, device: torch.device) -> frozenset[nn.Parameter]:
    """Keep the frozen parameters of blocks on the host from now on; see `_StreamedBlocks`.

    Args:
        blocks: on the CPU, in the order in which they run.
        device: the device that computes.

    Returns:
        the parameters that stay on the host.

    Raises:
        UserError: if the host's memory cannot be pinned.
    """
    streamed = _StreamedBlocks(blocks, device)
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(streamed.visiting(index))
    return streamed.parameters


def place(model: nn.Module, device: torch.device, *, streamed: bool) -> None:
    """Move a model that is not trained, such as a text encoder, to the device that runs it.

    Args:
        model: on the CPU.
        device: the device that computes.
        streamed: whether its layers, which are its lists of modules of one class, stay on the host.

    Raises:
        UserError: if the host's memory cannot be pinned.
    """
    model.requires_grad_(False)
    layers = streamed_layers(model) if streamed else ()
    move(model, device, {parameter for one in layers for parameter in stream(one, device)})


def streamed_layers(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The layers that `place` streams, as lists of modules of one class."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1:
            yield child
        else:
            yield from streamed_layers(child)


def streamed_bytes(blocks: nn.ModuleList) -> int:
    """The bytes of the host that `stream` takes for the frozen parameters of blocks."""
    return sum(max((span.end for span in _spans(block)), default=0) for block in blocks)


def move(module: nn.Module, device: torch.device, staying: Collection[nn.Parameter] = ()) -> None:
    """Move the parameters and buffers of a module to a device, but for those parameters that stay where they are."""
    for parameter in module.parameters():
        if parameter not in staying:
            parameter.data = parameter.data.to(device)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


class _StreamedBlocks:
    """Shows each of several blocks its frozen parameters in one of two buffers on the device.

    A block's parameters are copied while the block before it computes: the next one's in a forward pass, the one
    before in a backward pass, which recomputes blocks from the last to the first. Autograd runs all of a block's
    backward before it recomputes the block before, so two buffers suffice. The blocks must be recomputed in the
    backward (activation checkpointing), or run without gradients.

    Args:
        blocks: on the CPU, in the order in which they run.
        device: the device that computes.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        self._blocks = [HostBlock(block, device) for block in blocks]
        size = max(block.buffer.numel() for block in self._blocks)
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in blocks[:2]]
        self._visited = self._slots[0]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            for slot in self._slots:
                slot.buffer.record_stream(self._stream)

    @property
    def parameters(self) -> frozenset[nn.Parameter]:
        """The parameters that stay on the host."""
        return frozenset(span.parameter for block in self._blocks for span in block.spans)

    def visiting(self, index: int) -> Any:
        """The hook to call before the block with this index runs."""

        def hook(_block: nn.Module, _inputs: Any) -> None:
            self._visit(index)

        return hook

    def _visit(self, index: int) -> None:
        """Have a block's parameters on the device, and start to copy those of the block that runs next."""
        slot = self._load(index)
        if slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
        if not slot.shown:
            self._blocks[index].show(slot.buffer)
            slot.shown = True
        self._visited = slot
        following = self._following(index)
        if following is not None:
            self._load(following)

    def _following(self, index: int) -> int | None:
        """The block that runs after this one; None if it is on the device already, or unknown."""
        if torch._C._current_graph_task_id() != -1:  # in a backward, as torch.utils.checkpoint asks
            return index - 1 if index else None
        if index + 1 < len(self._blocks):
            return index + 1
        # A backward pass begins with the last block; a sampler goes on with the first.
        return None if torch.is_grad_enabled() else 0

    def _load(self, index: int) -> _Slot:
        """The slot with the block's parameters, whose copy may still be under way."""
        for slot in self._slots:
            if slot.index == index:
                return slot
        slot = next((slot for slot in self._slots if slot is not self._visited), self._visited)
        if slot.index is not None and slot.shown:
            self._blocks[slot.index].show(self._blocks[slot.index].buffer)
        block = self._blocks[index]
        if self._stream is None:
            block.copy_to(slot.buffer)
        else:
            # All that has been launched so far may read what the slot holds.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                block.copy_to(slot.buffer)
                slot.copied = self._stream.record_event()
        slot.index, slot.shown = index, False
        return slot


class _Slot:
    """A buffer on the device, the index of the block in it, the event after which it is there, and whether it shows."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.index: int | None = None
        self.copied: torch.cuda.Event | None = None
        self.shown = False


class _Span(NamedTuple):
    """A parameter and its bytes within a block's buffer."""

    parameter: nn.Parameter
    start: int
    end: int


class HostBlock:
    """The frozen parameters of a block in one buffer on the host."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.spans = list(_spans(block))
        self.buffer = host_buffer(self.spans[-1].end if self.spans else 0, device)
        for span in self.spans:
            _view(self.buffer, span).copy_(span.parameter.data)
        self.show(self.buffer)

    def show(self, buffer: Tensor) -> None:
        """Let the parameters be those that a buffer holds."""
        for span in self.spans:
            span.parameter.data = _view(buffer, span)

    def copy_to(self, buffer: Tensor) -> None:
        """Copy the parameters into a buffer, on the stream of this moment."""
        size = self.buffer.numel()
        buffer[:size].copy_(self.buffer, non_blocking=True)


def _spans(block: nn.Module) -> Iterator[_Span]:
    start = 0
    for parameter in block.parameters():
        if not parameter.requires_grad:
            yield _Span(parameter, start, start + parameter.nbytes)
            start += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT


def _view(buffer: Tensor, span: _Span) -> Tensor:
    return buffer[span.start : span.end].view(span.parameter.dtype).view(span.parameter.shape)
