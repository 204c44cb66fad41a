"""What to say when memory was not enough."""

from __future__ import annotations

from rich.filesize import decimal

from crepa_cli.memory.savings import memory_advice
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile


def out_of_memory_message(error: BaseException, profile: Profile, family: Family) -> str:
    """What a training holds, by part, and the settings that lower it most, largest first: both predicted.

    Args:
        error: what the allocator said.
        profile: the resolved settings.
        family: of the checkpoint.
    """
    bucket = form_bucket(profile, family)
    parts, savings = memory_advice(profile, family, bucket)
    held = [f"  {part}: {decimal(size)}" for part, size in sorted(parts.items(), key=lambda item: -item[1]) if size]
    advice = [f"  --set {saving.setting} saves {decimal(saving.saved)}" for saving in savings]
    return "\n".join(
        [
            f"out of memory: {str(error).splitlines()[0]}",
            f"A step at {bucket.width}x{bucket.height}, {bucket.frames} frames holds at its peak:",
            *held,
            "What lowers it most:" if advice else "No single setting lowers it: take a smaller checkpoint.",
            *advice,
            "Then go on with --resume.",
        ]
    )
