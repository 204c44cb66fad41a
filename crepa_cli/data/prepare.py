"""Preparation: everything that depends only on the clips is computed once and cached.

The three stages, prompts, latents and features, run one after another, so that text encoder, VAE and teacher are never
in memory together. A stage whose entries are all cached loads no model. The processes of a run share the missing work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor

from crepa_cli.alignment.grid import teaching_frames
from crepa_cli.data.buckets import Bucket, bucket_sizes, nearest_bucket, valid_frames
from crepa_cli.data.cache import Cache, cache_key, check_writable, not_finite
from crepa_cli.data.clips import Clip, ClipError, file_digest, find_clips
from crepa_cli.data.video import decode, frames_available, probe
from crepa_cli.errors import UserError, counted
from crepa_cli.events import ClipSkipped, Event, Progress
from crepa_cli.heap import release_memory
from crepa_cli.models.family import Family, Tensors
from crepa_cli.models.hub import fetch, fingerprint, read_config
from crepa_cli.processes import from_all, from_main
from crepa_cli.profile import CrepaSettings, DataSettings
from crepa_cli.teachers.dinov2 import ENCODERS, Dinov2Teacher, input_size

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    """A clip and the keys of its cache entries; `features_key` is None if no encoder is the teacher."""

    clip: Clip
    bucket: Bucket
    digest: str
    prompt_key: str = ""
    latents_key: str = ""
    features_key: str | None = None


def prepare(
    family: Family,
    folder: Path,
    form: ClipForm,
    crepa: CrepaSettings | None,
    prompts: Iterable[str],
    cache: Cache,
    device: torch.device,
    dtype: torch.dtype,
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

    Raises:
        UserError: if the cache cannot be written, no clip is usable, or a prompt of `prompts` cannot be encoded.
    """
    check_writable(cache.root, folder)
    cache.remove_leftovers()
    clips = yield from scan(family, folder, form)
    clips = yield from _prepare_prompts(family, clips, prompts, cache, device, dtype)
    clips = yield from _prepare_latents(family, clips, form.fps, cache, device)
    if crepa is not None:
        clips = yield from _prepare_features(family, crepa, clips, form.fps, cache, device)
    if not clips:
        raise UserError(f"no usable clips in {folder}; the messages above give the reasons")
    return clips


def prompt_key(family: Family, caption: str, dtype: torch.dtype) -> str:
    """The cache key of a caption's tensors."""
    return cache_key(
        kind="prompts",
        family=family.name,
        pipeline=family.pipeline_class,
        caption=caption,
        dtype=str(dtype),
        encoder=_digests(family.text_components, family),
    )


def scan(family: Family, folder: Path, form: ClipForm) -> Generator[Event, None, list[PreparedClip]]:
    """Find the clips of a folder and the bucket of each; yields progress and skipped clips.

    Raises:
        UserError: if the folder does not exist or has no usable clips.
    """
    found = find_clips(folder)
    for skipped in found.skipped:
        yield ClipSkipped(skipped.name, skipped.reason)

    def place(clip: Clip) -> PreparedClip:
        return PreparedClip(clip, bucket_of(clip, family, form), file_digest(clip.path))

    clips = yield from _each("scanning", found.clips, place, name=lambda clip: clip.path.name)
    if not clips:
        raise UserError(
            f"no usable clips in {folder}: {len(found.clips) + len(found.skipped)} found, all skipped for the reasons "
            "given above"
        )
    return clips


def bucket_of(clip: Clip, family: Family, form: ClipForm) -> Bucket:
    """The size and frame count at which a clip is trained.

    Raises:
        ClipError: if it cannot be read or is too short.
    """
    info = probe(clip.path)
    available = frames_available(info, form.fps)
    frames = valid_frames(available, form.frames, family.frame_multiple)
    if frames is None:
        raise ClipError(
            f"too short: {counted(available, 'frame')} at {form.fps:g} frames per second, "
            f"needs at least {min(form.frames, family.frame_multiple + 1)}"
        )
    sizes = bucket_sizes(form.width, form.height, family.size_multiple)
    size = nearest_bucket(info.width, info.height, sizes)
    return Bucket(frames, size.height, size.width)


