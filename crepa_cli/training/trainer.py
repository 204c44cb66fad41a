"""The trainer: it owns the model, the optimizer and the schedules, and yields what happens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

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
    Notice,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingStarted,
    ValidationSampled,
)
from crepa_cli.models.family import Family, Tensors
from crepa_cli.processes import from_all
from crepa_cli.profile import Profile
from crepa_cli.training.adapter import export_weights
from crepa_cli.training.build import build_model, coefficient_schedule, frozen_dtype, make_optimizer, trainable
from crepa_cli.training.checkpoints import (
    checkpoint_path,
    load_checkpoint,
    plain_state,
    read_progress,
    remove_old_checkpoints,
    take_snapshot,
    trained_weights,
    write_checkpoint,
)
from crepa_cli.training.flow import sample_sigmas, seeded_generator
from crepa_cli.training.parallel import describe_share, replicated, shard
from crepa_cli.training.sampling import sample_videos
from crepa_cli.training.step import Teaching, not_finite, peak_memory, step_losses


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
        self.done = self.saved = self.start
        self.stopping = False
        self.between_steps = True
        self.order = BatchOrder(
            dataset.buckets(), batch_size=train.batch_size, seed=train.seed, repeats=profile.data.repeats
        )
        self.schedule = coefficient_schedule(profile)
        if progress:
            self.schedule.load_state_dict(progress["schedule"])
        torch.manual_seed(train.seed)
        transformer = family.load_transformer(frozen_dtype(profile))
        teacher_size = None if self._alignment_finished(self.start) else feature_size
        self.aligned = build_model(profile, family, transformer, teacher_size)
        if train.sharding:
            shard(self.aligned, family.blocks(transformer), accelerator)
        self.model = replicated(self.aligned, accelerator)
        groups = [trainable(module) if module else [] for module in (transformer, self.aligned.crepa)]
        self.optimizer = make_optimizer(train.optimizer, groups, train.learning_rate, train.weight_decay)
        self.lr_scheduler = get_scheduler(
            train.lr_scheduler,
            self.optimizer,
            num_warmup_steps=train.lr_warmup_steps,
            num_training_steps=train.steps,
        )
        self.average = EMAModel(groups[0], decay=train.ema) if train.ema else None
        self.skipped_in_a_row: int = progress.get("skipped_in_a_row", 0)
        if resume:
            self._restore(resume, progress)

    def run(self, should_stop: Callable[[], bool]) -> Iterator[Event]:
        """Train to the last step, or until `should_stop` is true on any process; a checkpoint is saved either way.

        An error saves one too in a run of one process; of several, the others would have to take part.

        Raises:
            RunError: if a loss or gradient is not finite in too many steps in a row.
        """
        profile = self.profile
        micro_batches = profile.train.gradient_accumulation * self.accelerator.num_processes
        yield TrainingStarted(
            self.output,
            self.start,
            profile.train.steps,
            len(self.dataset.clips),
            math.ceil(self.order.batches_per_epoch / micro_batches),
            sum(parameter.numel() for parameter in trainable(self.aligned)),
        )
        if profile.train.sharding:
            yield Notice(f"sharded: {describe_share(self.aligned)}")
        try:
            yield from self._steps(should_stop)
        except (Exception, GeneratorExit) as error:
            if self.between_steps and self.done > self.saved and self.accelerator.num_processes == 1:
                error.add_note(f"A checkpoint was saved first: {self._save_checkpoint().path}")
            raise

    def _steps(self, should_stop: Callable[[], bool]) -> Iterator[Event]:
        profile, steps = self.profile, self.profile.train.steps
        batches = prefetched(self._read_batch, self.start * profile.train.gradient_accumulation)
        for step in range(self.start, steps):
            if self.aligned.crepa is not None and self._alignment_finished(step):
                self._drop_alignment()
                yield AlignmentDropped(step, self._reason_of_cutoff(step))
            event = self._optimizer_step(step, batches, should_stop)
            self.done = step + 1
            yield event
            stopped = self.stopping and self.done < steps
            failed = self.skipped_in_a_row > profile.train.max_skipped_steps
            if stopped or failed or self.done == steps or _due(self.done, profile.checkpoints.every):
                yield self._save_checkpoint()
            if failed and isinstance(event, StepSkipped):
                raise RunError(
                    f"step {step}: {event.reason}; {self.skipped_in_a_row} steps in a row were skipped for such a "
                    "reason (train.max_skipped_steps). The last checkpoint is good: lower train.learning_rate or look "
                    "at the clips, then go on with --resume"
                )
            if stopped:
                yield TrainingEnded(self.done, None)
                return
            if profile.validation.prompts and _due(self.done, profile.validation.every):
                yield self._sample()
        yield TrainingEnded(self.done, self._export())

    # One step.

    def _optimizer_step(
        self, step: int, batches: Iterator[Batch], should_stop: Callable[[], bool]
    ) -> StepDone | StepSkipped:
        started = time.perf_counter()
        train = self.profile.train
        coefficient = self.schedule.coefficient(step) if self.aligned.crepa else 0.0
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        losses, clips = [], []
        for micro in range(train.gradient_accumulation):
            last = micro == train.gradient_accumulation - 1
            index = step * train.gradient_accumulation + micro
            batch = next(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                losses.append(self._backward(batch, self._global(index), coefficient))
            clips.append(batch.clips)
        norm = float(self.accelerator.clip_grad_norm_(trainable(self.aligned), train.max_grad_norm or math.inf))
        means = self._means(losses, should_stop())
        if not all(math.isfinite(value) for value in (norm, *means.values())):
            return self._skip(step, losses, clips)
        similarity = means.get("similarity")
        self._update(similarity)
        seconds = time.perf_counter() - started
        batch_size = train.batch_size * train.gradient_accumulation * self.accelerator.num_processes
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
            grad_norm=norm,
            step_seconds=seconds,
            samples_per_second=batch_size / seconds,
            peak_memory_bytes=peak_memory(self.accelerator.device),
        )

    def _update(self, similarity: float | None) -> None:
        """Take a step with the gradients that there are, which are finite."""
        self.between_steps = False
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.step(trainable(self.aligned.transformer))
        if similarity is not None:
            self.schedule.observe(similarity)
        self.skipped_in_a_row = 0
        self.between_steps = True

    def _skip(self, step: int, losses: list[Tensors], clips: list[tuple[str, ...]]) -> StepSkipped:
        """Leave weights, averages and schedules as they are."""
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row += 1
        here = [term for part, names in zip(losses, clips, strict=True) for term in not_finite(part, names)]
        reasons = from_all(here) or [
            f"the gradient of {', '.join(from_all([name for names in clips for name in names]))}"
        ]
        return StepSkipped(step, f"{' and '.join(reasons)} is not finite")

    def _backward(self, batch: Batch, index: int, coefficient: float) -> Tensors:
        """Accumulate the gradients of the micro-batch with this index of the run, and return its losses by name."""
        train, device = self.profile.train, self.accelerator.device
        torch.manual_seed(seeded_generator(train.seed, "dropout", index).initial_seed())
        generator = seeded_generator(train.seed, "noise", index)
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
        with self.accelerator.autocast():
            losses = step_losses(self.model, self.family, self.profile, tensors, noise, sigmas, teaching)
        self.accelerator.backward(losses.total / train.gradient_accumulation)
        return {name: loss.detach() for name, loss in losses._asdict().items() if loss is not None}

    def _means(self, losses: list[Tensors], stop: bool) -> dict[str, float]:
        """The means of micro-batches over this step and all processes, which agree on whether to stop."""
        means = torch.stack([torch.stack(list(part.values())) for part in losses]).mean(0)
        *values, stops = self.accelerator.reduce(torch.cat([means, means.new_tensor([stop])]), "mean").tolist()
        self.stopping = stops > 0
        return dict(zip(losses[0], values, strict=True))

    def _read_batch(self, index: int) -> Batch:
        """Read the micro-batch of this process with this index, counted over the whole run."""
        index = self._global(index)
        indices = self.order.batch(index)
        generator = seeded_generator(self.profile.train.seed, "captions", index)
        drop = torch.rand(len(indices), generator=generator) < self.profile.data.caption_dropout
        return self.dataset.batch(indices, drop.tolist(), with_features=self.aligned.crepa is not None)

    def _global(self, index: int) -> int:
        """The index among the micro-batches of all processes: what is random depends on it alone.

        Two processes thus do what one does that accumulates twice as many micro-batches.
        """
        return int(index * self.accelerator.num_processes + self.accelerator.process_index)

    # Alignment.

    def _alignment_finished(self, step: int) -> bool:
        return not self.profile.crepa.enabled or self.schedule.finished(step)

    def _drop_alignment(self) -> None:
        projector = self.optimizer.param_groups[1]["params"]
        for parameter in projector:
            self.optimizer.state.pop(parameter, None)
        projector.clear()
        # Data parallelism would go on to wait for the projector's gradients: it starts anew without them.
        self.model = self.aligned
        self.aligned.drop_alignment()
        self.online_teacher = None
        free_memory()
        self.model = replicated(self.aligned, self.accelerator)

    def _reason_of_cutoff(self, step: int) -> str:
        settings = self.profile.crepa
        if self.schedule.cut_off:
            average, threshold = self.schedule.similarity_ema, settings.similarity_threshold
            return f"similarity average {average:.3f} >= {threshold}"
        if settings.cutoff_step and step >= settings.cutoff_step:
            return f"cutoff_step {settings.cutoff_step} reached"
        return "the coefficient has decayed to 0"

    # Files.

    def _save_checkpoint(self) -> CheckpointSaved:
        path = checkpoint_path(self.output / "checkpoints", self.done)
        progress = {
            "step": self.done,
            "schedule": self.schedule.state_dict(),
            "lr_scheduler": plain_state(self.lr_scheduler),
            "average_steps": self.average.optimization_step if self.average else 0,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        average = self.average.shadow_params if self.average else None
        snapshot = take_snapshot(self.aligned, self.optimizer, average, progress)
        if self.accelerator.is_main_process:
            write_checkpoint(path, snapshot)
            remove_old_checkpoints(path.parent, self.profile.checkpoints.keep)
        self.saved = self.done
        return CheckpointSaved(self.done, path)

    def _restore(self, path: Path, progress: dict[str, Any]) -> None:
        average = self.average.shadow_params if self.average else None
        load_checkpoint(path, self.aligned, self.optimizer, average)
        self.lr_scheduler.load_state_dict(progress["lr_scheduler"])
        if self.average:
            self.average.optimization_step = progress["average_steps"]

    def _sample(self) -> Event:
        validation = self.profile.validation
        folder = self.output / "samples" / f"step-{self.done:06d}"
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
                accelerator=self.accelerator,
                num_inference_steps=validation.steps,
                **guidance,
            )
        return ValidationSampled(self.done, paths)

    def _export(self) -> Path:
        folder, transformer = self.output / "weights", self.aligned.transformer
        with self._averaged_weights():
            weights = trained_weights(transformer)
            if self.accelerator.is_main_process:
                export_weights(self.family, transformer, weights, self.profile.adapter, folder)
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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
