"""Modules that run many times on the same shapes, such as a VAE on tiles: run once for each shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from crepa_cli.memory.live_bytes import LiveBytes

Facts = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""The shape, stride and dtype of a tensor."""


def run_once_per_shape(module: nn.Module, live: LiveBytes) -> None:
    """Let later calls of a module return tensors without content, and raise the peak as the first call did.

    Tensors are given and returned alone, or with others and None in dictionaries and tuples. Calls with lists run as
    before: these are caches of earlier frames, which the module changes in place.

    Args:
        module: without state, that returns no tensor twice and is run without gradients.
        live: the counter of its tensors.
    """
    forward = module.forward
    calls: dict[object, tuple[int, list[Facts | None], TreeSpec]] = {}

    def forward_once(*args: Any, **kwargs: Any) -> Any:
        given, structure = tree_flatten((args, kwargs))
        lists = any(isinstance(one, list) for one in (*args, *kwargs.values()))
        if lists or not all(one is None or isinstance(one, (Tensor, int, float)) for one in given):
            return forward(*args, **kwargs)
        key = (repr(structure), *((one.shape, one.dtype) if isinstance(one, Tensor) else one for one in given))
        if key not in calls:
            peak, parts, held = live.peak, live.peak_parts, live.live
            live.reset_peak()
            result = forward(*args, **kwargs)
            parts_of_result, returned = tree_flatten(result)
            calls[key] = live.peak - held, [_facts(one) for one in parts_of_result], returned
            if peak > live.peak:
                live.peak, live.peak_parts = peak, parts
            return result
        rise, facts, returned = calls[key]
        live.rise(rise)
        return tree_unflatten([_empty(one) for one in facts], returned)

    module.forward = forward_once


def _facts(part: Tensor | None) -> Facts | None:
    return None if part is None else (part.shape, part.stride(), part.dtype)


def _empty(facts: Facts | None) -> Tensor | None:
    return None if facts is None else torch.empty_strided(facts[0], facts[1], dtype=facts[2])
