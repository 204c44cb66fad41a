"""Batches of prepared clips, read from the cache while the previous step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.data.buckets import Bucket
from crepa_cli.data.cache import Cache
from crepa_cli.data.prepare import PreparedClip
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


class ClipDataset:
    """The prepared clips of a run.

    Args:
        clips: from `prepare`.
        cache: the cache with their entries.
        empty_prompt_key: the entry of the empty caption, which replaces a dropped one.
    """

    def __init__(self, clips: Sequence[PreparedClip], cache: Cache, empty_prompt_key: str) -> None:
        self.clips = clips
        self.cache = cache
        self.empty_prompt_key = empty_prompt_key

    def buckets(self) -> list[list[int]]:
        """The indices of the clips in each bucket."""
        buckets: dict[Bucket, list[int]] = {}
        for index, clip in enumerate(self.clips):
            buckets.setdefault(clip.bucket, []).append(index)
        return [buckets[key] for key in sorted(buckets)]

    def batch(self, indices: Sequence[int], drop_caption: Sequence[bool], with_features: bool) -> Batch:
        """Read the entries of some clips of one bucket and stack them.

        Args:
            indices: indices of the clips.
            drop_caption: for each clip, whether the empty caption replaces its own.
            with_features: whether to read features, if the clips have any.
        """
        clips = [self.clips[index] for index in indices]
        samples = [
            self.cache.read("latents", clip.latents_key)
            | self.cache.read("prompts", self.empty_prompt_key if drop else clip.prompt_key)
            for clip, drop in zip(clips, drop_caption, strict=True)
        ]
        tensors = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        features = grid = None
        if with_features and all(clip.features_key for clip in clips):
            stacked = torch.stack([self.cache.read("features", str(clip.features_key))["features"] for clip in clips])
            grid = TokenGrid(*stacked.shape[1:4])
            features = stacked.flatten(2, 3)
        return Batch(tuple(clip.clip.path.name for clip in clips), tensors, features, grid)


def prefetched(read: Callable[[int], Item], start: int) -> Iterator[Item]:
    """`read(start)`, `read(start + 1)` and so on, each read in a thread while the caller processes the previous one."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as executor:
        upcoming = executor.submit(read, start)
        while True:
            item = upcoming.result()
            start += 1
            upcoming = executor.submit(read, start)
            yield item
