"""Preparation: everything that depends only on the clips is computed once and cached.

The three stages, prompts, latents and features, run one after another, so that text encoder, VAE and teacher are never
in memory together. A stage whose entries are all cached loads no model. The processes of a run share the missing work.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crepa_cli.alignment.grid import teaching_frames
from crepa_cli.data.buckets import Bucket, Fit, Size, bucket_sizes, fit, nearest_bucket, valid_frames
from crepa_cli.data.cache import Cache, cache_key, check_writable
from crepa_cli.data.clips import Clip, ClipError, file_digest, find_clips
from crepa_cli.data.looks import changed_looks
from crepa_cli.data.stages import each, share, store
from crepa_cli.data.video import DECODING_VERSION, VideoInfo, decode, frames_available, probe
from crepa_cli.errors import UserError, counted, listed
from crepa_cli.events import ClipSkipped, Event, Notice, Progress
from crepa_cli.heap import release_memory
from crepa_cli.hub.download import Need, fetch
from crepa_cli.hub.read import fingerprint, read_config
from crepa_cli.models.family import Family
from crepa_cli.models.streaming import place
from crepa_cli.processes import from_main
from crepa_cli.profile import CrepaSettings, DataSettings
from crepa_cli.teachers.dinov2 import ENCODERS, Dinov2Teacher, input_size

SAME_RATE = 0.99
"""Clips that have this share of a frame rate or more are trained frame by frame, as if they had it: 29.97 is 30."""


class Prompt(NamedTuple):
    """A text to encode, as a caption or as a negative prompt."""

    text: str
    negative: bool = False


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


@dataclass(frozen=True)
class PreparedClip:
    """A clip, the frame rate it is trained at, and the keys of its cache entries.

    `repeated` of its frames repeat the one before. `features_key` is None if no encoder is the teacher. A clip that is
    `held_out` is never trained on.
    """

    clip: Clip
    info: VideoInfo
    bucket: Bucket
    digest: str
    fps: float
    repeated: int = 0
    prompt_key: str = ""
    latents_key: str = ""
    features_key: str | None = None
    held_out: bool = False

    @property
    def fit(self) -> Fit:
        """How much the clip is enlarged and cropped for its bucket."""
        return fit(self.info.width, self.info.height, Size(self.bucket.width, self.bucket.height))


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
        dtype: dtype of the text encoder.
        negative_prompt: of the validation, to encode too.
        scanned: finds the clips; None for `scan`.

    Raises:
        UserError: if the cache cannot be written, no clip is usable, or a prompt of `prompts` cannot be encoded.
    """
    check_writable(cache.root, folder)
    cache.remove_leftovers()
    clips = yield from scanned or scan(family, folder, form)
    texts = {Prompt(text) for text in prompts} | ({Prompt(negative_prompt, True)} if negative_prompt else set())
    captions = {Prompt(clip.clip.caption) for clip in clips}
    reasons = yield from encode_prompts(family, texts | captions, cache, device, dtype)
    require_prompts(texts, reasons)
    clips = yield from _with_captions(family, clips, reasons, dtype)
    clips = yield from _prepare_latents(family, clips, cache, device)
    if crepa is not None:
        clips = yield from _prepare_features(family, crepa, clips, cache, device)
    if not clips:
        raise UserError(f"no usable clips in {folder}; the messages above give the reasons")
    return clips


def prompt_key(family: Family, caption: str, dtype: torch.dtype, *, negative: bool = False) -> str:
    """The cache key of a caption's tensors, or of a negative prompt's; without a text they are the same."""
    difference = {"negative": True} if negative and caption else {}
    return cache_key(
        **difference,
        kind="prompts",
        family=family.name,
        pipeline=family.pipeline_class,
        caption=caption,
        dtype=str(dtype),
        encoder=family.base.fingerprints(*family.text_components),
        # Entries of earlier versions have the pipeline's length.
        **({"tokens": family.caption_tokens} if family.caption_tokens else {}),
    )


def scan(family: Family, folder: Path, form: ClipForm) -> Generator[Event, None, list[PreparedClip]]:
    """Find the clips of a folder and the bucket of each; yields progress, skipped clips and notices.

    Raises:
        UserError: if the folder does not exist or has no usable clips.
    """
    found = find_clips(folder)
    for skipped in found.skipped:
        yield ClipSkipped(skipped.name, skipped.reason)
    if found.left_out:
        yield Notice(f"{counted(len(found.left_out), 'file')} left out, of no kind of video: {listed(found.left_out)}")
    clips = yield from each(
        "scanning", found.clips, lambda clip: _placed(clip, family, form), name=lambda clip: clip.path.name
    )
    if not clips:
        raise UserError(
            f"no usable clips in {folder}: {len(found.clips) + len(found.skipped)} found, all skipped for the reasons "
            "given above"
        )
    for clip in clips:
        if clip.repeated:
            yield Notice(
                f"{_clip_name(clip)} is slower than data.fps = {form.fps:g}: {clip.repeated} of its "
                f"{clip.bucket.frames} frames repeat the one before"
            )
    yield from _unused(clips, form)
    yield from changed_looks([(_clip_name(clip), clip.info, clip.bucket) for clip in clips])
    return clips


