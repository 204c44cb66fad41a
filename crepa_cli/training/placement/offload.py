"""Hidden states that wait for the backward on the host: what activation checkpointing saves of each block."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from crepa_cli.models.host import host_buffer


class OffloadedStates:
    """Runs blocks under activation checkpointing and keeps their first argument, the hidden states, on the host.

    Hidden states leave the device while the block computes, and come back while the block after it is recomputed.
    Those of the last block stay, as the backward begins with them. Arguments that all blocks share stay too.

    Args:
        checkpointed: runs a block, `checkpointed(block, *args)`, and saves its arguments through autograd.
    """

    def __init__(self, checkpointed: Callable[..., Any]) -> None:
        self._checkpointed = checkpointed
        self._pool = _Pool()
        self._stream: torch.cuda.Stream | None = None
        self._newest: weakref.ref[_Saved] | None = None

    def __call__(self, block: nn.Module, states: Tensor, *args: Any) -> Any:
        """The output of the block."""
        # A reference to the tensor would keep it on the device for as long as autograd keeps the hook.
        storage = states.untyped_storage()._cdata

        def pack(tensor: Tensor) -> Tensor | _Saved:
            same = tensor.untyped_storage()._cdata == storage
            # Of a part of a larger tensor, nothing would be freed.
            return self._save(tensor) if same and tensor.untyped_storage().nbytes() == tensor.nbytes else tensor

        with saved_tensors_hooks(pack, _unpack):
            return self._checkpointed(block, states, *args)

    def _save(self, tensor: Tensor) -> _Saved:
        before = self._newest() if self._newest is not None else None
        if before is not None:
            before.leave()
        if self._stream is None and tensor.device.type == "cuda":
            self._stream = torch.cuda.Stream(tensor.device)
        saved = _Saved(tensor, self._pool, self._stream, before)
        self._newest = weakref.ref(saved)
        return saved


def _unpack(packed: Tensor | _Saved) -> Tensor:
    return packed.take() if isinstance(packed, _Saved) else packed


class _Saved:
    """Hidden states on the host, and on the device as long as they leave it or from when they are called back.

    Args:
        tensor: the hidden states on the device.
        pool: of buffers on the host.
        stream: that copies; None for the one that computes.
        before: the hidden states of the block before, called back by `take`.
    """

    def __init__(self, tensor: Tensor, pool: _Pool, stream: torch.cuda.Stream | None, before: _Saved | None) -> None:
        buffer = pool.take(tensor.nbytes, tensor.device)
        weakref.finalize(self, pool.give_back, buffer).atexit = False
        flat = buffer[: tensor.nbytes].view(tensor.dtype)
        self._host = flat.as_strided(tensor.shape, tensor.stride())
        self._device = tensor.device
        self._stream = stream
        self._before = before
        self._here: Tensor | None = tensor
        self._copied: torch.cuda.Event | None = None
        self._copy(self._host, tensor)

    def leave(self) -> None:
        """Free the memory on the device for what is computed from now on."""
        self._wait()
        self._here = None

    def come(self) -> None:
        """Start to copy the hidden states back, if they have left."""
        if self._here is None:
            # Allocated on the stream that computes and frees it.
            self._here = torch.empty_strided(
                self._host.shape, self._host.stride(), dtype=self._host.dtype, device=self._device
            )
            self._copy(self._here, self._host)

    def take(self) -> Tensor:
        """The hidden states on the device; those of the block before are called back."""
        self.come()
        self._wait()
        tensor, self._here = self._here, None
        if self._before is not None:
            self._before.come()
        assert tensor is not None, "it has come"
        return tensor

    def _copy(self, target: Tensor, source: Tensor) -> None:
        with torch.no_grad(), self._copying():
            target.copy_(source, non_blocking=True)
            if self._stream is not None:
                self._copied = self._stream.record_event()

    def _copying(self) -> Any:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)


class _Pool:
    """Buffers on the host, used again: pinning takes longer than copying.

    All copies are on one stream, so a buffer is written only after what was in it has been read.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int, device: torch.device) -> Tensor:
        """The smallest free buffer of at least `size` bytes, so that short captions leave the others to the clips."""
        enough = [index for index, buffer in enumerate(self._free) if buffer.numel() >= size]
        if enough:
            return self._free.pop(min(enough, key=lambda index: self._free[index].numel()))
        if self._free:  # all too small: clips have become larger
            self._free.pop()
        return host_buffer(size, device)

    def give_back(self, buffer: Tensor) -> None:
        """Let a buffer be used again."""
        self._free.append(buffer)
