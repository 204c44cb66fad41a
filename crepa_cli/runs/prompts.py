"""The prompts that a run samples its validation videos from."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from crepa_cli.data.cache import Cache
from crepa_cli.data.images import write_frame
from crepa_cli.data.prompts import Prompt, encode_prompts, prompt_key, require_prompts
from crepa_cli.data.scan import ClipForm, PreparedClip
from crepa_cli.data.video import decode
from crepa_cli.events import Event
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family, Tensors
from crepa_cli.profile import Profile, ValidationSettings
from crepa_cli.runs.folder import RunFolder

CAPTIONS = 2
"""Captions that are taken if the settings give no prompts."""


class Prompts(NamedTuple):
    """Encoded prompts, from the cache: one for each video, and the negative one."""

    validation: Sequence[Tensors]
    negative: Tensors


def with_prompts(profile: Profile, clips: Sequence[PreparedClip], run: RunFolder) -> Profile:
    """The settings with prompts: their own, or the first captions of the clips, written to the run's settings.

    For image to video, the first frames of these clips are written to the run's folder.

    Raises:
        UserError: if a file cannot be written.
    """
    validation, form = profile.validation, ClipForm.of(profile.data)
    if not validation.every or validation.prompts:
        return profile
    by_caption: dict[str, PreparedClip] = {}
    for clip in clips:
        by_caption.setdefault(clip.clip.caption, clip)
    chosen = dict(islice(by_caption.items(), CAPTIONS))
    images = []
    if profile.model.task == "i2v":
        for index, clip in enumerate(chosen.values()):
            path = run.first_frames / f"{index:02d}.png"
            size = {"width": form.width, "height": form.height}
            frame = decode(clip.clip.path, frames=1, fps=form.fps, start=clip.start, **size)[0]
            write_frame(path, frame)
            images.append(str(path))
    sampled = _with_validation(profile, prompts=tuple(chosen), images=tuple(images))
    run.write_profile(sampled)
    return sampled


def with_prompts_of(saved: Profile, profile: Profile) -> Profile:
    """The settings of a resumed run: without prompts of their own they keep those of the run."""
    if profile.validation.prompts:
        return profile
    return _with_validation(profile, prompts=saved.validation.prompts, images=saved.validation.images)


def _with_validation(profile: Profile, **settings: object) -> Profile:
    return profile.model_copy(update={"validation": profile.validation.model_copy(update=settings)})


def sampled_texts(validation: ValidationSettings, family: Family) -> list[str]:
    """The texts that videos are sampled from; none if validation is off."""
    if not validation.every:
        return []
    suffix = ""
    if validation.motion_score is not None and family.motion_suffix is not None:
        suffix = family.motion_suffix.format(validation.motion_score)
    return [prompt + suffix for prompt in validation.prompts]


def negative_prompt(validation: ValidationSettings, family: Family) -> str:
    """The negative prompt that videos are sampled with; empty for none."""
    if not validation.every:
        return ""
    return family.negative_prompt if validation.negative_prompt is None else validation.negative_prompt


def read_prompts(
    profile: Profile, family: Family, cache: Cache, device: torch.device
) -> Generator[Event, None, Prompts]:
    """The encoded prompts of the validation; those that are not in the cache are encoded.

    Raises:
        UserError: if one cannot be encoded.
    """
    dtype = torch_dtype(profile.model.dtype)
    prompts = [Prompt(text) for text in sampled_texts(profile.validation, family)]
    prompts.append(Prompt(negative_prompt(profile.validation, family), negative=True))
    require_prompts(prompts, (yield from encode_prompts(family, set(prompts), cache, device, dtype)))
    *sampled, unwanted = (
        cache.read("prompts", prompt_key(family, one.text, dtype, negative=one.negative)) for one in prompts
    )
    return Prompts(sampled, unwanted)
