"""The processes of a run, and the values they exchange."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from crepa_cli.errors import RunError, UserError

Value = TypeVar("Value")

PRECISION = {"bfloat16": "bf16", "float32": "no"}
"""Accelerate's names for the values of `model.dtype`."""
TIMEOUT = timedelta(hours=12)
"""How long processes wait for each other: during preparation, one may get far longer clips than another."""


def start_processes() -> PartialState:
    """Join the processes that a launcher started; without a launcher, run as a single process.

    Raises:
        UserError: if the launcher was configured for a method that crepa would silently ignore.
        RunError: if the processes did not find each other.
    """
    for variable, name in {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}.items():
        if os.environ.get(variable, "").lower() == "true":
            raise UserError(
                f"accelerate is configured for {name}, which crepa does not use: remove that from its configuration; "
                "train.sharding = true shards the weights across the processes"
            )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return PartialState()
    # Accelerate joins processes on the CPU only if it is asked for the CPU.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)
    if state.num_processes != started:
        raise RunError(f"{started} processes were started, but only {state.num_processes} found each other")
    return state


def from_main(compute: Callable[[], Value]) -> Value:
    """The result of `compute` on the main process, for all processes; every process must call it.

    Raises:
        UserError: in every process, if `compute` raises it.
    """
    outcome: Value | UserError | None = None
    if PartialState().is_main_process:
        try:
            outcome = compute()
        except UserError as error:
            outcome = error
    (result,) = broadcast_object_list([outcome])
    if isinstance(result, UserError):
        raise result
    shared: Value = result
    return shared


def from_all(values: list[Value]) -> list[Value]:
    """The values of all processes in one list; every process must call it."""
    gathered: list[Value] = gather_object(values)
    return gathered
