"""The warning that a run pins more of the host's memory than is free."""

from __future__ import annotations

import os

import psutil
import torch
from rich.filesize import decimal

from crepa_cli.memory.prediction import pinned_memory
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile

PINNING = ("stream_weights", "offload_idle_expert", "offload_activations")
"""The keys of `[memory]` that move bytes to the host's memory."""


def shortage_of_run(profile: Profile, family: Family, device: torch.device) -> str:
    """`host_shortage` for all processes of this run on this machine.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        device: the device that trains.
    """
    if not any(getattr(profile.memory, setting) for setting in PINNING):
        return ""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return host_shortage(profile, processes * pinned_memory(profile, family, form_bucket(profile, family), device))


def host_shortage(profile: Profile, pinned: int) -> str:
    """A sentence if a run pins more of this machine's memory than is free; empty otherwise.

    Args:
        profile: the resolved settings.
        pinned: bytes that all its processes on this machine pin.
    """
    free = psutil.virtual_memory().available
    if pinned <= free:
        return ""
    names = [f"memory.{setting}" for setting in PINNING if getattr(profile.memory, setting)]
    lighter = "; memory.quantize_base=int8 halves the weights" if profile.memory.quantize_base == "none" else ""
    return (
        f"{' and '.join(names)} pin {decimal(pinned)} of this machine's memory, of which {decimal(free)} are free: end "
        f"other programs, or turn one of these settings off{lighter}"
    )
