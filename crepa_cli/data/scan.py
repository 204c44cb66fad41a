"""Clips as they are trained on: found in a folder, measured, and given a size, a length and a frame rate."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from crepa_cli.data.buckets import Bucket, Fit, Size, bucket_sizes, fit, nearest_bucket, valid_frames
from crepa_cli.data.clips import Clip, ClipError
from crepa_cli.data.images import image_pixels
from crepa_cli.data.index import Index
from crepa_cli.data.looks import changed_looks, unused
from crepa_cli.data.measured import Measured, measured_clips
from crepa_cli.data.video import DECODING_VERSION, VideoInfo, decode, frames_available
from crepa_cli.data.windows import HEAD, Sampling, windows
from crepa_cli.errors import UserError, counted, listed
from crepa_cli.events import ClipSkipped, Event, Notice
from crepa_cli.models.family import Family
from crepa_cli.profile import DataSettings

SAME_RATE = 0.99
"""Clips that have this share of a frame rate or more are trained frame by frame, as if they had it: 29.97 is 30."""


class ClipForm(NamedTuple):
    """The target form of clips: the size, whose area all buckets share, the most frames, and the frame rate."""

    width: int
    height: int
    frames: int
    fps: float

    @classmethod
    def of(cls, data: DataSettings) -> ClipForm:
        """The form given by the settings."""
        return cls(data.width, data.height, data.frames, data.fps)


@dataclass(frozen=True, slots=True)
class PreparedClip:
    """A clip, the frame rate it is trained at, and the keys of its cache entries, of prompts one for each caption.

    `repeated` of its frames repeat the one before. `features_key` is None if no encoder is the teacher. A clip that is
    `held_out` is never trained on. `source` is the number of its source. It begins `start` seconds after the first
    frame of its file. Of the windows of one `scene`, each visit draws one if the sampling is uniform; otherwise `scene`
    is None.
    """

    clip: Clip
    info: VideoInfo
    bucket: Bucket
    digest: str
    fps: float
    repeated: int = 0
    prompt_keys: tuple[str, ...] = ()
    latents_key: str = ""
    features_key: str | None = None
    held_out: bool = False
    source: int = 0
    start: float = 0.0
    scene: int | None = None

    @property
    def fit(self) -> Fit:
        """How much the clip is enlarged and cropped for its bucket."""
        return fit(self.info.width, self.info.height, Size(self.bucket.width, self.bucket.height))


def scan(
    family: Family,
    folder: Path,
    form: ClipForm,
    index: Index | None = None,
    sampling: Sampling = HEAD,
    *,
    caption_lines: bool = False,
) -> Generator[Event, None, list[PreparedClip]]:
    """Find the clips of a folder and the bucket of each; yields progress, skipped clips and notices.

    Of long videos, the parts that `sampling` says are clips. With `caption_lines` each line of a text is a caption.
    Files that the `index` knows are not opened.

    Raises:
        UserError: if the folder does not exist or has no usable clips.
    """
    found = yield from measured_clips(folder, index, split_scenes=sampling.split_scenes, caption_lines=caption_lines)
    sizes, buckets, clips = bucket_sizes(form.width, form.height, family.size_multiple), dict[Bucket, Bucket](), []
    images = [one.path.name for one, measured in found.clips if measured.info.image]
    if images and not family.trains_images:
        yield Notice(
            f"{counted(len(images), 'image')} left out, because {family.name} {family.task} cannot be trained on a "
            f"single frame: {listed(images)}"
        )
    for one, measured in found.clips:
        if measured.info.image and not family.trains_images:
            continue
        try:
            placed = _placed(one, measured, family, form, sampling, sizes)
        except ClipError as error:
            yield ClipSkipped(one.path.name, str(error))
        else:
            # One object for each bucket, not for each clip.
            clips += [replace(clip, bucket=buckets.setdefault(clip.bucket, clip.bucket)) for clip in placed]
    if not clips:
        raise UserError(
            f"no usable clips in {folder}: {len(found.clips) + found.skipped} found, all skipped for the reasons "
            "given above"
        )
    files = list({clip.clip.path: clip for clip in reversed(clips)}.values())[::-1]
    for clip in files:
        if clip.repeated:
            yield Notice(
                f"{clip.clip.path.name} is slower than data.fps = {form.fps:g}: {clip.repeated} of its "
                f"{clip.bucket.frames} frames repeat the one before"
            )
    if sampling.takes_head_alone:
        videos = [clip for clip in clips if not clip.info.image]
        yield from unused([(clip.info, clip.bucket, clip.fps) for clip in videos], form.frames, form.fps)
    yield from changed_looks([(clip.clip.path.name, clip.info, clip.bucket) for clip in files])
    return clips


def _placed(
    clip: Clip, measured: Measured, family: Family, form: ClipForm, sampling: Sampling, sizes: list[Size]
) -> list[PreparedClip]:
    """The windows of a clip with the size, the frame count and the frame rate at which they are trained.

    Raises:
        ClipError: if it is too short.
    """
    info, fps = measured.info, form.fps
    size = sizes[0] if family.only_size else nearest_bucket(info.width, info.height, sizes)
    if info.image:
        return [PreparedClip(clip, info, Bucket(1, size.height, size.width), measured.digest, fps)]
    frames = valid_frames(frames_available(info, fps), form.frames, family.frame_multiple)
    repeated = _repeated(info, frames or 1, fps)
    if repeated and (family.takes_frame_rate or info.fps >= SAME_RATE * fps):
        fps, repeated = info.fps, 0
    parts = windows(info, measured.cuts, sampling, form.frames, family.frame_multiple, fps)
    if not parts:
        scenes = f" in {counted(len(measured.cuts) + 1, 'scene')}" if measured.cuts else ""
        raise ClipError(
            f"too short: {counted(frames_available(info, fps), 'frame')}{scenes} at {fps:g} frames per second, "
            f"needs at least {min(form.frames, family.frame_multiple + 1)}"
        )
    placed = PreparedClip(clip, info, Bucket(1, size.height, size.width), measured.digest, fps, repeated)
    drawn = sampling.kind == "uniform"
    return [
        replace(
            placed,
            bucket=replace(placed.bucket, frames=part.frames),
            start=part.start,
            scene=part.scene if drawn else None,
        )
        for part in parts
    ]


def _repeated(info: VideoInfo, frames: int, fps: float) -> int:
    """How many of the first `frames` frames at a frame rate repeat the one before, if the clip's own rate is steady."""
    shown = math.floor(((frames - 1) / fps + info.rounding) * info.fps) + 1
    return max(0, frames - shown)


def clip_pixels(clip: PreparedClip) -> Tensor:
    """The frames of a clip, resized for training: uint8 `[F, 3, H, W]`."""
    bucket = clip.bucket
    if clip.info.image:
        return image_pixels(clip.clip.path, bucket.width, bucket.height)
    size = {"width": bucket.width, "height": bucket.height}
    return decode(clip.clip.path, frames=bucket.frames, fps=clip.fps, start=clip.start, **size)


def clip_name(clip: PreparedClip) -> str:
    """The name that messages give a clip."""
    return f"{clip.clip.path.name} at {clip.start:.2f} s" if clip.start else clip.clip.path.name


def key_parts(clip: PreparedClip) -> dict[str, object]:
    """The part of a cache key that determines a clip's pixels."""
    bucket = clip.bucket
    return {
        "decoding": DECODING_VERSION,
        "digest": clip.digest,
        "fps": clip.fps,
        "frames": bucket.frames,
        "height": bucket.height,
        "width": bucket.width,
        # Entries of earlier versions begin at the first frame.
        **({"start": clip.start} if clip.start else {}),
    }
