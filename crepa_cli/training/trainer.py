"""The trainer: it owns the model, the optimizer and the schedules, and yields what happens."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, free_memory

from crepa_cli.data.dataset import Batch, ClipDataset, prefetched
from crepa_cli.data.online import OnlineTeacher
from crepa_cli.data.prepare import ClipForm
from crepa_cli.data.sampler import BatchOrder
from crepa_cli.errors import RunError
from crepa_cli.events import (
    AlignmentDropped,
    CheckpointSaved,
    Event,
    StepDone,
    TrainingEnded,
    TrainingStarted,
    ValidationSampled,
)
from crepa_cli.models.family import Family, Tensors
from crepa_cli.profile import Profile
from crepa_cli.training.adapter import export_weights
from crepa_cli.training.aligned import AlignedTransformer
from crepa_cli.training.build import build_model, coefficient_schedule, frozen_dtype, make_optimizer, trainable
from crepa_cli.training.checkpoints import (
    checkpoint_path,
    load_checkpoint,
    read_progress,
    remove_old_checkpoints,
    save_checkpoint,
)
from crepa_cli.training.flow import sample_sigmas, seeded_generator
from crepa_cli.training.sampling import sample_videos
from crepa_cli.training.step import Losses, Teaching, step_losses


class Trainer:
    """Trains a family's transformer on prepared clips.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        dataset: the prepared clips.
        prompts: the cached tensors of the validation prompts, and last those of the empty prompt.
        form: the size, length and frame rate of the clips, for validation videos.
        output: the run's folder.
        accelerator: device, precision and processes.
        feature_size: width of the teacher's features.
        online_teacher: where features are computed in every step.
        resume: the checkpoint to go on from.
    """

    def __init__(
        self,
        profile: Profile,
        family: Family,
        dataset: ClipDataset,
        prompts: list[Tensors],
        form: ClipForm,
        output: Path,
        accelerator: Accelerator,
        feature_size: int,
        online_teacher: OnlineTeacher | None = None,
        resume: Path | None = None,
    ) -> None:
        self.profile = profile
        self.family = family
        self.dataset = dataset
        self.prompts = prompts
        self.form = form
        self.output = output
        self.accelerator = accelerator
        self.online_teacher = online_teacher
        train = profile.train
        progress = read_progress(resume) if resume else {}
        self.start: int = progress.get("step", 0)
        self.order = BatchOrder(
            dataset.buckets(), batch_size=train.batch_size, seed=train.seed, repeats=profile.data.repeats
        )
        self.schedule = coefficient_schedule(profile)
        if progress:
            self.schedule.load_state_dict(progress["schedule"])
        torch.manual_seed(train.seed)
        transformer = family.load_transformer(frozen_dtype(profile))
        teacher_size = None if self._alignment_finished(self.start) else feature_size
        aligned = build_model(profile, family, transformer, teacher_size)
        groups = [trainable(aligned.transformer), trainable(aligned.crepa) if aligned.crepa else []]
        optimizer = make_optimizer(train.optimizer, groups, train.learning_rate, train.weight_decay)
        self.lr_scheduler = get_scheduler(
            train.lr_scheduler,
            optimizer,
            num_warmup_steps=train.lr_warmup_steps,
            num_training_steps=train.steps,
        )
        self.average = EMAModel(groups[0], decay=train.ema) if train.ema else None
        self.model, self.optimizer = accelerator.prepare(aligned, optimizer)
        if self.average:
            self.average.to(accelerator.device)
        if resume:
            self._restore(resume, progress)

    @property
    def aligned(self) -> AlignedTransformer:
        """The trained module, without what Accelerate wraps around it."""
        aligned = self.accelerator.unwrap_model(self.model)
        assert isinstance(aligned, AlignedTransformer)
        return aligned

    def run(self, should_stop: Callable[[], bool]) -> Iterator[Event]:
        """Train to the last step, or until `should_stop` is true after one; a checkpoint is saved either way.

        Raises:
            RunError: if a loss is not finite.
        """
        profile, steps = self.profile, self.profile.train.steps
        yield TrainingStarted(
            self.output,
            self.start,
            steps,
            len(self.dataset.clips),
            math.ceil(self.order.batches_per_epoch / profile.train.gradient_accumulation),
            sum(parameter.numel() for parameter in trainable(self.aligned)),
        )
        batches = prefetched(self._read_batch, self.start * profile.train.gradient_accumulation)
        done = self.start
        for step in range(self.start, steps):
            if self.aligned.crepa is not None and self._alignment_finished(step):
                self._drop_alignment()
                yield AlignmentDropped(step, self._reason_of_cutoff(step))
            yield self._optimizer_step(step, batches)
            done = step + 1
            stopped = done < steps and should_stop()
            if stopped or done == steps or _due(done, profile.checkpoints.every):
                yield self._save_checkpoint(done)
            if stopped:
                yield TrainingEnded(done, None)
                return
            if profile.validation.prompts and _due(done, profile.validation.every):
                yield self._sample(done)
        yield TrainingEnded(done, self._export())

    # One step.

    def _optimizer_step(self, step: int, batches: Iterator[Batch]) -> StepDone:
        started = time.perf_counter()
        train = self.profile.train
        torch.manual_seed(seeded_generator(train.seed, "dropout", step, self._rank).initial_seed())
        coefficient = self.schedule.coefficient(step) if self.aligned.crepa else 0.0
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        losses = []
        for micro in range(train.gradient_accumulation):
            last = micro == train.gradient_accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                index = step * train.gradient_accumulation + micro
                losses.append(self._backward(next(batches), index, step, coefficient))
        parameters = trainable(self.aligned)
        norm = self.accelerator.clip_grad_norm_(parameters, train.max_grad_norm or math.inf)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.step(trainable(self.aligned.transformer))
        means = self._means(losses)
        similarity = means.get("similarity")
        if similarity is not None:
            self.schedule.observe(similarity)
        seconds = time.perf_counter() - started
        clips = train.batch_size * train.gradient_accumulation * self.accelerator.num_processes
        return StepDone(
            step=step,
            loss=means["total"],
            diffusion_loss=means["diffusion"],
            crepa_loss=means.get("crepa"),
            crepa_similarity=similarity,
            layersync_loss=means.get("layersync"),
            crepa_similarity_ema=self.schedule.similarity_ema,
            crepa_coefficient=coefficient,
            crepa_cutoff=self.schedule.cut_off or self._alignment_finished(step),
            learning_rate=learning_rate,
            grad_norm=float(norm),
            step_seconds=seconds,
            samples_per_second=clips / seconds,
            peak_memory_bytes=peak_memory(self.accelerator.device),
        )

    def _backward(self, batch: Batch, index: int, step: int, coefficient: float) -> Tensors:
        """Accumulate the gradients of one micro-batch, and return its losses by name."""
        train, device = self.profile.train, self.accelerator.device
        generator = seeded_generator(train.seed, "noise", index, self._rank)
        shift = train.timestep_shift or self.family.timestep_shift(batch.tensors["latents"])
        bounds = self.family.sigma_range
        sigmas = sample_sigmas(train.batch_size, train.timestep_sampling, shift, generator, bounds).to(device)
        noise = torch.randn(batch.tensors["latents"].shape, generator=generator).to(device)
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
        features, teacher_grid = batch.features, batch.teacher_grid
        if features is not None:
            features = features.to(device, non_blocking=True)
        elif self.online_teacher is not None:
            features, teacher_grid = self.online_teacher.features(tensors["latents"])
        teaching = Teaching(features, teacher_grid, coefficient)
        losses = step_losses(self.model, self.family, self.profile, tensors, noise, sigmas, teaching)
        _require_finite(losses, step, batch.clips)
        self.accelerator.backward(losses.total / train.gradient_accumulation)
        return {name: loss.detach() for name, loss in losses._asdict().items() if loss is not None}

    def _means(self, losses: list[Tensors]) -> dict[str, float]:
        """The means of micro-batches over this step and all processes."""
        means = torch.stack([torch.stack(list(part.values())) for part in losses]).mean(0)
        return dict(zip(losses[0], self.accelerator.reduce(means, "mean").tolist(), strict=True))

    def _read_batch(self, index: int) -> Batch:
        """Read the micro-batch of this process with this index, counted over the whole run."""
        indices = self.order.batch(index * self.accelerator.num_processes + self._rank)
        generator = seeded_generator(self.profile.train.seed, "captions", index, self._rank)
        drop = torch.rand(len(indices), generator=generator) < self.profile.data.caption_dropout
        return self.dataset.batch(indices, drop.tolist(), with_features=self.aligned.crepa is not None)

    @property
    def _rank(self) -> int:
        return int(self.accelerator.process_index)

    # Alignment.

    def _alignment_finished(self, step: int) -> bool:
        return not self.profile.crepa.enabled or self.schedule.finished(step)

    def _drop_alignment(self) -> None:
        projector = self.optimizer.param_groups[1]["params"]
        for parameter in projector:
            self.optimizer.state.pop(parameter, None)
        projector.clear()
        self.aligned.drop_alignment()
        self.online_teacher = None
        free_memory()

    def _reason_of_cutoff(self, step: int) -> str:
        settings = self.profile.crepa
        if self.schedule.cut_off:
            average, threshold = self.schedule.similarity_ema, settings.similarity_threshold
            return f"similarity average {average:.3f} >= {threshold}"
        if settings.cutoff_step and step >= settings.cutoff_step:
            return f"cutoff_step {settings.cutoff_step} reached"
        return "the coefficient has decayed to 0"

    # Files.

    def _save_checkpoint(self, step: int) -> Event:
        path = checkpoint_path(self.output / "checkpoints", step)
        progress = {
            "step": step,
            "schedule": self.schedule.state_dict(),
            "lr_scheduler": _plain_state(self.lr_scheduler),
            "average_steps": self.average.optimization_step if self.average else 0,
        }
        average = self.average.shadow_params if self.average else None
        save_checkpoint(path, self.aligned, self.optimizer.optimizer, average, progress)
        remove_old_checkpoints(path.parent, self.profile.checkpoints.keep)
        return CheckpointSaved(step, path)

    def _restore(self, path: Path, progress: dict[str, object]) -> None:
        average = self.average.shadow_params if self.average else None
        load_checkpoint(path, self.aligned, self.optimizer.optimizer, average)
        self.lr_scheduler.load_state_dict(progress["lr_scheduler"])
        if self.average:
            self.average.optimization_step = progress["average_steps"]

    def _sample(self, step: int) -> Event:
        validation = self.profile.validation
        folder = self.output / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        guidance = {} if validation.guidance_scale is None else {"guidance_scale": validation.guidance_scale}
        with self._averaged_weights(), torch.no_grad(), self.accelerator.autocast():
            paths = sample_videos(
                self.family,
                self.aligned.transformer,
                self.prompts[:-1],
                self.prompts[-1],
                folder,
                images=validation.images,
                form=self.form._replace(frames=validation.frames or self.form.frames),
                seed=self.profile.train.seed,
                device=self.accelerator.device,
                num_inference_steps=validation.steps,
                **guidance,
            )
        return ValidationSampled(step, paths)

    def _export(self) -> Path:
        folder = self.output / "weights"
        with self._averaged_weights():
            export_weights(self.family, self.aligned.transformer, self.profile.adapter, folder)
        return folder

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """The moving average in place of the weights, where there is one."""
        if self.average is None:
            yield
            return
        parameters = trainable(self.aligned.transformer)
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on the GPU, or resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _require_finite(losses: Losses, step: int, clips: tuple[str, ...]) -> None:
    bad = [name for name, loss in losses._asdict().items() if loss is not None and not torch.isfinite(loss)]
    if bad:
        raise RunError(
            f"step {step}: the {' and the '.join(bad)} loss of {', '.join(clips)} is not finite; nothing was written, "
            "the last checkpoint is good. Lower train.learning_rate or look at the clip, then go on with --resume"
        )


def _plain_state(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, object]:
    """A scheduler's state as JSON values: without its functions, which come from the settings."""
    state = scheduler.state_dict()
    return state | {"lr_lambdas": [None] * len(state["lr_lambdas"])}