def clip_pixels(clip: PreparedClip, fps: float) -> Tensor:
    """The frames of a clip, resized for training: uint8 `[F, 3, H, W]`."""
    bucket = clip.bucket
    return decode(clip.clip.path, frames=bucket.frames, fps=fps, width=bucket.width, height=bucket.height)


def load_teacher(crepa: CrepaSettings, device: torch.device) -> Dinov2Teacher:
    """Load the encoder named in the settings."""
    return Dinov2Teacher.load(encoder_folder(crepa), device)


def encoder_folder(crepa: CrepaSettings) -> Path:
    """The local folder of the encoder, downloaded if necessary."""
    return fetch(ENCODERS.get(crepa.encoder, crepa.encoder))


def encoder_config(crepa: CrepaSettings) -> dict[str, Any]:
    """The encoder's configuration, with its patch size and the width of its features."""
    return read_config(ENCODERS.get(crepa.encoder, crepa.encoder), "config.json")


def _prepare_prompts(
    family: Family,
    clips: list[PreparedClip],
    prompts: Iterable[str],
    cache: Cache,
    device: torch.device,
    dtype: torch.dtype,
) -> Generator[Event, None, list[PreparedClip]]:
    prompts = set(prompts)
    texts = sorted({clip.clip.caption for clip in clips} | prompts)
    keys = {text: prompt_key(family, text, dtype) for text in texts}
    missing = from_main(lambda: [text for text in texts if not cache.has("prompts", keys[text])])
    reasons: dict[str, str] = {}
    if missing:
        reasons = yield from _encode_prompts(family, {text: keys[text] for text in missing}, cache, device, dtype)
        release_memory()
    for text in sorted(reasons.keys() & prompts):
        where = f"the validation prompt {text!r}" if text else "the empty prompt"
        raise UserError(f"{where} cannot be used: {reasons[text]}. Try another model.dtype")
    for clip in clips:
        if clip.clip.caption in reasons:
            yield ClipSkipped(_clip_name(clip), f"its caption: {reasons[clip.clip.caption]}")
    usable = [clip for clip in clips if clip.clip.caption not in reasons]
    return [replace(clip, prompt_key=keys[clip.clip.caption]) for clip in usable]


def _encode_prompts(
    family: Family, keys: dict[str, str], cache: Cache, device: torch.device, dtype: torch.dtype
) -> Generator[Event, None, dict[str, str]]:
    """Encode the texts, and return why some of them cannot be used."""
    yield Progress("prompts", 0, len(_share(keys)), "loading the text encoder")
    pipeline = family.load_text_pipeline(dtype).to(device)

    def encode(text: str) -> tuple[str, str] | None:
        try:
            _store(cache, "prompts", keys[text], family.encode_prompt(pipeline, text))
        except ClipError as error:
            return text, str(error)
        return None

    failed = yield from _each("prompts", list(keys), encode, name=repr)
    return dict(one for one in failed if one is not None)


def _prepare_latents(
    family: Family, clips: list[PreparedClip], fps: float, cache: Cache, device: torch.device
) -> Generator[Event, None, list[PreparedClip]]:
    vae = _digests(family.vae_components, family)

    def key(clip: PreparedClip) -> str:
        return cache_key(kind="latents", family=family.name, task=family.task, vae=vae, **_content(clip, fps))

    clips = [replace(clip, latents_key=key(clip)) for clip in clips]
    missing = from_main(lambda: [clip for clip in clips if not cache.has("latents", clip.latents_key)])
    if not missing:
        return clips
    encoded = yield from _encode_latents(family, missing, fps, cache, device)
    release_memory()
    return _without_failed(clips, missing, encoded)


def _encode_latents(
    family: Family, clips: list[PreparedClip], fps: float, cache: Cache, device: torch.device
) -> Generator[Event, None, list[PreparedClip]]:
    yield Progress("latents", 0, len(_share(clips)), "loading the VAE")
    pipeline = family.load_vae_pipeline().to(device)

    def encode(clip: PreparedClip) -> PreparedClip:
        video = clip_pixels(clip, fps).transpose(0, 1).float() / 127.5 - 1
        tensors = family.encode_clip(pipeline, video) | {"fps": torch.tensor(fps)}
        _store(cache, "latents", clip.latents_key, tensors)
        return clip

    return (yield from _each("latents", clips, encode, name=_clip_name))


