"""Activation checkpointing, block by block: what diffusers calls in place of each block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from crepa_cli.profile import MemorySettings
from crepa_cli.training.placement.offload import OffloadedStates


def block_runner(memory: MemorySettings) -> Callable[..., Any]:
    """The function that runs a block, `runner(block, *args)`, for `enable_gradient_checkpointing` of diffusers."""
    return OffloadedStates(checkpointed) if memory.offload_activations else checkpointed


def checkpointed(block: nn.Module, *args: Any) -> Any:
    """The output of a block whose activations are recomputed in the backward."""
    return checkpoint(block, *args, use_reentrant=False)
