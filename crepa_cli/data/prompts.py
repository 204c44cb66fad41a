"""Encoded captions and prompts in the cache."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from typing import NamedTuple

import torch

from crepa_cli.data.cache import Cache, cache_key
from crepa_cli.data.clips import ClipError
from crepa_cli.data.stages import each, share, store
from crepa_cli.errors import UserError
from crepa_cli.events import Event, Progress
from crepa_cli.heap import release_memory
from crepa_cli.models.family import Family
from crepa_cli.models.streaming import place
from crepa_cli.processes import from_main


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
