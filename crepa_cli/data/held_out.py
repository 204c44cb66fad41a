"""Which clips are held out of the training, so that their loss shows what it does to clips it has never seen."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from crepa_cli.data.cache import cache_folder
from crepa_cli.data.index import Index
from crepa_cli.data.scan import ClipForm, PreparedClip, scan
from crepa_cli.data.sources import scan_sources
from crepa_cli.data.windows import Sampling
from crepa_cli.errors import UserError, counted, listed
from crepa_cli.events import Event, Notice
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile


def held_out_folder(profile: Profile) -> Path | None:
    """The folder of held-out clips; None if the settings name none or validate nothing."""
    path = profile.data.validation_path
    return Path(path) if path is not None and profile.validation.every else None


def scan_all(family: Family, profile: Profile) -> Generator[Event, None, list[PreparedClip]]:
    """Find the clips of a run, those that are held out among them; yields the events of `scan`.

    Raises:
        UserError: if a folder does not exist or has no usable clips, or if no clip is left to train on.
    """
    data, form, held_out = profile.data, ClipForm.of(profile.data), held_out_folder(profile)
    index = Index(cache_folder(data))
    clips = yield from scan_sources(family, data, index)
    if data.validation_share is not None:
        chosen = choose({clip.digest for clip in clips}, data.validation_share, profile.train.seed)
        clips = [replace(clip, held_out=clip.digest in chosen) for clip in clips]
    if held_out is not None:
        others = yield from scan(family, held_out, form, index, Sampling.of(data), caption_lines=data.caption_lines)
        yield from _trained_on(clips, others)
        clips += [replace(clip, held_out=True) for clip in others]
    divided(clips, profile)
    return clips


def choose(digests: Collection[str], share: float, seed: int) -> set[str]:
    """The clips that are held out, by the digest of their content.

    Each clip is chosen by its own content and the seed, so that a clip that is added changes nothing for the others.
    If that chooses none, it is the clip that the next larger share would choose.
    """
    places = {digest: _place(digest, seed) for digest in digests}
    lowest = min(places.values(), default=0.0)
    return {digest for digest, place in places.items() if place < share or place == lowest}


def _place(digest: str, seed: int) -> float:
    """A number in [0, 1), evenly spread over the clips."""
    number = hashlib.blake2b(f"held out/{seed}/{digest}".encode(), digest_size=8).digest()
    return int.from_bytes(number, "big") / 2**64


def _trained_on(clips: Sequence[PreparedClip], held_out: Sequence[PreparedClip]) -> Iterator[Notice]:
    """Name the held-out clips that are among those to train on."""
    known = {clip.digest for clip in clips}
    if names := [clip.clip.path.name for clip in held_out if clip.digest in known]:
        yield Notice(
            f"{counted(len(names), 'clip')} of data.validation_path {'is' if len(names) == 1 else 'are'} in the "
            f"training folder as well, with the same content: {listed(names)}. Their loss says nothing about unseen "
            "clips; remove them from one of the folders"
        )


def divided(clips: Sequence[PreparedClip], profile: Profile) -> tuple[list[PreparedClip], list[PreparedClip]]:
    """The clips to train on, and those that are held out.

    Raises:
        UserError: if there are none to train on, or none held out though the settings ask for some.
    """
    data = profile.data
    trained, held_out = ([clip for clip in clips if clip.held_out is kind] for kind in (False, True))
    if not trained:
        raise UserError(
            f"no clip is left to train on: data.validation_share = {data.validation_share} holds out all of the "
            f"{counted(len(held_out), 'usable clip')}; lower it, or add clips"
            if data.validation_share is not None
            else "no usable clips; the messages above give the reasons"
        )
    asked = data.validation_share is not None or held_out_folder(profile) is not None
    if asked and not held_out:
        raise UserError("no held-out clip is usable; the messages above give the reasons")
    return trained, held_out
