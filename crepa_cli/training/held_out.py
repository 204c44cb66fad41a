"""The loss of clips that are never trained on, always at the same noise, so that steps can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from operator import itemgetter
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator

from crepa_cli.data.cache import cache_key
from crepa_cli.data.dataset import ClipDataset
from crepa_cli.data.online import OnlineTeacher
from crepa_cli.events import HeldOutMeasured
from crepa_cli.models.family import Family
from crepa_cli.processes import from_all
from crepa_cli.profile import Profile
from crepa_cli.training.batches import MicroBatch
from crepa_cli.training.experts import Experts
from crepa_cli.training.flow import seeded_generator, spread_sigmas
from crepa_cli.training.sampling import evaluating
from crepa_cli.training.step import Teaching, step_losses

LEVELS = 4
"""Noise levels at which each clip is measured."""


class HeldOutLoss:
    """The diffusion loss of held-out clips with their own captions, and the similarity of their alignment.

    Each clip is measured at `LEVELS` noise levels, spread over those that are trained, with noise that depends on the
    seed and the clip alone: two measurements of the same weights agree to the bit. They change nothing in the training.

    Args:
        dataset: the held-out clips.
        family: of the transformer.
        profile: the resolved settings.
        accelerator: device, precision and processes.
        state: from `state_dict`, to resume.

    Attributes:
        latest: the last measurement.
        changed: whether a resumed run measures other clips, or at other noise, than it did before.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        family: Family,
        profile: Profile,
        accelerator: Accelerator,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.family = family
        self.profile = profile
        self.accelerator = accelerator
        self.changed = state is not None and state["key"] != self._key()
        saved = state["latest"] if state is not None and not self.changed else None
        self.latest = HeldOutMeasured(**saved) if saved else None

    def state_dict(self) -> dict[str, Any]:
        """JSON values to resume from."""
        return {"key": self._key(), "latest": asdict(self.latest) if self.latest else None}

    def _key(self) -> str:
        """A key of everything but the weights that a measurement depends on."""
        train = self.profile.train
        return cache_key(
            clips=sorted([clip.latents_key, clip.prompt_keys[0]] for clip in self.dataset.clips),
            noise=[train.seed, train.timestep_sampling, train.timestep_shift, train.loss_weighting],
        )

    def measure(
        self, experts: Experts, online_teacher: OnlineTeacher | None, step: int, stopping: Callable[[], bool]
    ) -> HeldOutMeasured | None:
        """Measure the weights, or their moving average if one is kept; None if `stopping` becomes true.

        The processes of a run share out the clips; every process has to call this.

        Args:
            experts: whose weights are measured, those of each at its own noise levels.
            online_teacher: computes features, if they are not read from the cache.
            step: how many steps the weights have been trained.
            stopping: whether any process is asked to stop; every process asks before each clip.
        """
        total, processes = len(self.dataset.clips), self.accelerator.num_processes
        found: list[tuple[int, float, float | None]] = []
        # Finer recomputation splits blocks only where a backward may follow; whole, they can take more than a step.
        # Sharded weights would wait for the backward.
        finely = self.profile.memory.finer_recompute and not self.profile.train.sharding
        with experts.averaged_weights(), torch.set_grad_enabled(finely), ExitStack() as stack:
            for expert in experts.values():
                stack.enter_context(evaluating(expert.learner.aligned))
            for first in range(0, total, processes):
                if stopping():
                    return None
                index = first + self.accelerator.process_index
                # Sharded weights need every process in every forward: one that has no clip left repeats the last.
                values = self._measure_clip(min(index, total - 1), experts, online_teacher)
                if index < total:
                    found.append((index, *values))
        measured = sorted(from_all(found), key=itemgetter(0))
        similarities = [similarity for _, _, similarity in measured if similarity is not None]
        self.latest = HeldOutMeasured(step, fmean(loss for _, loss, _ in measured), _mean(similarities), total)
        return self.latest

    def _measure_clip(
        self, index: int, experts: Experts, online_teacher: OnlineTeacher | None
    ) -> tuple[float, float | None]:
        """Loss and similarity of a clip: the means over its noise levels, one at a time, as memory may be short."""
        batch = self._batch(index, with_features=experts.aligns and online_teacher is None)
        models = [experts.of_level(sigma).learner.aligned for sigma in batch.sigmas.tolist()]
        batch = batch.to(self.accelerator.device, self.family.read_on_cpu)
        teaching = Teaching(batch.features, batch.teacher_grid)
        if online_teacher is not None:
            teaching = Teaching(*online_teacher.features(batch.tensors["latents"]))
        losses, similarities = [], []
        for model, noise, sigma in zip(models, batch.noise.split(1), batch.sigmas.split(1), strict=True):
            with self.accelerator.autocast():
                found = step_losses(model, self.family, self.profile, batch.tensors, noise, sigma, teaching)
            losses.append(found.diffusion.detach())
            similarities += [] if found.similarity is None else [found.similarity.detach()]
            del found
        values = torch.stack(losses + similarities).tolist()
        return fmean(values[:LEVELS]), _mean(values[LEVELS:])

    def _batch(self, index: int, *, with_features: bool) -> MicroBatch:
        """A batch of one clip, with noise `[LEVELS, C, T, h, w]` and noise levels `[LEVELS]`."""
        train = self.profile.train
        batch = self.dataset.whole_batch([index], [0.0], with_features=with_features)
        latents = batch.tensors["latents"]
        shift = train.timestep_shift or self.family.timestep_shift(latents)
        sigmas = spread_sigmas(LEVELS, train.timestep_sampling, shift, self.family.sigma_range)
        generator = seeded_generator(train.seed, "held out", self.dataset.clips[index].digest)
        noise = torch.randn(LEVELS, *latents.shape[1:], generator=generator)
        return MicroBatch(batch.clips, batch.tensors, noise, sigmas, batch.features, batch.teacher_grid)


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None
