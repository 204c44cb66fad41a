"""The micro-batches of a run: which clips, in which order, and which random numbers go with them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from crepa_cli.data.dataset import Batch, ClipDataset, prefetched
from crepa_cli.data.sampler import BatchOrder
from crepa_cli.profile import Profile
from crepa_cli.training.flow import seeded_generator


class Batches:
    """The micro-batches of this process.

    All randomness depends on the seed and on a micro-batch's index among those of all processes: two processes thus
    draw what one process draws that accumulates twice as many micro-batches.

    Args:
        dataset: the prepared clips.
        profile: the resolved settings.
        accelerator: the processes.

    Attributes:
        with_features: whether teacher features are read; turned off once alignment is dropped.
    """

    def __init__(self, dataset: ClipDataset, profile: Profile, accelerator: Accelerator) -> None:
        train = profile.train
        self.dataset = dataset
        self.accelerator = accelerator
        self.seed = train.seed
        self.caption_dropout = profile.data.caption_dropout
        self.accumulation = train.gradient_accumulation
        self.size = train.batch_size
        self.order = BatchOrder(
            dataset.buckets(), batch_size=train.batch_size, seed=train.seed, repeats=profile.data.repeats
        )
        self.with_features = profile.crepa.enabled

    @property
    def samples_per_step(self) -> int:
        """Clips in one optimizer step of all processes."""
        return self.size * self.accumulation * int(self.accelerator.num_processes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch of `BatchOrder`, in which every clip is seen equally often."""
        return math.ceil(self.order.batches_per_epoch * self.size / self.samples_per_step)

    def starting_at(self, step: int) -> Iterator[Batch]:
        """The micro-batches from an optimizer step on, each read while the one before it is trained on."""
        return prefetched(self._read, step * self.accumulation)

    def index(self, step: int, micro: int) -> int:
        """The index, among the micro-batches of all processes, of this process's `micro`-th one of a step."""
        return self._global(step * self.accumulation + micro)

    def _global(self, index: int) -> int:
        return int(index * self.accelerator.num_processes + self.accelerator.process_index)

    def _read(self, index: int) -> Batch:
        index = self._global(index)
        indices = self.order.batch(index)
        generator = seeded_generator(self.seed, "captions", index)
        drop = torch.rand(len(indices), generator=generator) < self.caption_dropout
        return self.dataset.batch(indices, drop.tolist(), with_features=self.with_features)
