"""Preparation: everything that depends only on the clips is computed once and cached.

The three stages, prompts, latents and features, run one after another, so that text encoder, VAE and teacher are never
in memory together. A stage whose entries are all cached loads no model. The processes of a run share the missing work.
Threads decode clips ahead of the models, keep some frames for the teacher, and write entries behind the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from crepa_cli.data.ahead import KeptFrames, Models, made_ahead
from crepa_cli.data.buckets import Bucket, Fit, Size, bucket_sizes, fit, nearest_bucket, valid_frames
from crepa_cli.data.cache import Cache, cache_key, check_writable
from crepa_cli.data.clips import Clip, ClipError
from crepa_cli.data.compact import narrowed, stored_features
from crepa_cli.data.encoder import TeacherInput, encoder_folder, load_encoding_vae, load_teacher, teacher_input
from crepa_cli.data.images import image_pixels
from crepa_cli.data.index import Index
from crepa_cli.data.looks import changed_looks, unused
from crepa_cli.data.measured import Measured, measured_clips
from crepa_cli.data.prompts import Prompt, encode_prompts, prompt_key, require_prompts
from crepa_cli.data.stages import Later, each_later, share, store_later
from crepa_cli.data.video import DECODING_VERSION, VideoInfo, decode, frames_available
from crepa_cli.data.windows import HEAD, Sampling, windows
from crepa_cli.errors import UserError, counted, listed
from crepa_cli.events import ClipSkipped, Event, Notice, Progress
from crepa_cli.heap import release_memory
from crepa_cli.hub.read import fingerprint
from crepa_cli.models.family import Family, Tensors
from crepa_cli.processes import from_main
from crepa_cli.profile import CrepaSettings, DataSettings, FeatureDtype
from crepa_cli.teachers.dinov2 import Dinov2Teacher

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


Keep = Callable[[PreparedClip, Tensors, Tensor], None]
"""Called with a clip, its tensors of latents and its pixels."""


def prepare(
    family: Family,
    folder: Path,
    form: ClipForm,
    crepa: CrepaSettings | None,
    prompts: Iterable[str],
    cache: Cache,
    device: torch.device,
    dtype: torch.dtype,
    negative_prompt: str | None = None,
    scanned: Generator[Event, None, list[PreparedClip]] | None = None,
    feature_dtype: FeatureDtype = "float16",
) -> Generator[Event, None, list[PreparedClip]]:
    """Fill the cache for a folder of clips; yields events and returns the usable clips.

    Args:
        family: encodes captions and clips.
        folder: the folder of clips.
        form: size, frames and frame rate for training.
        crepa: settings of the encoder; None if features are not stored.
        prompts: further prompts to encode: the empty one and those for validation.
        cache: stores the entries.
        device: the device of the models.
        dtype: dtype of the text encoder and of new entries of latents.
        negative_prompt: of the validation, to encode too.
        scanned: finds the clips; None for `scan`.
        feature_dtype: dtype of the entries of features.

    Raises:
        UserError: if the cache cannot be written, no clip is usable, or a prompt of `prompts` cannot be encoded.
    """
    check_writable(cache.root, folder)
    with suppress(OSError):  # the first entry that cannot be written says why
        cache.root.mkdir(parents=True, exist_ok=True)
    cache.remove_leftovers()
    clips = yield from scanned or scan(family, folder, form, cache.index)
    texts = {Prompt(text) for text in prompts} | ({Prompt(negative_prompt, True)} if negative_prompt else set())
    captions = {Prompt(caption) for clip in clips for caption in clip.clip.captions}
    reasons = yield from encode_prompts(family, texts | captions, cache, device, dtype, trusted=captions - texts)
    require_prompts(texts, reasons)
    clips = yield from _with_captions(family, clips, reasons, dtype)
    kept, inputs = KeptFrames(), dict[Bucket, TeacherInput]()

    def keep(clip: PreparedClip, tensors: Tensors, pixels: Tensor) -> None:
        if crepa is not None:
            if clip.bucket not in inputs:
                inputs[clip.bucket] = teacher_input(family, crepa, clip.bucket, tensors["latents"])
            kept.put(clip.latents_key, pixels[inputs[clip.bucket].frames])

    clips = yield from _prepare_latents(family, clips, cache, device, dtype, keep)
    if crepa is not None:
        clips = yield from _prepare_features(family, crepa, feature_dtype, clips, cache, device, kept)
    if not clips:
        raise UserError(f"no usable clips in {folder}; the messages above give the reasons")
    return clips


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


def _with_captions(
    family: Family, clips: list[PreparedClip], reasons: Mapping[Prompt, str], dtype: torch.dtype
) -> Generator[Event, None, list[PreparedClip]]:
    """The clips with the keys of their captions; those with a caption that cannot be used are skipped."""
    keys: dict[str, str] = {}
    usable = []
    for clip in clips:
        captions = clip.clip.captions
        if failed := [reasons[Prompt(caption)] for caption in captions if Prompt(caption) in reasons]:
            yield ClipSkipped(clip_name(clip), f"its caption: {failed[0]}")
            continue
        for caption in captions:
            if caption not in keys:
                keys[caption] = prompt_key(family, caption, dtype)
        usable.append(replace(clip, prompt_keys=tuple(keys[caption] for caption in captions)))
    return usable


def _prepare_latents(
    family: Family, clips: list[PreparedClip], cache: Cache, device: torch.device, dtype: torch.dtype, keep: Keep
) -> Generator[Event, None, list[PreparedClip]]:
    clips, missing = _with_latents(family, clips, cache, dtype)
    if not missing:
        return clips
    tried = [clip for clip in clips if clip.latents_key in missing]
    encoded = yield from _encode_latents(family, tried, cache, device, keep)
    release_memory()
    from_main(lambda: cache.remember("latents", missing))
    return _without_failed(clips, tried, encoded)


def _with_latents(
    family: Family, clips: list[PreparedClip], cache: Cache, dtype: torch.dtype
) -> tuple[list[PreparedClip], set[str]]:
    """The clips with the keys of their latents in a dtype, and those of these keys that have no entry.

    An entry in float32 serves as well: earlier versions stored no others.
    """
    keyed = [replace(clip, latents_key=_latents_key(family, clip, dtype)) for clip in clips]
    missing = _missing_latents(keyed, cache)
    if not missing or dtype == torch.float32:
        return keyed, missing
    lacking = [clip for clip in keyed if clip.latents_key in missing]
    wide, absent = _with_latents(family, lacking, cache, torch.float32)
    found = {
        clip.latents_key: other.latents_key
        for clip, other in zip(lacking, wide, strict=True)
        if other.latents_key not in absent
    }
    clips = [replace(clip, latents_key=found.get(clip.latents_key, clip.latents_key)) for clip in keyed]
    return clips, missing - found.keys()


def _latents_key(family: Family, clip: PreparedClip, dtype: torch.dtype) -> str:
    """The key of a clip's entry of latents in a dtype; without it for float32, as in earlier versions."""
    stored = {} if dtype == torch.float32 else {"stored": str(dtype)}
    vae = family.base.fingerprints(*family.vae_components)
    content = family.encoding | _content(clip) | stored
    return cache_key(kind="latents", family=family.name, task=family.task, vae=vae, **content)


