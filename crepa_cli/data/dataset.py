"""Batches of prepared clips, read from the cache while the previous step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.data.buckets import Bucket
from crepa_cli.data.cache import Cache, DamagedEntryError
from crepa_cli.data.clips import ClipError
from crepa_cli.data.compact import narrowed, restored_features
from crepa_cli.data.healing import Healing
from crepa_cli.data.scan import PreparedClip, clip_name
from crepa_cli.errors import RunError, UserError
from crepa_cli.events import ClipSkipped
from crepa_cli.models.family import Tensors

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Clips of one bucket.

    `tensors` holds the latents and the captions' tensors, with a batch dimension. `features` `[B, T', N', D]` lie on
    `teacher_grid`; both are None if features were not read.
    """

    clips: tuple[str, ...]
    tensors: Tensors
    features: Tensor | None
    teacher_grid: TokenGrid | None


class DamagedClipError(UserError):
    """An entry of a clip is damaged.

    Attributes:
        index: of the clip.
        damage: the entry, and what is wrong with it.
    """

    def __init__(self, index: int, damage: DamagedEntryError) -> None:
        super().__init__(str(damage))
        self.index = index
        self.damage = damage


class ClipDataset:
    """The prepared clips of a run.

    Args:
        clips: from `prepare`.
        cache: the cache with their entries.
        empty_prompt_key: the entry of the empty caption, which replaces a dropped one.
        dtype: dtype of latents in the cache. Those of an entry in float32 are rounded to it, so that it does not
            matter which entries the cache has.
        healing: makes damaged entries again; without it they are errors.
    """

    def __init__(
        self,
        clips: Sequence[PreparedClip],
        cache: Cache,
        empty_prompt_key: str,
        dtype: torch.dtype,
        healing: Healing | None = None,
    ) -> None:
        self.clips = clips
        self.cache = cache
        self.empty_prompt_key = empty_prompt_key
        self.dtype = dtype
        self.healing = healing
        self._left_out: set[int] = set()
        self._windows = _windows(clips)

    def buckets(self) -> list[list[int]]:
        """The indices of the clips in each bucket; of windows of which each visit draws one, that of the first."""
        buckets: dict[Bucket, list[int]] = {}
        for index in self._windows:
            buckets.setdefault(self.clips[index].bucket, []).append(index)
        return [buckets[key] for key in sorted(buckets)]

    def drawn(self, index: int, place: float) -> int:
        """The window of a clip from `buckets` that a place in [0, 1) stands for; itself if it has no others."""
        windows = self._windows[index]
        return windows[int(place * len(windows))]

    def source(self, index: int) -> int:
        """The number of the source that a clip is from, in the order of the settings."""
        return self.clips[index].source

    def batch(self, indices: Sequence[int], captions: Sequence[float | None], with_features: bool) -> Batch:
        """Read the entries of some clips of one bucket and stack them.

        Args:
            indices: indices of the clips; the next one of its bucket stands in for one that has been left out.
            captions: for each clip, a number in [0, 1) that chooses one of its captions, the first for 0; None for the
                empty caption.
            with_features: whether to read features, if the clips have any.

        Raises:
            DamagedClipError: if an entry is damaged.
        """
        indices = [self._stand_in(index) for index in indices]
        clips = [self.clips[index] for index in indices]
        with_features = with_features and all(clip.features_key for clip in clips)
        samples = [
            self._sample(index, caption, with_features) for index, caption in zip(indices, captions, strict=True)
        ]
        tensors = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        features = grid = None
        if with_features:
            stacked = tensors.pop("features")
            grid = TokenGrid(*stacked.shape[1:4])
            features = stacked.flatten(2, 3)
        return Batch(tuple(clip_name(clip) for clip in clips), tensors, features, grid)

    def whole_batch(self, indices: Sequence[int], captions: Sequence[float | None], with_features: bool) -> Batch:
        """The same, with damaged entries made again."""
        while True:
            try:
                return self.batch(indices, captions, with_features)
            except DamagedClipError as error:
                self.recover(error)

    def recover(self, error: DamagedClipError) -> None:
        """Make a damaged entry again; if that fails, leave its clip out from now on.

        Raises:
            DamagedClipError: if there is no healing.
            RunError: if all clips of a bucket are left out.
        """
        if self.healing is None:
            raise error
        if error.index in self._left_out:
            return
        clip = self.clips[error.index]
        try:
            self.healing.heal(error.damage, clip)
        except ClipError as reason:
            self._left_out.add(error.index)
            other = clip_name(self.clips[self._stand_in(error.index)])
            self.healing.news.append(ClipSkipped(clip_name(clip), f"{reason}; {other} is trained on in its place"))

    def _stand_in(self, index: int) -> int:
        if index not in self._left_out:
            return index
        # Every process finds the same damage in the cache that they share, and takes the same clip instead.
        bucket = [place for place, clip in enumerate(self.clips) if clip.bucket == self.clips[index].bucket]
        start = bucket.index(index)
        for place in (*bucket[start:], *bucket[:start]):
            if place not in self._left_out:
                return place
        raise RunError(
            f"no entry of the {len(bucket)} clips of one size can be read or made again, the last one of "
            f"{clip_name(self.clips[index])}: is the disk of {self.cache.root} in order? `--verify-cache` checks all"
        )

    def _sample(self, index: int, caption: float | None, with_features: bool) -> Tensors:
        """The tensors of a clip."""
        clip = self.clips[index]
        keys = clip.prompt_keys
        prompt_key = self.empty_prompt_key if caption is None else keys[int(caption * len(keys))]
        try:
            stored = self.cache.read("latents", clip.latents_key)
            tensors = narrowed(narrowed(stored, self.dtype), torch.float32)
            tensors |= self.cache.read("prompts", prompt_key)
            if with_features:
                tensors["features"] = restored_features(self.cache.read("features", str(clip.features_key)))
        except DamagedEntryError as damage:
            raise DamagedClipError(index, damage) from damage
        return tensors


def _windows(clips: Sequence[PreparedClip]) -> dict[int, list[int]]:
    """The windows of each scene of which each visit draws one, by the index of the first; other clips are alone."""
    firsts: dict[tuple[int, Path, int], int] = {}
    windows: dict[int, list[int]] = {}
    for index, clip in enumerate(clips):
        first = index if clip.scene is None else firsts.setdefault((clip.source, clip.clip.path, clip.scene), index)
        windows.setdefault(first, []).append(index)
    return windows


def prefetched(read: Callable[[int], Item], start: int) -> Iterator[Item]:
    """`read(start)`, `read(start + 1)` and so on, each read in a thread while the caller processes the previous one."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as executor:
        upcoming = executor.submit(read, start)
        while True:
            item = upcoming.result()
            start += 1
            upcoming = executor.submit(read, start)
            yield item
