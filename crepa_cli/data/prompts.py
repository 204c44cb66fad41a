"""Encoded captions and prompts in the cache."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline

from crepa_cli.data.ahead import Models, made_ahead
from crepa_cli.data.cache import Cache, cache_key
from crepa_cli.data.clips import ClipError
from crepa_cli.data.stages import Later, each_later, share, store
from crepa_cli.errors import UserError
from crepa_cli.events import Event, Progress
from crepa_cli.heap import release_memory
from crepa_cli.models.family import Family, Tensors
from crepa_cli.models.streaming import place
from crepa_cli.processes import from_main

PROMPT_BYTES = 2**16
"""More than a prompt takes: each is encoded by itself."""


class Prompt(NamedTuple):
    """A text to encode, as a caption or as a negative prompt."""

    text: str
    negative: bool = False


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


def encode_prompts(
    family: Family,
    prompts: Collection[Prompt],
    cache: Cache,
    device: torch.device,
    dtype: torch.dtype,
    trusted: Collection[Prompt] = (),
) -> Generator[Event, None, dict[Prompt, str]]:
    """Fill the cache for some texts, and return why some of them cannot be used, by text.

    Entries of `trusted` texts are verified when they are read, those of the others here.
    """
    keys = {one: prompt_key(family, one.text, dtype, negative=one.negative) for one in sorted(prompts)}
    doubted = {keys[one] for one in keys.keys() - set(trusted)}
    missing = from_main(lambda: cache.missing("prompts", keys.values(), doubted))
    if not missing:
        return {}
    keys = {one: key for one, key in keys.items() if key in missing}
    reasons = yield from _encode_missing(family, keys, cache, device, dtype)
    release_memory()
    from_main(lambda: cache.remember("prompts", keys.values()))
    return reasons


def _encode_missing(
    family: Family, keys: dict[Prompt, str], cache: Cache, device: torch.device, dtype: torch.dtype
) -> Generator[Event, None, dict[Prompt, str]]:
    prompts = list(keys)
    mine = [prompts[index] for index in share(prompts)]
    yield Progress("prompts", 0, len(mine), "loading the text encoder")

    def load() -> DiffusionPipeline:
        pipeline = family.load_text_pipeline(dtype)
        for name in family.text_encoders:
            place(getattr(pipeline, name), device, streamed=family.streams_text_encoders)
        return pipeline

    def encode(pipeline: DiffusionPipeline, prompt: Prompt, _: None) -> Tensors:
        return (family.encode_negative_prompt if prompt.negative else family.encode_prompt)(pipeline, prompt.text)

    def stored(prompt: Prompt, tensors: Tensors) -> tuple[Prompt, str] | None:
        try:
            store(cache, "prompts", keys[prompt], tensors)
        except ClipError as error:
            return prompt, str(error)
        return None

    models = Models.load(load, lambda pipeline: pipeline.components.values())
    with made_ahead(models, mine, lambda _: None, encode, lambda _: PROMPT_BYTES) as encoded:

        def work(prompt: Prompt) -> Later[tuple[Prompt, str] | None]:
            return Later(partial(stored, prompt, encoded(prompt)))

        failed = yield from each_later("prompts", prompts, work, name=lambda prompt: repr(prompt.text))
    return dict(one for one in failed if one is not None)


def require_prompts(prompts: Collection[Prompt], reasons: Mapping[Prompt, str]) -> None:
    """Raise a UserError that names the first of some prompts that cannot be used, with the reason."""
    for prompt in sorted(reasons.keys() & set(prompts)):
        kind = "negative" if prompt.negative else "validation"
        where = f"the {kind} prompt {prompt.text!r}" if prompt.text else "the empty prompt"
        raise UserError(f"{where} cannot be used: {reasons[prompt]}. Try another model.dtype")