def _unused(clips: Sequence[PreparedClip], form: ClipForm) -> Iterator[Notice]:
    """Say what part of long clips is trained on."""
    long = [clip for clip in clips if frames_available(clip.info, clip.fps) > form.frames]
    if long:
        share = sum(clip.bucket.frames / clip.fps for clip in clips) / sum(clip.info.duration for clip in clips)
        yield Notice(
            f"{len(long)} of {counted(len(clips), 'clip')} are longer than data.frames = {form.frames}: only the first "
            f"{form.frames / form.fps:.1f} s of each are trained on, {share:.0%} of all seconds; cut long clips into "
            "several to use the rest"
        )


def _placed(clip: Clip, family: Family, form: ClipForm) -> PreparedClip:
    """The clip with the size, the frame count and the frame rate at which it is trained.

    Raises:
        ClipError: if it cannot be read or is too short.
    """
    info, fps = probe(clip.path), form.fps
    frames = valid_frames(frames_available(info, fps), form.frames, family.frame_multiple)
    repeated = _repeated(info, frames or 1, fps)
    if repeated and (family.takes_frame_rate or info.fps >= SAME_RATE * fps):
        fps, repeated = info.fps, 0
        frames = valid_frames(frames_available(info, fps), form.frames, family.frame_multiple)
    if frames is None:
        raise ClipError(
            f"too short: {counted(frames_available(info, fps), 'frame')} at {fps:g} frames per second, "
            f"needs at least {min(form.frames, family.frame_multiple + 1)}"
        )
    sizes = bucket_sizes(form.width, form.height, family.size_multiple)
    size = sizes[0] if family.only_size else nearest_bucket(info.width, info.height, sizes)
    return PreparedClip(clip, info, Bucket(frames, size.height, size.width), file_digest(clip.path), fps, repeated)


def _repeated(info: VideoInfo, frames: int, fps: float) -> int:
    """How many of the first `frames` frames at a frame rate repeat the one before, if the clip's own rate is steady."""
    shown = math.floor(((frames - 1) / fps + info.rounding) * info.fps) + 1
    return max(0, frames - shown)


def clip_pixels(clip: PreparedClip) -> Tensor:
    """The frames of a clip, resized for training: uint8 `[F, 3, H, W]`."""
    bucket = clip.bucket
    return decode(clip.clip.path, frames=bucket.frames, fps=clip.fps, width=bucket.width, height=bucket.height)


def load_teacher(crepa: CrepaSettings, device: torch.device) -> Dinov2Teacher:
    """Load the encoder named in the settings."""
    return Dinov2Teacher.load(encoder_folder(crepa), device)


def encoder_need(crepa: CrepaSettings) -> Need:
    """The repository or folder of the encoder."""
    return Need(ENCODERS.get(crepa.encoder, crepa.encoder), crepa.encoder_revision, ("",))


def encoder_folder(crepa: CrepaSettings) -> Path:
    """The local folder of the encoder, downloaded if necessary."""
    return fetch(encoder_need(crepa))


def encoder_config(crepa: CrepaSettings) -> dict[str, Any]:
    """The encoder's configuration, with its patch size and the width of its features."""
    need = encoder_need(crepa)
    return read_config(need.name, "config.json", need.revision)


def encode_prompts(
    family: Family, prompts: Collection[Prompt], cache: Cache, device: torch.device, dtype: torch.dtype
) -> Generator[Event, None, dict[Prompt, str]]:
    """Fill the cache for some texts, and return why some of them cannot be used; see `prepare`."""
    keys = {one: prompt_key(family, one.text, dtype, negative=one.negative) for one in sorted(prompts)}
    missing = from_main(lambda: [one for one in keys if not cache.has("prompts", keys[one])])
    if not missing:
        return {}
    reasons = yield from _encode_missing(family, {one: keys[one] for one in missing}, cache, device, dtype)
    release_memory()
    return reasons


def _encode_missing(
    family: Family, keys: dict[Prompt, str], cache: Cache, device: torch.device, dtype: torch.dtype
) -> Generator[Event, None, dict[Prompt, str]]:
    yield Progress("prompts", 0, len(share(keys)), "loading the text encoder")
    pipeline = family.load_text_pipeline(dtype)
    for name in family.text_encoders:
        place(getattr(pipeline, name), device, streamed=family.streams_text_encoders)

    def encode(prompt: Prompt) -> tuple[Prompt, str] | None:
        encode_text = family.encode_negative_prompt if prompt.negative else family.encode_prompt
        try:
            store(cache, "prompts", keys[prompt], encode_text(pipeline, prompt.text))
        except ClipError as error:
            return prompt, str(error)
        return None

    failed = yield from each("prompts", list(keys), encode, name=lambda prompt: repr(prompt.text))
    return dict(one for one in failed if one is not None)


