"""Modules that run many times on the same shapes, such as a VAE on tiles: run once for each shape."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from crepa_cli.memory.live_bytes import LiveBytes

BLENDING = ("blend_v", "blend_h", "blend_t")
"""The methods of diffusers' VAEs that blend neighboring tiles, row by row of pixels."""


class _Form(NamedTuple):
    """All that memory depends on of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


class _Call(NamedTuple):
    """The bytes that a call took beyond those held before, what it returned, and what it left in each list.

    Each part of the result is a new tensor, None, or the argument with this index.
    """

    rise: int
    result: list[_Form | int | None]
    structure: TreeSpec
    lists: list[list[object]]


def run_vae_once_per_shape(vae: Any, half: str, live: LiveBytes) -> None:
    """Let the `encoder` or the `decoder` of a VAE, and the blending of its tiles, run once for each shape."""
    run_once_per_shape(getattr(vae, half), "forward", live)
    for method in BLENDING:
        if hasattr(vae, method):
            run_once_per_shape(vae, method, live)


def run_once_per_shape(owner: Any, method: str, live: LiveBytes) -> None:
    """Let later calls of a method return a tensor without content, and raise the peak as the first call did.

    Lists that it is given, such as caches of earlier frames, then hold what they held after the first call. Calls with
    anything but tensors, numbers, strings, None, and lists, tuples and dictionaries of them run as before.

    Args:
        owner: an object, whose method depends on nothing else and runs without gradients.
        method: the name of it; it returns tensors, new ones or its arguments.
        live: the counter of its tensors.
    """
    run = getattr(owner, method)
    calls: dict[Hashable, _Call] = {}

    def run_once(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        parts, structure = tree_flatten(given)
        if not all(one is None or isinstance(one, (Tensor, int, float, str)) for one in parts):
            return run(*args, **kwargs)
        key = (*kwargs, repr(structure), *map(_described, parts))
        del parts  # what is in the lists may be freed
        if key in calls:
            return _repeated(calls[key], given, live)
        peak, peak_parts, held = live.peak, live.peak_parts, live.live
        live.reset_peak()
        result = run(*args, **kwargs)
        returned, form = tree_flatten(result)
        left = [[_described(one) for one in items] for items in _lists(given)]
        calls[key] = _Call(live.peak - held, [_origin(one, given) for one in returned], form, left)
        if peak > live.peak:
            live.peak, live.peak_parts = peak, peak_parts
        return result

    setattr(owner, method, run_once)


def _origin(part: Tensor | None, given: Sequence[Any]) -> _Form | int | None:
    """A part of a result: the index of the argument that it is, or its form."""
    if part is None:
        return None
    return next((index for index, one in enumerate(given) if one is part), _Form.of(part))


def _repeated(call: _Call, given: Sequence[Any], live: LiveBytes) -> Any:
    live.rise(call.rise)
    for items, left in zip(_lists(given), call.lists, strict=True):
        # Those of another form are freed before the new ones are made.
        items[:] = [old if _described(old) == one else one for old, one in zip(items, left, strict=False)]
        items += left[len(items) :]
        items[:] = [one.empty() if isinstance(one, _Form) else one for one in items]
    result = [given[one] if isinstance(one, int) else one and one.empty() for one in call.result]
    return tree_unflatten(result, call.structure)


def _lists(given: Sequence[Any]) -> list[list[Any]]:
    return [one for one in given if isinstance(one, list)]


def _described(value: Any) -> Hashable:
    """A part of the arguments as a part of a key."""
    return _Form.of(value) if isinstance(value, Tensor) else value
