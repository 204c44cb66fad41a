"""Modules that run many times on the same shapes, such as a VAE on tiles: run once for each shape."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    """The bytes that a call took beyond those held before, its result, and what it left in each list.

    The result is a new tensor, or the argument with this index.
    """

    rise: int
    result: _Form | int
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
    anything but tensors, numbers, strings, None and lists of them run as before.

    Args:
        owner: an object, whose method depends on nothing else and runs without gradients.
        method: the name of it; it returns one tensor, a new one or one of its arguments.
        live: the counter of its tensors.
    """
    run = getattr(owner, method)
    calls: dict[Hashable, _Call] = {}

    def run_once(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if not all(map(_is_plain, given)):
            return run(*args, **kwargs)
        key = (*kwargs, *map(_described, given))
        if key in calls:
            return _repeated(calls[key], given, live)
        peak, parts, held = live.peak, live.peak_parts, live.live
        live.reset_peak()
        result = run(*args, **kwargs)
        itself = next((index for index, one in enumerate(given) if one is result), None)
        left = [[_described(one) for one in items] for items in _lists(given)]
        calls[key] = _Call(live.peak - held, _Form.of(result) if itself is None else itself, left)
        if peak > live.peak:
            live.peak, live.peak_parts = peak, parts
        return result

    setattr(owner, method, run_once)


def _repeated(call: _Call, given: Sequence[Any], live: LiveBytes) -> Any:
    live.rise(call.rise)
    for items, left in zip(_lists(given), call.lists, strict=True):
        # Those of another form are freed before the new ones are made.
        items[:] = [old if _described(old) == one else one for old, one in zip(items, left, strict=False)]
        items += left[len(items) :]
        items[:] = [one.empty() if isinstance(one, _Form) else one for one in items]
    return given[call.result] if isinstance(call.result, int) else call.result.empty()


def _lists(given: Sequence[Any]) -> list[list[Any]]:
    return [one for one in given if isinstance(one, list)]


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, int, float, str))


def _described(value: Any) -> Hashable:
    """An argument as a part of a key."""
    if isinstance(value, list):
        return tuple(map(_described, value))
    return _Form.of(value) if isinstance(value, Tensor) else value
