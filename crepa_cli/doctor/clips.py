"""The sizes that clips are trained at, and those that are enlarged to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from crepa_cli.data.scan import PreparedClip
from crepa_cli.doctor.findings import BucketCount
from crepa_cli.errors import counted
from crepa_cli.models.family import Family
from crepa_cli.profile import DataSettings

MUCH = 1.5
"""Enlarged by more than this factor, a clip is visibly soft."""


def describe_buckets(buckets: Sequence[BucketCount], data: DataSettings, family: Family) -> str:
    """The number of clips, by size, with the reason of sizes that have more pixels than the settings ask for."""
    asked = data.width * data.height
    lines = [f"{counted(sum(one.clips for one in buckets), 'usable clip')}, by size:"]
    for one in buckets:
        more = one.width * one.height / asked - 1
        length = "single frames" if one.frames == 1 else f"{one.frames} frames"
        line = f"{one.width}x{one.height}, {length}: {one.clips}"
        lines.append(f"{line} ({more:+.1%})" if more > 0 else line)
    if any(one.width * one.height > asked for one in buckets):
        lines.append(
            f"+: more pixels than {data.width}x{data.height}, because the sides of other aspect ratios are rounded to "
            f"multiples of {family.size_multiple}"
        )
    return "\n".join(lines)


def describe_sources(clips: Sequence[PreparedClip], data: DataSettings) -> str:
    """The number of clips to train on of each source, and their share of those that are drawn."""
    counts = Counter(clip.source for clip in clips)
    parts = {number: (data.sources[number].weight or counts[number]) for number in counts}
    total = sum(parts.values())
    return "\n".join(
        f"{data.sources[number].name}: {counted(counts[number], 'clip')}, {part / total:.1%} of those drawn"
        for number, part in sorted(parts.items())
    )


def describe_held_out(held_out: int, usable: int, data: DataSettings) -> str:
    """How many clips are held out of how many, and by which setting."""
    if data.validation_path is not None:
        return f"{counted(held_out, 'clip')} in data.validation_path = {data.validation_path}, never trained on"
    share = f"data.validation_share = {data.validation_share}"
    return f"{held_out} of {counted(usable, 'clip')} by {share}, never trained on"


def enlarged(clips: Sequence[PreparedClip]) -> str | None:
    """The clips that are enlarged a lot, the most enlarged one by name; None without any."""
    much = [clip for clip in clips if clip.fit.enlargement > MUCH]
    if not much:
        return None
    worst = max(much, key=lambda clip: clip.fit.enlargement)
    return (
        f"{len(much)} of {counted(len(clips), 'clip')} enlarged more than {MUCH:g} times, which trains blur; most of "
        f"all {worst.clip.path.name}: {worst.info.width}x{worst.info.height} to "
        f"{worst.bucket.width}x{worst.bucket.height}, {worst.fit.enlargement:.1f} times"
    )
