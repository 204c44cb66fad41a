"""How a stage of the preparation works through its items: shared out, named, and stored if they are sound."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from operator import itemgetter
from typing import TypeVar

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


def each(
    stage: str, items: Sequence[Item], work: Callable[[Item], Result], *, name: Callable[[Item], str]
) -> Generator[Event, None, list[Result]]:
    """Process each item, yield progress and return the results; items with unreadable clips are skipped.

    The processes of a run split the items, and each process returns all results. A UserError in one is raised in all.
    """
    mine = share(items)
    outcomes: list[tuple[int, Result | ClipError | UserError]] = []
    for done, index in enumerate(mine):
        yield Progress(stage, done, len(mine), name(items[index]))
        try:
            with torch.no_grad():
                outcomes.append((index, work(items[index])))
        except ClipError as error:
            outcomes.append((index, error))
        except UserError as error:
            outcomes.append((index, error))
            break
    else:
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
