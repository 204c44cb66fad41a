"""Live bytes of tensors, counted storage by storage: the same on every machine, unlike a process's memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crepa_cli.models.host import allocates_on_host

HOST = "host"
"""The part of buffers on the host, which take no memory of the device."""
READ_DEVICE = torch.ops.prim.device.default
LIFT = torch.ops.aten.lift_fresh.default
"""The operation through which `torch.tensor` returns its new tensor."""


class Segment(NamedTuple):
    """Bytes by part at the start of a segment of time, at its peak, and at its end."""

    start: Counter[str]
    peak: Counter[str]
    end: Counter[str]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages, real or fake, that are created within this context.

    Attributes:
        part: the part that new storages are counted under.
        live: bytes held now.
        host: bytes of host buffers held now, which count nowhere else.
        peak: the most bytes held at any time since `reset_peak`.
        peak_parts: the bytes at that time, by part.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.part = ""
        self.live = 0
        self.host = 0
        self._parts: Counter[str] = Counter()
        self._owners: dict[int, str] = {}
        self._start: Counter[str] = Counter()
        self.reset_peak()

    def reset_peak(self) -> None:
        """Measure the peak from now on."""
        self.peak = self.live
        self.peak_parts = Counter(self._parts)

    def rise(self, size: int) -> None:
        """Count bytes that are held for a moment."""
        if self.live + size > self.peak:
            self.reset_peak()
            self.peak += size
            self.peak_parts[self.part] += size

    def cut(self) -> Segment:
        """End a segment of time, return it, and begin the next; it measures the peak anew."""
        segment = Segment(self._start, self.peak_parts, Counter(self._parts))
        self.reset_peak()
        self._start = self.peak_parts
        return segment

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors under another part from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (owner := self._owners.get(storage._cdata)) is not None:
                self._parts[owner] -= storage.nbytes()
                self._parts[part] += storage.nbytes()
                self._owners[storage._cdata] = part

    @contextmanager
    def belonging_to(self, part: str) -> Iterator[None]:
        """Within this context, count new storages under `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it creates."""
        if func is READ_DEVICE:
            # Half of all calls; FakeTensorMode would give the same answer, only slower.
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        new = {tensor.untyped_storage()._cdata: tensor for tensor in _tensors(result)}
        new = {key: tensor for key, tensor in new.items() if key not in self._owners}
        if new:
            arguments = [] if func is LIFT else [*args, *(kwargs or {}).values()]
            given = {tensor.untyped_storage()._cdata for tensor in _tensors(arguments)}
            for key in new.keys() - given:
                self._count(new[key].untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        part = HOST if allocates_on_host() else self.part
        self._owners[key] = part
        self._add(part, size)
        if self.live > self.peak:
            self.reset_peak()
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._add(self._owners.pop(key), -size)

    def _add(self, part: str, size: int) -> None:
        if part == HOST:
            self.host += size
        else:
            self._parts[part] += size
            self.live += size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
