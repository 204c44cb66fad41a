"""Finer recomputation: parts of a block are recomputed on their own, so that the backward holds one of them at a time.

Activation checkpointing recomputes a whole block before its backward begins, and then holds everything inside it. With
finer recomputation the block's own recomputation keeps only the inputs of its largest parts; each part runs once more
when the backward reaches it (nested checkpoints, arXiv 1604.06174). Without activation checkpointing the parts are
recomputed once, and the rest of the block is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crepa_cli.models.family import Family

CHUNKS = 8
"""Parts that a feed-forward's tokens are split into: its peak is an eighth, and its products are still large."""


def recompute_finely(family: Family, blocks: nn.ModuleList) -> None:
    """Let the attention and the feed-forward parts of blocks be recomputed on their own, in place."""
    for block in blocks:
        for name in family.attention_parts:
            part = block.get_submodule(name)
            part.forward = recomputed(part)
        parts = dict(block.named_modules())
        for part in (parts[name] for name in family.token_parts if name in parts):
            part.forward = by_chunks(recomputed(part))


def recomputed(part: nn.Module) -> Callable[..., Tensor]:
    """The forward of a part, of which only the arguments are kept until the backward."""
    forward: Callable[..., Tensor] = part.forward
    # Dropout draws the same once more. For the others, no state is copied in every call.
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in part.modules())

    def run(*arguments: Any, **keywords: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        count, names = len(arguments), tuple(keywords)

        def positional(*values: Any) -> Tensor:
            return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))

        # Autograd saves positional arguments, which the block's checkpoint then drops; keywords would stay.
        output: Tensor = checkpoint(
            positional, *arguments, *keywords.values(), use_reentrant=False, preserve_rng_state=random
        )
        return output

    return run


def by_chunks(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function of tokens `[B, N, ...]`, run on some of them at a time; it must see each token alone."""

    def run(tokens: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(tokens)
        return torch.cat([forward(chunk) for chunk in tokens.chunk(CHUNKS, dim=1)], dim=1)

    return run
