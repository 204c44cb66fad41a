"""The message for a run that ran out of memory."""

from __future__ import annotations

import torch
from rich.filesize import decimal

from crepa_cli.memory.prediction import validation_memory
from crepa_cli.memory.savings import memory_advice
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile


def out_of_memory_message(error: BaseException, profile: Profile, family: Family, device: torch.device) -> str:
    """The allocator's error, the predicted memory by part, and the settings that reduce it most, largest saving first.

    Args:
        error: raised by the allocator.
        profile: the resolved settings.
        family: of the checkpoint.
        device: the device that trained.
    """
    bucket = form_bucket(profile, family)
    parts, savings = memory_advice(profile, family, bucket, device)
    held = [f"  {part}: {decimal(size)}" for part, size in sorted(parts.items(), key=lambda item: -item[1]) if size]
    advice = [f"  --set {saving.setting} saves {decimal(saving.saved)}" for saving in savings]
    validation = validation_memory(profile, family, device)
    larger = validation > sum(parts.values())
    return "\n".join(
        [
            f"out of memory: {str(error).splitlines()[0]}",
            f"A step at {bucket.width}x{bucket.height}, {bucket.frames} frames needs at its peak:",
            *held,
            "Settings that reduce it most:" if advice else "No single setting reduces it: use a smaller checkpoint.",
            *advice,
            *([f"A validation needs {decimal(validation)}: --set validation.every=0 turns it off."] if larger else []),
            "Then train again; a run that had begun to train resumes with --resume.",
        ]
    )
