"""The micro-batches of a run: which clips, in which order, and which random numbers go with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.data.dataset import ClipDataset, DamagedClipError, prefetched
from crepa_cli.data.sampler import BatchOrder
from crepa_cli.data.shares import shares
from crepa_cli.models.family import Family, Tensors
from crepa_cli.profile import Profile
from crepa_cli.training.flow import sample_sigmas, seeded_generator
from crepa_cli.training.turns import expert_of_step, expert_sigmas


@dataclass(frozen=True)
class MicroBatch:
    """Clips of one bucket, and what is drawn for them.

    Attributes:
        clips: their names.
        tensors: latents and the captions' tensors, with a batch dimension.
        noise: like the latents.
        sigmas: `[B]`.
        features: `[B, T', N', D]` on `teacher_grid`; both are None if features were not read.
        teacher_grid: the grid of the features.
    """

    clips: tuple[str, ...]
    tensors: Tensors
    noise: Tensor
    sigmas: Tensor
    features: Tensor | None
    teacher_grid: TokenGrid | None

    def to(self, device: torch.device, stays: frozenset[str]) -> MicroBatch:
        """The same on a device, without those in `stays`; the CPU does not wait for copies of pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True), stays)

    def pinned(self, stays: frozenset[str]) -> MicroBatch:
        """The same in pinned memory, from which a GPU copies by itself."""
        return self._each(Tensor.pin_memory, stays)

    def _each(self, change: Callable[[Tensor], Tensor], stays: frozenset[str]) -> MicroBatch:
        return replace(
            self,
            tensors={name: one if name in stays else change(one) for name, one in self.tensors.items()},
            noise=change(self.noise),
            sigmas=change(self.sigmas),
            features=None if self.features is None else change(self.features),
        )


class Batches:
    """The micro-batches of this process.

    All randomness depends on the seed and on a micro-batch's index among those of all processes: two processes thus
    draw what one process draws that accumulates twice as many micro-batches.

    Args:
        dataset: the prepared clips.
        family: of the transformer.
        profile: the resolved settings.
        accelerator: the processes.
        with_features: whether teacher features are read; turned off once alignment is dropped.
    """

    def __init__(
        self, dataset: ClipDataset, family: Family, profile: Profile, accelerator: Accelerator, with_features: bool
    ) -> None:
        self.train = train = profile.train
        self.dataset = dataset
        self.family = family
        self.accelerator = accelerator
        self.caption_dropout = profile.data.caption_dropout
        self.accumulation = train.gradient_accumulation
        self.size = train.batch_size
        weights = [source.weight for source in profile.data.all_sources]
        buckets = dataset.buckets()
        sources = {index: dataset.source(index) for bucket in buckets for index in bucket}
        visits = shares(sources, weights, profile.data.repeats)
        self.order = BatchOrder(buckets, batch_size=train.batch_size, seed=train.seed, shares=visits)
        self.with_features = with_features

    @property
    def samples_per_step(self) -> int:
        """Clips in one optimizer step of all processes."""
        return self.size * self.accumulation * int(self.accelerator.num_processes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch of `BatchOrder`, in which every clip is seen equally often."""
        return math.ceil(self.order.batches_per_epoch * self.size / self.samples_per_step)

    def starting_at(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches from an optimizer step on, each read and drawn while the one before it is trained on.

        They lie in the memory of the CPU, which is pinned if a GPU trains. Damaged entries are made again here, in the
        caller's thread.
        """
        first = step * self.accumulation
        for index, found in enumerate(prefetched(self._attempt, first), start=first):
            batch = found
            while isinstance(batch, DamagedClipError):
                self.dataset.recover(batch)
                batch = self._attempt(index)
            yield batch

    def _attempt(self, index: int) -> MicroBatch | DamagedClipError:
        try:
            return self._read(index)
        except DamagedClipError as error:
            return error

    def index(self, step: int, micro: int) -> int:
        """The index, among the micro-batches of all processes, of this process's `micro`-th one of a step."""
        return self._global(step * self.accumulation + micro)

    def _global(self, index: int) -> int:
        return int(index * self.accelerator.num_processes + self.accelerator.process_index)

    def _read(self, index: int) -> MicroBatch:
        expert = expert_of_step(self.family, self.train, index // self.accumulation)
        index, train = self._global(index), self.train
        places = torch.rand(train.batch_size, generator=seeded_generator(train.seed, "windows", index)).tolist()
        indices = [self.dataset.drawn(*one) for one in zip(self.order.batch(index), places, strict=True)]
        generator = seeded_generator(train.seed, "captions", index)
        dropped = torch.rand(len(indices), generator=generator) < self.caption_dropout
        choices = torch.rand(len(indices), generator=generator)
        captions = [None if drop else choice for drop, choice in zip(dropped, choices.tolist(), strict=True)]
        batch = self.dataset.batch(indices, captions, with_features=self.with_features)
        generator = seeded_generator(train.seed, "noise", index)
        latents = batch.tensors["latents"]
        shift = train.timestep_shift or self.family.timestep_shift(latents)
        if expert:
            one = self.family.trained[expert]
            sigmas = expert_sigmas(train.batch_size, one, train.timestep_sampling, shift, generator)
        else:
            sigmas = sample_sigmas(train.batch_size, train.timestep_sampling, shift, generator, self.family.sigma_range)
        noise = torch.randn(latents.shape, generator=generator)
        drawn = MicroBatch(batch.clips, batch.tensors, noise, sigmas, batch.features, batch.teacher_grid)
        device = self.accelerator.device
        if device.type != "cuda":
            return drawn
        # A thread begins on the first GPU, where every process would take memory to pin its own.
        with torch.cuda.device(device):
            return drawn.pinned(self.family.read_on_cpu)
