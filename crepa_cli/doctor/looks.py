"""Checks of the clips themselves, before money is spent on training: their looks, frame rates, captions and parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from crepa_cli.data.cache import cache_folder
from crepa_cli.data.index import Index
from crepa_cli.data.pictures import Look, alike, look_at_all
from crepa_cli.data.scan import PreparedClip, clip_name
from crepa_cli.doctor.findings import ClipFindings, Plan
from crepa_cli.errors import counted, listed
from crepa_cli.events import Event, drained
from crepa_cli.profile import DataSettings

MOST = 2000
"""Clips that are looked at, so that doctor takes minutes whatever the folder holds."""
SLOW, FAST = 10.0, 61.0
"""Frame rates outside of which a clip is likely to be a time lapse, a slow motion, or of wrong times."""
CAPTION_SHOWN = 60


def check_looks(plan: Plan, clips: Sequence[PreparedClip], data: DataSettings, listen: Callable[[Event], None]) -> None:
    """Add warnings of clips that are likely to be mistakes, and the share of each that is trained on.

    Args:
        plan: receives the checks and the findings.
        clips: all clips of the run.
        data: the settings of the clips.
        listen: receives progress and skipped clips.
    """
    chosen = spread(clips, MOST)
    if len(chosen) < len(clips):
        message = f"{counted(len(chosen), 'clip')} of {len(clips):,}, evenly spread, looked at for what follows"
        plan.add("looks", "fine", message)
    looked = drained(look_at_all(chosen, Index(cache_folder(data))), listen)
    plan.findings = found = _findings(clips, looked)
    for names, message, advice in _messages(found):
        if names:
            plan.add("looks", "warning", f"{message}: {listed(names)}", advice)
    if found.used:
        plan.add("clips", "fine", _describe_used(found.used))


def spread(clips: Sequence[PreparedClip], most: int) -> list[PreparedClip]:
    """The clips, or so many of them, evenly spread from the first to the last."""
    if len(clips) <= most:
        return list(clips)
    return [clips[place * (len(clips) - 1) // (most - 1)] for place in range(most)]


def _findings(clips: Sequence[PreparedClip], looked: Sequence[tuple[PreparedClip, Look]]) -> ClipFindings:
    return ClipFindings(
        near_identical=[_pair(one, other) for one, other in alike(looked)],
        black=[clip_name(clip) for clip, look in looked if look.black],
        frozen=[clip_name(clip) for clip, look in looked if look.frozen and not look.black],
        bars={clip_name(clip): look.bars._asdict() for clip, look in looked if any(look.bars)},
        frame_rates={clip.clip.path.name: clip.info.fps for clip in clips if _unusual(clip)},
        same_caption=_same_captions(clips),
        used=_used(clips),
    )


def _messages(found: ClipFindings) -> list[tuple[list[str], str, str]]:
    """Names, what they have in common, and what to do about it."""
    pairs = [f"{one} and {other}" for one, other in found.near_identical]
    bars = [f"{name} ({_sides(sides)})" for name, sides in found.bars.items()]
    rates = [f"{name} ({fps:.4g})" for name, fps in found.frame_rates.items()]
    captions = [
        f'"{caption if len(caption) <= CAPTION_SHOWN else f"{caption[:CAPTION_SHOWN]}..."}" ({listed(names)})'
        for caption, names in found.same_caption.items()
    ]
    return [
        (
            pairs,
            f"{counted(len(pairs), 'pair')} of clips that look the same",
            "keep one of each pair, or it is trained twice as often as the others",
        ),
        (found.black, f"{counted(len(found.black), 'clip')} black throughout", "remove them: they train darkness"),
        (
            found.frozen,
            f"{counted(len(found.frozen), 'clip')} in which nothing moves",
            "remove them, or train on them as images: they train videos that stand still",
        ),
        (
            bars,
            f"{counted(len(bars), 'clip')} with black bars, in pixels of the clip",
            "cut the bars off, for instance with ffmpeg's filter crop: they are trained as part of the picture",
        ),
        (
            rates,
            f"{counted(len(rates), 'clip')} of an unusual number of frames per second",
            "check whether they play at the right speed: slow motion, time lapses and wrong times train such motion",
        ),
        (
            captions,
            f"{counted(len(captions), 'caption')} on more than one clip",
            "describe what tells these clips apart, unless they are meant to be the same to the model",
        ),
    ]


def _pair(one: PreparedClip, other: PreparedClip) -> tuple[str, str]:
    """The names of two clips, with the folders of those that have the same name."""
    names = clip_name(one), clip_name(other)
    if one.clip.path.name != other.clip.path.name:
        return names
    return f"{one.clip.path.parent.name}/{names[0]}", f"{other.clip.path.parent.name}/{names[1]}"


def _sides(bars: dict[str, int]) -> str:
    return ", ".join(f"{side} {size}" for side, size in bars.items() if size)


def _unusual(clip: PreparedClip) -> bool:
    """Whether a clip's own frame rate is unusual. Of one whose frames are repeated, a notice says so already."""
    return not clip.info.image and not clip.repeated and not SLOW <= clip.info.fps <= FAST


def _same_captions(clips: Sequence[PreparedClip]) -> dict[str, list[str]]:
    """The names of the files that a caption describes, for each caption of several."""
    files: dict[str, dict[Path, str]] = defaultdict(dict)
    for clip in clips:
        for caption in clip.clip.captions:
            files[caption][clip.clip.path] = clip.clip.path.name
    return {caption: list(names.values()) for caption, names in files.items() if len(names) > 1}


def _used(clips: Sequence[PreparedClip]) -> dict[str, float]:
    """The share of the seconds of each video that is trained on, in any of its windows."""
    parts: dict[Path, list[PreparedClip]] = defaultdict(list)
    for clip in clips:
        if not clip.info.image:
            parts[clip.clip.path].append(clip)
    return {path.name: _covered(windows) for path, windows in parts.items()}


def _covered(windows: Sequence[PreparedClip]) -> float:
    """The share of a video that its windows cover, which may overlap."""
    covered = reached = 0.0
    for one in sorted(windows, key=lambda one: one.start):
        end = one.start + one.bucket.frames / one.fps
        covered += max(0.0, end - max(one.start, reached))
        reached = max(reached, end)
    duration = windows[0].info.duration
    return min(1.0, covered / duration) if duration else 1.0


def _describe_used(used: dict[str, float]) -> str:
    """The shares of the clips that are used least, and how many are used by less than half."""
    least = sorted(used, key=lambda name: used[name])
    partly = [name for name in least if used[name] < 0.5]
    if not partly:
        return f"used of each video: at least {used[least[0]]:.0%}"
    names = listed([f"{name} {used[name]:.0%}" for name in partly])
    return f"used by less than half: {len(partly)} of {counted(len(used), 'video')}: {names}"
