"""Memory of the host that copies to and from the device use; the prediction of memory tells it apart."""

from __future__ import annotations

import weakref
from contextvars import ContextVar

import torch
from torch import Tensor

from crepa_cli.errors import UserError

PORTABLE = 1
"""The flag `cudaHostRegisterPortable`: pinned for every device of the process."""
_allocates = ContextVar("_allocates", default=False)


def allocates_on_host() -> bool:
    """Whether the tensor that is just being created is a host buffer."""
    return _allocates.get()


def host_buffer(size: int, device: torch.device) -> Tensor:
    """A buffer on the host, uint8 `[size]`, without content; pinned if the device is a GPU of CUDA or ROCm.

    Every buffer of the placement comes from here.

    Raises:
        UserError: if the memory cannot be pinned.
    """
    token = _allocates.set(True)
    try:
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
    finally:
        _allocates.reset(token)
    if device.type == "cuda" and size:
        _pin(buffer)
    return buffer


def _pin(buffer: Tensor) -> None:
    # Not pin_memory(): its allocator rounds up to a power of two, which would waste a third of the host's memory.
    storage = buffer.untyped_storage()
    if int(torch.cuda.cudart().cudaHostRegister(storage.data_ptr(), storage.nbytes(), PORTABLE)):
        raise UserError(
            f"{storage.nbytes() / 1e9:.1f} GB of the host's memory cannot be pinned: free some of it, or turn off "
            "memory.stream_weights, memory.offload_idle_expert and memory.offload_activations"
        )
    weakref.finalize(storage, _unpin, storage.data_ptr()).atexit = False


def _unpin(address: int) -> None:
    torch.cuda.synchronize()  # a copy may be under way
    torch.cuda.cudart().cudaHostUnregister(address)
