"""Threads read clips ahead of the model that encodes them; copies of a small model work in these threads."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, nn

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")
Model = TypeVar("Model")

AHEAD_BYTES = 2**30
"""Of what is read and not asked for yet; a single item may be larger."""
KEPT_BYTES = 2**31
"""Of the frames that wait for their second encoder."""
MOST_THREADS = 8
SMALL = 2**26
"""Bytes of weights of a model that keeps no core busy, let alone several: those of the demo have a tenth of it."""

WORK = 128
"""Times as many bytes as it reads, a small VAE takes for its work on a clip."""


class Models(NamedTuple, Generic[Model]):
    """A model, with a copy for each further thread if it is small."""

    copies: list[Model]
    small: bool

    @classmethod
    def load(cls, load: Callable[[], Model], parts: Callable[[Model], Iterable[object]]) -> Models[Model]:
        """Load a model, as often as it is worth it; its `parts` are those that may have weights."""
        first = load()
        small = is_small(parts(first))
        return cls([first, *(load() for _ in range(threads() - 1 if small else 0))], small)


def is_small(parts: Iterable[object]) -> bool:
    """Whether the parts of a model, those that are modules, lie on the CPU and are small."""
    weights = [weight for part in parts if isinstance(part, nn.Module) for weight in part.parameters()]
    return all(weight.device.type == "cpu" for weight in weights) and sum(weight.nbytes for weight in weights) <= SMALL


@contextmanager
def cores(*, small: bool) -> Iterator[None]:
    """Let torch use one core for a small model, wherever it runs: it would round in another way on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads() -> int:
    """How many threads of a process read: the processes together have one for each core at most."""
    return max(1, min(MOST_THREADS, (os.cpu_count() or 1) // int(PartialState().num_processes)))


@contextmanager
def read_ahead(
    items: Sequence[Item], read: Callable[[Item], Read], size: Callable[[Item], int]
) -> Iterator[Callable[[], Read]]:
    """Read items in threads, and yield a function that returns what was read of the next one, or raises its error.

    Args:
        items: in the order in which they are asked for.
        read: called in the threads.
        size: bytes of an item while it waits.
    """
    coming, waiting = deque(items), deque[tuple[int, Future[Read]]]()
    executor = ThreadPoolExecutor(threads(), "read ahead")

    def fill() -> None:
        while coming and len(waiting) < 2 * threads():
            held = sum(bytes_ for bytes_, _ in waiting)
            if waiting and held + size(coming[0]) > AHEAD_BYTES:
                return
            item = coming.popleft()
            waiting.append((size(item), executor.submit(read, item)))

    def following() -> Read:
        fill()
        _, future = waiting.popleft()
        fill()
        return future.result()

    try:
        yield following
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def made_ahead(
    models: Models[Model],
    items: Sequence[Item],
    read: Callable[[Item], Read],
    make: Callable[[Model, Item, Read], Made],
    size: Callable[[Item], int],
) -> Iterator[Callable[[Item], Made]]:
    """Read items ahead of a model, and yield a function that returns what the model makes of the next one.

    Args:
        models: what makes it. Copies of a small model work in the threads that read, on a core each.
        items: in the order in which they are asked for.
        read: called in the threads.
        make: called in the caller's thread, or in the threads for a small model.
        size: bytes of what is read of an item.
    """
    if not models.small:
        with read_ahead(items, read, size) as following:
            yield lambda item: make(models.copies[0], item, following())
        return
    free = queue.SimpleQueue[Model]()
    for copy in models.copies:
        free.put(copy)

    def whole(item: Item) -> Made:
        found, model = read(item), free.get()
        try:
            with torch.no_grad():
                return make(model, item, found)
        finally:
            free.put(model)

    with cores(small=True), read_ahead(items, whole, lambda item: WORK * size(item)) as made:
        yield lambda _: made()


class KeptFrames:
    """Frames of clips that one encoder has seen and another will see, so that they are not decoded twice.

    They take `KEPT_BYTES` at most: further clips are decoded again.
    """

    def __init__(self) -> None:
        self._frames: dict[str, Tensor] = {}
        self._room = KEPT_BYTES

    def put(self, key: str, frames: Tensor) -> None:
        """Keep the frames of a clip, if there is room."""
        if frames.nbytes <= self._room:
            self._room -= frames.nbytes
            self._frames[key] = frames

    def take(self, key: str) -> Tensor | None:
        """The frames of a clip, which are not kept any longer."""
        return self._frames.pop(key, None)
