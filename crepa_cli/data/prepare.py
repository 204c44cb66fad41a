"""Preparation: everything that depends only on the clips is computed once and cached.

The three stages, prompts, latents and features, run one after another, so that text encoder, VAE and teacher are never
in memory together. A stage whose entries are all cached loads no model. The processes of a run share the missing work.
Threads decode clips ahead of the models, keep some frames for the teacher, and write entries behind the models.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from crepa_cli.data.ahead import KeptFrames, Models, made_ahead
from crepa_cli.data.buckets import Bucket
from crepa_cli.data.cache import Cache, cache_key, check_writable
from crepa_cli.data.compact import narrowed, stored_features
from crepa_cli.data.encoder import TeacherInput, encoder_folder, load_encoding_vae, load_teacher, teacher_input
from crepa_cli.data.prompts import Prompt, encode_prompts, prompt_key, require_prompts
from crepa_cli.data.scan import ClipForm, PreparedClip, clip_name, clip_pixels, key_parts, scan
from crepa_cli.data.stages import Later, each_later, share, store_later
from crepa_cli.errors import UserError
from crepa_cli.events import ClipSkipped, Event, Progress
from crepa_cli.heap import release_memory
from crepa_cli.hub.read import fingerprint
from crepa_cli.models.family import Family, Tensors
from crepa_cli.processes import from_main
from crepa_cli.profile import CrepaSettings, FeatureDtype
from crepa_cli.teachers.dinov2 import Dinov2Teacher

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
    content = family.encoding | key_parts(clip) | stored
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
        key = cache_key(kind="features", encoder=encoder, chosen=frames, size=size, **key_parts(clip), **stored)
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


def _without_failed(
    clips: list[PreparedClip], tried: list[PreparedClip], succeeded: list[PreparedClip]
) -> list[PreparedClip]:
    # Not by the file: another source may use it in another form.
    failed = {clip.latents_key for clip in tried} - {clip.latents_key for clip in succeeded}
    return [clip for clip in clips if clip.latents_key not in failed]
