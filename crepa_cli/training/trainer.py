"""The training loop: it yields events, and everything else listens to them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from crepa_cli.alignment import CoefficientSchedule
from crepa_cli.data.online import OnlineTeacher
from crepa_cli.data.video import DECODING_VERSION
from crepa_cli.errors import RunError
from crepa_cli.events import (
    AlignmentDropped,
    CheckpointSaved,
    Event,
    Notice,
    Progress,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingStarted,
)
from crepa_cli.models.family import Family, Tensors
from crepa_cli.processes import from_all
from crepa_cli.profile import Profile
from crepa_cli.requests import Requests
from crepa_cli.runs.folder import RunFolder
from crepa_cli.runs.header import file_header
from crepa_cli.training.batches import Batches, MicroBatch
from crepa_cli.training.build import trainable
from crepa_cli.training.checkpointer import Checkpointer
from crepa_cli.training.checkpoints import trained_weights
from crepa_cli.training.clock import StepClock
from crepa_cli.training.experts import Expert, Experts
from crepa_cli.training.export import export_weights
from crepa_cli.training.flow import seeded_generator
from crepa_cli.training.held_out import HeldOutLoss
from crepa_cli.training.learner import GradientNorms, Learner
from crepa_cli.training.parallel import accumulating, describe_share
from crepa_cli.training.peak import PeakMemory
from crepa_cli.training.skipped import SkippedSteps
from crepa_cli.training.step import Teaching, not_finite, step_losses
from crepa_cli.training.validator import Validator

StopRequest = Callable[[], bool]


@dataclass
class Trainer:
    """Trains to the last step of a run, or until it is asked to stop.

    Attributes:
        profile: the resolved settings.
        family: of the transformer.
        run: the run's folder.
        experts: what is trained: one transformer, or every expert of a model in its own steps.
        batches: the clips.
        checkpointer: saves what is trained.
        validator: samples validation videos.
        accelerator: device, precision and processes.
        online_teacher: computes features in every step, if they are not read from the cache.
        skipped: the steps that were not finite.
        done: optimizer steps so far, skipped ones included.
        held_out: measures the loss of clips that are never trained on, if there are any.
        saved: `done` at the last checkpoint.
    """

    profile: Profile
    family: Family
    run: RunFolder
    experts: Experts
    batches: Batches
    checkpointer: Checkpointer
    validator: Validator
    accelerator: Accelerator
    online_teacher: OnlineTeacher | None
    skipped: SkippedSteps
    done: int = 0
    held_out: HeldOutLoss | None = None
    saved: int = field(init=False)
    updating: bool = field(init=False, default=False)
    """Whether weights, averages and schedules are being changed, so that no checkpoint may be saved."""

    def __post_init__(self) -> None:
        """A run that resumes has saved what it starts from."""
        self.saved = self.done
        self.peak = PeakMemory(self.accelerator.device)
        self.clock = StepClock(self.accelerator.device)

    def train(self, should_stop: StopRequest, requests: Requests) -> Iterator[Event]:
        """Train to the last step, or until `should_stop` is true on any process; a checkpoint is saved either way.

        The `requests` of every process are served after the step.

        An error saves one too, in a run of a single process; of several, the others would have to take part.

        Raises:
            RunError: if a loss or gradient is not finite in too many consecutive steps, or whenever one clip is drawn.
        """
        yield TrainingStarted(
            self.run.path,
            self.done,
            self.profile.train.steps,
            len(self.batches.dataset.clips),
            self.batches.steps_per_epoch,
            sum(weight.numel() for one in self.experts.values() for weight in trainable(one.learner.aligned)),
            self.profile.checkpoints.every,
            self.profile.validation.every if self.profile.validation.prompts or self.held_out else 0,
        )
        if self.profile.train.sharding:
            for expert in self.experts.values():
                yield Notice(f"sharded: {describe_share(expert.learner.aligned)}")
        if self.held_out and self.held_out.changed:
            yield Notice(
                "the held-out loss is measured on other clips, or at other noise, than before: values from step "
                f"{self.done} on do not compare with earlier ones"
            )
        try:
            yield from self._steps(should_stop, requests)
        except BaseException as error:
            if self.done > self.saved and not self.updating and self.accelerator.num_processes == 1:
                error.add_note(f"A checkpoint was saved first: {self._save().path}")
            raise

    def _steps(self, should_stop: StopRequest, requests: Requests) -> Iterator[Event]:
        profile, last = self.profile, self.profile.train.steps
        batches = self.batches.starting_at(self.done)
        yield from self._measure_held_out(should_stop)
        if self.done == 0:
            yield from self._validate(should_stop)
        for step in range(self.done, last):
            for expert in self.experts.values():
                if expert.learner.aligns and expert.learner.schedule.finished(step):
                    yield self._drop_alignment(step, expert)
            event = self._step(step, batches, should_stop)
            if event is None:
                break
            self.done = step + 1
            yield event
            if isinstance(event, StepSkipped) and (excess := self.skipped.excess()):
                yield self._save()
                raise RunError(_too_many_skipped(event, excess))
            # Before the checkpoint, which keeps the value for the run that resumes from it.
            yield from self._measure_held_out(should_stop)
            if self.done == last or _due(self.done, profile.checkpoints.every):
                yield from self._checkpoint()
            healing = self.batches.dataset.healing
            stopping, healed, checkpoint, validation = self._agreed(
                should_stop(), bool(healing and healing.news), *requests.take()
            )
            if healing and healed:
                yield from from_all(healing.news)
                healing.news = []
            if stopping:
                break
            if validation:
                yield from self._measure_held_out(should_stop, asked=True)
            if checkpoint and self.done > self.saved:
                yield from self._checkpoint()
            yield from self._validate(should_stop, asked=validation)
        if self.done < last:
            if self.done > self.saved:
                yield self._save()
            yield TrainingEnded(self.done, None)
        else:
            self._export()
            yield TrainingEnded(self.done, self.run.weights)

    def _checkpoint(self) -> Iterator[Event]:
        """Save a checkpoint, and export a LoRA with it unless the run is over and exports anyway."""
        yield self._save()
        if self.done < self.profile.train.steps and self.profile.adapter.kind == "lora":
            self._export(self.done)

    def _measure_held_out(self, should_stop: StopRequest, *, asked: bool = False) -> Iterator[Event]:
        """Measure the held-out loss if it is due or asked for, unless it is known, as from the resumed checkpoint."""
        held_out, every = self.held_out, self.profile.validation.every
        if held_out is None:
            return
        known = held_out.latest is not None and held_out.latest.step == self.done
        if known and asked:
            return
        if not known:
            if not (asked or _due(self.done, every) or self.done == self.profile.train.steps):
                return
            yield Progress("validation", 0, len(held_out.dataset.clips), "measuring the held-out loss")
            held_out.measure(self.experts, self.online_teacher, self.done, lambda: self._stopping(should_stop))
            self.peak.restart()
        if held_out.latest is not None and held_out.latest.step == self.done:
            yield held_out.latest

    def _validate(self, should_stop: StopRequest, *, asked: bool = False) -> Iterator[Event]:
        """Sample videos if they are due, or asked for and not switched off."""
        validation = self.profile.validation
        if asked and not validation.every:
            yield Notice("a validation was asked for, but the settings switch it off: validation.every = 0")
        if validation.prompts and (_due(self.done, validation.every) or (asked and validation.every)):
            yield Progress("validation", 0, len(validation.prompts), "sampling videos")
            yield self.validator.sample(self.experts, self.done, should_stop)
            self.peak.restart()

    def _step(
        self, step: int, batches: Iterator[MicroBatch], should_stop: StopRequest
    ) -> StepDone | StepSkipped | None:
        """One optimizer step; None if the run is to stop before it is complete, which changes nothing."""
        started = time.perf_counter()
        self.clock.mark()
        (family, learner), accumulation = self.experts.at(step), self.batches.accumulation
        coefficient, learning_rate = learner.coefficient(step), learner.learning_rate
        losses: list[Tensors] = []
        clips: list[tuple[str, ...]] = []
        for micro in range(accumulation):
            if micro and self._stopping(should_stop):
                learner.discard_gradients()
                return None
            batch = next(batches)
            last = micro == accumulation - 1
            with nullcontext() if last else accumulating(learner.model):
                losses.append(self._backward(learner, batch, self.batches.index(step, micro), coefficient))
            clips.append(batch.clips)
        means, norms = self._read(losses, learner.clip_gradients())
        spent = self.clock.read()
        if not all(math.isfinite(value) for value in (*means.values(), *norms)):
            learner.discard_gradients()
            return self._skip(step, losses, clips)
        similarity, crepa = means.get("similarity"), means.get("crepa")
        cut_off = not learner.aligns or learner.schedule.cut_off
        self.updating = True
        learner.update(similarity)
        self.updating = False
        self.clock.mark("optimizer")
        self.skipped.good(name for names in clips for name in names)
        seconds = time.perf_counter() - started
        return StepDone(
            step=step,
            loss=means["total"],
            diffusion_loss=means["diffusion"],
            crepa_loss=crepa,
            crepa_weighted_loss=None if crepa is None else coefficient * crepa,
            crepa_similarity=similarity,
            crepa_self_similarity=means.get("self_similarity"),
            layersync_loss=means.get("layersync"),
            crepa_similarity_ema=learner.schedule.similarity_ema,
            crepa_coefficient=coefficient,
            crepa_cutoff=cut_off,
            learning_rate=learning_rate,
            grad_norm=norms[0],
            projector_grad_norm=norms[1] if norms[1:] else None,
            step_seconds=seconds,
            samples_per_second=self.batches.samples_per_step / seconds,
            peak_memory_bytes=self.peak.read(),
            expert=family.expert if self.family.trains_all else None,
            data_seconds=spent.get("data"),
            forward_seconds=spent.get("forward"),
            backward_seconds=spent.get("backward"),
            optimizer_seconds=spent.get("optimizer"),
        )

    def _backward(self, learner: Learner, batch: MicroBatch, index: int, coefficient: float) -> Tensors:
        """Accumulate the gradients of the micro-batch with this index of the run, and return its losses by name."""
        train = self.profile.train
        torch.manual_seed(seeded_generator(train.seed, "dropout", index).initial_seed())
        batch = batch.to(self.accelerator.device, self.family.read_on_cpu)
        if self.online_teacher is not None and learner.aligns:
            teaching = Teaching(*self.online_teacher.features(batch.tensors["latents"]), coefficient)
        else:
            teaching = Teaching(batch.features, batch.teacher_grid, coefficient)
        self.clock.mark("data")
        with self.accelerator.autocast():
            losses = step_losses(
                learner.model, self.family, self.profile, batch.tensors, batch.noise, batch.sigmas, teaching
            )
        self.clock.mark("forward")
        self.accelerator.backward(losses.total / train.gradient_accumulation)
        self.clock.mark("backward")
        return {name: loss.detach() for name, loss in losses._asdict().items() if loss is not None}

    def _read(self, losses: list[Tensors], norms: GradientNorms) -> tuple[dict[str, float], list[float]]:
        """The means of the losses over the micro-batches of this step and all processes, and the gradient norms.

        This is the one place in a step where the CPU waits for the GPU.
        """
        means = torch.stack([torch.stack(list(part.values())) for part in losses]).mean(0)
        means = self.accelerator.reduce(means, "mean")
        found = [norm for norm in norms if norm is not None]
        values = torch.cat([means, torch.stack(found)]).tolist()
        return dict(zip(losses[0], values, strict=False)), values[len(means) :]

    def _skip(self, step: int, losses: list[Tensors], clips: list[tuple[str, ...]]) -> StepSkipped:
        """Name the term and the clips that were not finite."""
        here = [
            (names, f"the {term} loss of {', '.join(names)}")
            for part, names in zip(losses, clips, strict=True)
            for term in not_finite(part)
        ]
        found = from_all(here)
        if not found:
            names = tuple(from_all([name for names in clips for name in names]))
            found = [(names, f"the gradient of {', '.join(names)}")]
        self.skipped.bad(name for names, _ in found for name in names)
        return StepSkipped(step, f"{' and '.join(reason for _, reason in found)} is not finite")

    def _drop_alignment(self, step: int, expert: Expert) -> AlignmentDropped:
        expert.learner.drop_alignment()
        if not self.experts.aligns:
            self.batches.with_features = False
            self.online_teacher = None
        reason = self._reason_of_cutoff(step, expert.learner.schedule)
        return AlignmentDropped(step, f"{expert.family.expert} expert: {reason}" if self.family.trains_all else reason)

    def _reason_of_cutoff(self, step: int, schedule: CoefficientSchedule) -> str:
        settings = self.profile.crepa
        if schedule.cut_off:
            return f"similarity average {schedule.similarity_ema:.3f} >= {settings.similarity_threshold}"
        if schedule.cutoff_step and step >= schedule.cutoff_step:
            return f"cutoff_step {schedule.cutoff_step} reached"
        return "the coefficient has decayed to 0"

    def _stopping(self, should_stop: StopRequest) -> bool:
        """Whether any process is asked to stop; every process has to call this."""
        return self._agreed(should_stop())[0]

    def _agreed(self, *flags: bool) -> list[bool]:
        """Whether each of some flags is set in any process; every process has to call this."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        numbers = torch.tensor([float(flag) for flag in flags], device=self.accelerator.device)
        return [bool(number) for number in self.accelerator.reduce(numbers, "sum").tolist()]

    def _save(self) -> CheckpointSaved:
        progress = {
            "step": self.done,
            "skipped": self.skipped.state_dict(),
            "revisions": {"model": self.profile.model.revision, "encoder": self.profile.crepa.encoder_revision},
            "decoding": DECODING_VERSION,
            "quantize_base": self.profile.memory.quantize_base,
            "held_out": self.held_out.state_dict() if self.held_out else None,
        }
        event = self.checkpointer.save(self.experts, progress)
        self.saved = self.done
        return event

    def _export(self, step: int | None = None) -> None:
        """Write the weights of the whole run, or those after `step` steps."""
        for family, learner in self.experts.values():
            transformer = learner.aligned.transformer
            with learner.averaged_weights():
                weights = trained_weights(transformer)
                if self.accelerator.is_main_process:
                    exports = self.run.exports(family.expert, step)
                    header = file_header(self.run, family, self.profile, exports)
                    export_weights(family, transformer, weights, self.profile.adapter, exports, header)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _too_many_skipped(event: StepSkipped, excess: str) -> str:
    return (
        f"step {event.step}: {event.reason}; {excess} (train.max_skipped_steps). The last checkpoint is "
        "good: lower train.learning_rate or look at the clips, then resume with --resume"
    )