def _missing_latents(clips: list[PreparedClip], cache: Cache) -> set[str]:
    # The first entry of each bucket is read for its shape, before the training.
    read = {clip.bucket: clip.latents_key for clip in reversed(clips)}
    return from_main(lambda: cache.missing("latents", [clip.latents_key for clip in clips], [*read.values()]))


def _encode_latents(
    family: Family, clips: list[PreparedClip], cache: Cache, device: torch.device, keep: Keep
) -> Generator[Event, None, list[PreparedClip]]:
    mine = [clips[index] for index in share(clips)]
    yield Progress("latents", 0, len(mine), "loading the VAE")
    models = Models.load(lambda: load_encoding_vae(family, device), lambda pipeline: pipeline.components.values())

    def encode(pipeline: DiffusionPipeline, clip: PreparedClip, pixels: Tensor) -> tuple[Tensors, Tensor]:
        return clip_latents(family, pipeline, clip, pixels), pixels

    with made_ahead(models, mine, clip_pixels, encode, lambda clip: clip.bucket.pixel_bytes) as encoded:

        def work(clip: PreparedClip) -> Later[PreparedClip]:
            tensors, pixels = encoded(clip)
            keep(clip, tensors, pixels)
            return store_later(cache, "latents", clip.latents_key, tensors, clip)

        return (yield from each_later("latents", clips, work, name=clip_name))


