"""The message for a run that ran out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size
from rich.filesize import decimal

from crepa_cli.errors import RunError
from crepa_cli.memory.fit import cheapest_fit
from crepa_cli.memory.prediction import validation_memory
from crepa_cli.memory.savings import memory_advice
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.training.peak import device_memory

LESS = 0.9
"""Share of what ran out of memory that is tried next."""


@contextmanager
def advice_on_memory(profile: Profile, family: Family, device: torch.device) -> Iterator[None]:
    """Within this context, an error of the allocator becomes a `RunError` that says what would lower memory."""
    try:
        yield
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        failure = RunError(out_of_memory_message(error, profile, family, device))
        for note in getattr(error, "__notes__", ()):
            failure.add_note(note)
        raise failure from error


def out_of_memory_message(error: BaseException, profile: Profile, family: Family, device: torch.device) -> str:
    """The allocator's error, the predicted memory by part, and what reduces it: single settings, and a combination.

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
    # The device may have had less than all of its memory free: look for what needs less than this run did.
    limit = min(device_memory(device), int(LESS * max(sum(parts.values()), validation)))
    fit = cheapest_fit(profile, family, bucket, device, limit)
    combination = f"The settings that need less than {decimal(limit)} and cost the least time: {fit}"
    return "\n".join(
        [
            f"out of memory: {str(error).splitlines()[0]}",
            f"A step at {bucket.width}x{bucket.height}, {bucket.frames} frames needs at its peak:",
            *held,
            "Settings that reduce it most:" if advice else "No single setting reduces it: use a smaller checkpoint.",
            *advice,
            *([combination] if fit else []),
            *([f"A validation needs {decimal(validation)}: --set validation.every=0 turns it off."] if larger else []),
            "Then train again; a run that had begun to train resumes with --resume.",
        ]
    )