def _prepare_features(
    family: Family, crepa: CrepaSettings, clips: list[PreparedClip], fps: float, cache: Cache, device: torch.device
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
        key = cache_key(kind="features", encoder=encoder, chosen=frames, size=size, **_content(clip, fps))
        inputs[key] = frames, size
        keyed.append(replace(clip, features_key=key))
    missing = from_main(lambda: [clip for clip in keyed if not cache.has("features", str(clip.features_key))])
    if not missing:
        return keyed
    encoded = yield from _encode_features(crepa, missing, inputs, fps, cache, device)
    release_memory()
    return _without_failed(keyed, missing, encoded)


def _encode_features(
    crepa: CrepaSettings,
    clips: list[PreparedClip],
    inputs: dict[str, tuple[list[int], tuple[int, int]]],
    fps: float,
    cache: Cache,
    device: torch.device,
) -> Generator[Event, None, list[PreparedClip]]:
    yield Progress("features", 0, len(_share(clips)), "loading the teacher")
    teacher = load_teacher(crepa, device)

    def encode(clip: PreparedClip) -> PreparedClip:
        frames, size = inputs[str(clip.features_key)]
        features = teacher.features(clip_pixels(clip, fps)[frames], size)
        _store(cache, "features", str(clip.features_key), {"features": features})
        return clip

    return (yield from _each("features", clips, encode, name=_clip_name))


def _each(
    stage: str, items: Sequence[Item], work: Callable[[Item], Result], *, name: Callable[[Item], str]
) -> Generator[Event, None, list[Result]]:
    """Process each item, yield progress and return the results; items with unreadable clips are skipped.

    The processes of a run split the items, and each process returns all results. A UserError in one is raised in all.
    """
    mine = _share(items)
    outcomes: list[tuple[int, Result | ClipError | UserError]] = []
    for done, index in enumerate(mine):
        yield Progress(stage, done, len(mine), name(items[index]))
        try:
            with torch.no_grad():
                outcomes.append((index, work(items[index])))
        except ClipError as error:
            outcomes.append((index, error))
        except UserError as error:
            outcomes.append((index, error))
            break
    else:
        yield Progress(stage, len(mine), len(mine))
    results = []
    for index, outcome in sorted(from_all(outcomes), key=itemgetter(0)):
        if isinstance(outcome, UserError):
            raise outcome
        if isinstance(outcome, ClipError):
            yield ClipSkipped(name(items[index]), str(outcome))
        else:
            results.append(outcome)
    return results


def _share(items: Collection[object]) -> range:
    """The indices of the items that this process works on."""
    state = PartialState()
    return range(len(items))[state.process_index :: state.num_processes]


def _clip_name(clip: PreparedClip) -> str:
    return clip.clip.path.name


def _without_failed(
    clips: list[PreparedClip], tried: list[PreparedClip], succeeded: list[PreparedClip]
) -> list[PreparedClip]:
    failed = {clip.clip.path for clip in tried} - {clip.clip.path for clip in succeeded}
    return [clip for clip in clips if clip.clip.path not in failed]


def _content(clip: PreparedClip, fps: float) -> dict[str, object]:
    """The part of a cache key that determines a clip's pixels."""
    bucket = clip.bucket
    return {
        "digest": clip.digest,
        "fps": fps,
        "frames": bucket.frames,
        "height": bucket.height,
        "width": bucket.width,
    }


def _digests(components: Iterable[str], family: Family) -> list[str]:
    folder = family.base.fetch()
    return [fingerprint(folder / name) for name in components]


def _store(cache: Cache, kind: str, key: str, tensors: Tensors) -> None:
    """Cache tensors that can be trained on.

    Raises:
        ClipError: if they are not finite; every step with them would be skipped.
    """
    if names := not_finite(tensors):
        raise ClipError(f"{', '.join(names)}: computed, and not finite (NaN or infinity)")
    cache.write(kind, key, tensors)