def clip_latents(family: Family, pipeline: DiffusionPipeline, clip: PreparedClip, pixels: Tensor) -> Tensors:
    """The tensors of a clip's entry of latents, in the dtype of its key, from its `clip_pixels`."""
    video = pixels.transpose(0, 1).float() / 127.5 - 1
    wide_key = _latents_key(family, clip, torch.float32)
    # The same noise whenever this entry is computed, in any dtype, and another for every clip.
    generator = torch.Generator().manual_seed(int(wide_key[:15], 16)) if family.samples_posterior else None
    tensors = family.encode_clip(pipeline, video, generator) | {"fps": torch.tensor(clip.fps)}
    return tensors if clip.latents_key == wide_key else narrowed(tensors, torch.bfloat16)


def _prepare_features(
    family: Family,
    crepa: CrepaSettings,
    dtype: FeatureDtype,
    clips: list[PreparedClip],
    cache: Cache,
    device: torch.device,
    kept: KeptFrames,
) -> Generator[Event, None, list[PreparedClip]]:
    encoder = fingerprint(encoder_folder(crepa))
    # Entries of earlier versions are in float16.
    stored = {} if dtype == "float16" else {"stored": dtype}
    inputs: dict[Bucket, TeacherInput] = {}
    keyed = []
    for clip in clips:
        if clip.bucket not in inputs:
            latents = cache.read("latents", clip.latents_key)["latents"]
            inputs[clip.bucket] = teacher_input(family, crepa, clip.bucket, latents)
        frames, size = inputs[clip.bucket]
        key = cache_key(kind="features", encoder=encoder, chosen=frames, size=size, **_content(clip), **stored)
        keyed.append(replace(clip, features_key=key))
    missing = from_main(lambda: cache.missing("features", [str(clip.features_key) for clip in keyed]))
    if not missing:
        return keyed
    tried = [clip for clip in keyed if clip.features_key in missing]
    encoded = yield from _encode_features(crepa, dtype, tried, inputs, cache, device, kept)
    release_memory()
    from_main(lambda: cache.remember("features", missing))
    return _without_failed(keyed, tried, encoded)


def _encode_features(
    crepa: CrepaSettings,
    dtype: FeatureDtype,
    clips: list[PreparedClip],
    inputs: Mapping[Bucket, TeacherInput],
    cache: Cache,
    device: torch.device,
    kept: KeptFrames,
) -> Generator[Event, None, list[PreparedClip]]:
    mine = [clips[index] for index in share(clips)]
    yield Progress("features", 0, len(mine), "loading the teacher")
    models = Models.load(lambda: load_teacher(crepa, device), lambda teacher: [teacher.model])

    def read(clip: PreparedClip) -> Tensor:
        frames = kept.take(clip.latents_key)
        return clip_pixels(clip)[inputs[clip.bucket].frames] if frames is None else frames

    def encode(teacher: Dinov2Teacher, clip: PreparedClip, frames: Tensor) -> Tensors:
        return stored_features(teacher.features(frames, inputs[clip.bucket].size), dtype)

    with made_ahead(models, mine, read, encode, lambda clip: clip.bucket.pixel_bytes) as encoded:

        def work(clip: PreparedClip) -> Later[PreparedClip]:
            return store_later(cache, "features", str(clip.features_key), encoded(clip), clip)

        return (yield from each_later("features", clips, work, name=clip_name))


def clip_name(clip: PreparedClip) -> str:
    """The name that messages give a clip."""
    return f"{clip.clip.path.name} at {clip.start:.2f} s" if clip.start else clip.clip.path.name


def _without_failed(
    clips: list[PreparedClip], tried: list[PreparedClip], succeeded: list[PreparedClip]
) -> list[PreparedClip]:
    # Not by the file: another source may use it in another form.
    failed = {clip.latents_key for clip in tried} - {clip.latents_key for clip in succeeded}
    return [clip for clip in clips if clip.latents_key not in failed]


def _content(clip: PreparedClip) -> dict[str, object]:
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
