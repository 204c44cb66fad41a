"""Activation checkpointing, block by block: what diffusers calls in place of each block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from crepa_cli.profile import MemorySettings
from crepa_cli.training.placement.offload import OffloadedStates

ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
}
"""The operations that `scaled_dot_product_attention` runs as, by device and dtype."""

# From torch 2.14 on it has to be said that what is kept stays on the device, though hooks offload the block's input.
STAYS: dict[str, Any] = {"respect_saved_tensors_hooks": False}
STAYS = STAYS if STAYS.keys() <= signature(checkpoint).parameters.keys() else {}


def block_runner(memory: MemorySettings, blocks: nn.ModuleList) -> Callable[..., Any]:
    """The function that runs a block, `runner(block, *args)`, for `enable_gradient_checkpointing` of diffusers."""
    run: Callable[..., Any] = keeping_attention if memory.keep == "attention" else checkpointed
    run = OffloadedStates(run) if memory.offload_activations else run
    # The backward frees the last blocks first: before any other block is recomputed.
    kept = frozenset(blocks[index] for index in range(len(blocks)) if len(blocks) - index <= memory.keep_blocks)
    return (lambda block, *args: block(*args) if block in kept else run(block, *args)) if kept else run


def checkpointed(block: nn.Module, *args: Any) -> Any:
    """The output of a block whose activations are recomputed in the backward."""
    return checkpoint(block, *args, use_reentrant=False)


def keeping_attention(block: nn.Module, *args: Any) -> Any:
    """The same, but what self-attention has computed is kept."""
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts, **STAYS)


def _policy(_context: object, operation: Any, *args: Any, **_keywords: Any) -> CheckpointPolicy:
    """Attention to a caption, which has fewer keys than queries, costs as much memory but little time."""
    if operation.overloadpacket in ATTENTION and args[0].shape[-2] == args[1].shape[-2]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
