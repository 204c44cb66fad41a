"""How a stage of the preparation works through its items: shared out, named, and stored if they are sound."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import Generic, TypeVar

import torch
from accelerate import PartialState

from crepa_cli.data.cache import Cache, not_finite
from crepa_cli.data.clips import ClipError
from crepa_cli.errors import UserError
from crepa_cli.events import ClipSkipped, Event, Progress
from crepa_cli.models.family import Tensors
from crepa_cli.processes import from_all

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Later(Generic[Result]):
    """Work whose end, such as writing a file, is left to a thread that does it while the next item is worked on."""

    finish: Callable[[], Result]


def each(
    stage: str, items: Sequence[Item], work: Callable[[Item], Result], *, name: Callable[[Item], str]
) -> Generator[Event, None, list[Result]]:
    """Process each item, yield progress and return the results; items with unreadable clips are skipped.

    The processes of a run split the items, and each process returns all results. A UserError in one is raised in all.
    """

    def at_once(item: Item) -> Later[Result]:
        result = work(item)
        return Later(lambda: result)

    return (yield from each_later(stage, items, at_once, name=name))


def each_later(
    stage: str, items: Sequence[Item], work: Callable[[Item], Later[Result]], *, name: Callable[[Item], str]
) -> Generator[Event, None, list[Result]]:
    """Process each item as `each` does, and leave the end of its work to a thread."""
    mine = share(items)
    with ThreadPoolExecutor(1, "finish") as finisher:
        ends: list[Future[Result | ClipError | UserError]] = []
        for done, index in enumerate(mine):
            yield Progress(stage, done, len(mine), name(items[index]))
            made = _outcome(work, items[index])
            # One end at most waits: it holds what was made.
            failed = bool(ends) and isinstance(ends[-1].result(), UserError)
            ends.append(finisher.submit(_outcome, _end, made))
            if failed or isinstance(made, UserError):
                break
        outcomes = [(index, end.result()) for index, end in zip(mine, ends, strict=False)]
    if not any(isinstance(outcome, UserError) for _, outcome in outcomes):
        yield Progress(stage, len(mine), len(mine))
    results = []
    for index, outcome in sorted(from_all(outcomes), key=itemgetter(0)):
        if isinstance(outcome, UserError):
            raise outcome
        if isinstance(outcome, ClipError):
            yield ClipSkipped(name(items[index]), str(outcome))
        else:
            results.append(outcome)
    return results


def _outcome(work: Callable[..., Result], *arguments: object) -> Result | ClipError | UserError:
    """The result of some work, or why there is none."""
    try:
        with torch.no_grad():
            return work(*arguments)
    except (ClipError, UserError) as error:
        return error


def _end(made: Later[Result] | ClipError | UserError) -> Result | ClipError | UserError:
    return made.finish() if isinstance(made, Later) else made


def share(items: Collection[object]) -> range:
    """The indices of the items that this process works on."""
    state = PartialState()
    return range(len(items))[state.process_index :: state.num_processes]


def store(cache: Cache, kind: str, key: str, tensors: Tensors) -> None:
    """Cache tensors that can be trained on.

    Raises:
        ClipError: if they are not finite; every step with them would be skipped.
    """
    if names := not_finite(tensors):
        raise ClipError(f"{', '.join(names)}: computed, and not finite (NaN or infinity)")
    cache.write(kind, key, tensors)


def store_later(cache: Cache, kind: str, key: str, tensors: Tensors, item: Item) -> Later[Item]:
    """Leave the tensors of an item to a thread, which calls `store`; the result is the item."""

    def finish() -> Item:
        store(cache, kind, key, tensors)
        return item

    return Later(finish)