def require_prompts(prompts: Collection[Prompt], reasons: Mapping[Prompt, str]) -> None:
    """Raise a UserError that names the first of some prompts that cannot be used, with the reason."""
    for prompt in sorted(reasons.keys() & set(prompts)):
        kind = "negative" if prompt.negative else "validation"
        where = f"the {kind} prompt {prompt.text!r}" if prompt.text else "the empty prompt"
        raise UserError(f"{where} cannot be used: {reasons[prompt]}. Try another model.dtype")


def _with_captions(
    family: Family, clips: list[PreparedClip], reasons: Mapping[Prompt, str], dtype: torch.dtype
) -> Generator[Event, None, list[PreparedClip]]:
    """The clips with the keys of their captions; those whose caption cannot be used are skipped."""
    usable = []
    for clip in clips:
        caption = clip.clip.caption
        if reason := reasons.get(Prompt(caption)):
            yield ClipSkipped(_clip_name(clip), f"its caption: {reason}")
        else:
            usable.append(replace(clip, prompt_key=prompt_key(family, caption, dtype)))
    return usable


def _prepare_latents(
    family: Family, clips: list[PreparedClip], cache: Cache, device: torch.device
) -> Generator[Event, None, list[PreparedClip]]:
    vae = family.base.fingerprints(*family.vae_components)

    def key(clip: PreparedClip) -> str:
        content = family.encoding | _content(clip)
        return cache_key(kind="latents", family=family.name, task=family.task, vae=vae, **content)

    clips = [replace(clip, latents_key=key(clip)) for clip in clips]
    missing = from_main(lambda: [clip for clip in clips if not cache.has("latents", clip.latents_key)])
    if not missing:
        return clips
    encoded = yield from _encode_latents(family, missing, cache, device)
    release_memory()
    return _without_failed(clips, missing, encoded)


def _encode_latents(
    family: Family, clips: list[PreparedClip], cache: Cache, device: torch.device
) -> Generator[Event, None, list[PreparedClip]]:
    yield Progress("latents", 0, len(share(clips)), "loading the VAE")
    pipeline = family.load_vae_pipeline()
    pipeline.vae.decoder = None  # up to half of the weights, which no clip needs
    pipeline.to(device)

    def encode(clip: PreparedClip) -> PreparedClip:
        video = clip_pixels(clip).transpose(0, 1).float() / 127.5 - 1
        # The same noise whenever this entry is computed, and another for every clip.
        generator = torch.Generator().manual_seed(int(clip.latents_key[:15], 16)) if family.samples_posterior else None
        tensors = family.encode_clip(pipeline, video, generator) | {"fps": torch.tensor(clip.fps)}
        store(cache, "latents", clip.latents_key, tensors)
        return clip

    return (yield from each("latents", clips, encode, name=_clip_name))


def _prepare_features(
    family: Family, crepa: CrepaSettings, clips: list[PreparedClip], cache: Cache, device: torch.device
) -> Generator[Event, None, list[PreparedClip]]:
    folder = encoder_folder(crepa)
    encoder = fingerprint(folder)
    patch_size = encoder_config(crepa)["patch_size"]
    inputs: dict[str, tuple[list[int], tuple[int, int]]] = {}
    keyed = []
    for clip in clips:
        grid = family.token_grid(cache.read("latents", clip.latents_key)["latents"][None])
        frames = teaching_frames(clip.bucket.frames, grid.frames, crepa.teacher_frame)
        size = input_size(crepa.encoder_image_size, grid, patch_size)
        key = cache_key(kind="features", encoder=encoder, chosen=frames, size=size, **_content(clip))
        inputs[key] = frames, size
        keyed.append(replace(clip, features_key=key))
    missing = from_main(lambda: [clip for clip in keyed if not cache.has("features", str(clip.features_key))])
    if not missing:
        return keyed
    encoded = yield from _encode_features(crepa, missing, inputs, cache, device)
    release_memory()
    return _without_failed(keyed, missing, encoded)


def _encode_features(
    crepa: CrepaSettings,
    clips: list[PreparedClip],
    inputs: dict[str, tuple[list[int], tuple[int, int]]],
    cache: Cache,
    device: torch.device,
) -> Generator[Event, None, list[PreparedClip]]:
    yield Progress("features", 0, len(share(clips)), "loading the teacher")
    teacher = load_teacher(crepa, device)

    def encode(clip: PreparedClip) -> PreparedClip:
        frames, size = inputs[str(clip.features_key)]
        features = teacher.features(clip_pixels(clip)[frames], size)
        store(cache, "features", str(clip.features_key), {"features": features})
        return clip

    return (yield from each("features", clips, encode, name=_clip_name))


def _clip_name(clip: PreparedClip) -> str:
    return clip.clip.path.name


def _without_failed(
    clips: list[PreparedClip], tried: list[PreparedClip], succeeded: list[PreparedClip]
) -> list[PreparedClip]:
    failed = {clip.clip.path for clip in tried} - {clip.clip.path for clip in succeeded}
    return [clip for clip in clips if clip.clip.path not in failed]


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
    }
