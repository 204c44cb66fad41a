"""Memory of training, predicted by running its step on fake tensors: no formulas, no weights, no GPU.

The tensors are fake, but the code is the code that trains: model, adapter, projector, optimizer, forward, backward.
They are fake CPU tensors, because every build of torch has them, and fused attention on the CPU keeps the same tensors
as on a GPU.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from crepa_cli.alignment import Alignment, TokenGrid
from crepa_cli.memory.depth import END, EachCall, Part, Segments, Timeline, highest, segments_of_all_blocks
from crepa_cli.memory.fake import QuickFakeMode
from crepa_cli.memory.live_bytes import LiveBytes
from crepa_cli.memory.shapes import Clips
from crepa_cli.models.family import Family, Tensors
from crepa_cli.models.sharing import SharedPlace
from crepa_cli.models.streaming import stream
from crepa_cli.profile import Profile
from crepa_cli.training.aligned import AlignedTransformer
from crepa_cli.training.build import build_model, frozen_dtype, frozen_in_int8, make_optimizer, trainable
from crepa_cli.training.step import Teaching, step_losses

WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER = "weights", "adapter", "gradients", "optimizer"
ACTIVATIONS, ALIGNMENT = "activations", "alignment"
PARTS = (WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS, ALIGNMENT)
"""The parts of memory in training."""


def predict_training(profile: Profile, family: Family, clips: Clips, device: torch.device) -> dict[str, int]:
    """Bytes by part at the peak of a training step.

    Args:
        profile: the resolved settings.
        family: of the checkpoint, of which only the configuration is read.
        clips: the clips of a batch.
        device: the device that trains.
    """

    def run(profile: Profile, family: Family, backward: bool) -> Segments:
        return _segments(profile, family, clips, device, backward=backward)

    peak = highest(segments_of_all_blocks(profile, family, run))
    return {part: peak[part] for part in PARTS}


def _segments(profile: Profile, family: Family, clips: Clips, device: torch.device, *, backward: bool) -> Segments:
    """The segments of one step at its own depth, with or without a backward pass."""
    batch = {name: torch.stack([tensor] * profile.train.batch_size) for name, tensor in clips.tensors.items()}
    with fake_training(profile, family, clips.feature_size, device) as training:
        timeline = Timeline(training.live)
        timeline.watch(family.blocks(training.model.transformer))
        _step(profile, family, training, timeline, batch, clips, backward=backward)
        return timeline.segments


class FakeLearner(NamedTuple):
    """The tensors of one transformer that stay in memory from one step to the next, without content."""

    model: AlignedTransformer
    optimizer: torch.optim.Optimizer
    average: EMAModel | None


class FakeTraining(NamedTuple):
    """A model that is trained, and the counter of its tensors; of several experts, the step trains the first."""

    learners: tuple[FakeLearner, ...]
    live: LiveBytes

    @property
    def model(self) -> AlignedTransformer:
        """The one that the step trains."""
        return self.learners[0].model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its optimizer."""
        return self.learners[0].optimizer


@contextmanager
def fake_training(profile: Profile, family: Family, feature_size: int, device: torch.device) -> Iterator[FakeTraining]:
    """A training as it is after a step; within this context, new tensors are fake and counted.

    Args:
        profile: the resolved settings.
        family: of the checkpoint, of which only the configuration is read.
        feature_size: width of the teacher's features.
        device: the device that trains.
    """
    models = []
    for one in family.trained.values():
        with torch.device("meta"):
            # As deep as the family, which may stand for a part of the blocks.
            one = one.with_blocks(*family.depths)
            transformer = one.empty_transformer(frozen_dtype(profile), int8=frozen_in_int8(profile))
            models.append(build_model(profile, one, transformer, feature_size if profile.crepa.enabled else None))
    with fake_memory() as live:
        live.part = WEIGHTS
        shared = SharedPlace(torch.device("cpu")) if profile.memory.offload_idle_expert else None
        yield FakeTraining(tuple(_fake_learner(profile, family, one, device, live, shared) for one in models), live)


def _fake_learner(
    profile: Profile,
    family: Family,
    model: AlignedTransformer,
    device: torch.device,
    live: LiveBytes,
    shared: SharedPlace | None,
) -> FakeLearner:
    """The learner of a model that is on the meta device, as it is after a step."""
    make_fake(model)
    blocks, trained = family.blocks(model.transformer), trainable(model.transformer)
    trained_part = WEIGHTS if profile.adapter.kind == "full" else ADAPTER
    live.assign(trained_part, trained)
    if profile.memory.stream_weights:
        stream(blocks, torch.device("cpu"))
    if shared is not None:
        shared.add(model.transformer, blocks)
    _watch(model, live)
    with live.belonging_to(trained_part):
        average = EMAModel(trained, decay=profile.train.ema) if profile.train.ema else None
    with live.belonging_to(OPTIMIZER):
        optimizer = _optimizer_with_state(profile, model, device)
    return FakeLearner(model, optimizer, average)


def _optimizer_with_state(profile: Profile, model: AlignedTransformer, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer as it is after its first step."""
    train = profile.train
    # bitsandbytes, which takes less than AdamW, and Prodigy, which takes twice as much, do not run on fake tensors.
    runs = train.optimizer in ("adamw", "adafactor")
    groups = [trainable(model.transformer), trainable(model.crepa) if model.crepa else []]
    optimizer = make_optimizer(train if runs else train.model_copy(update={"optimizer": "adamw"}), groups, device)
    _add_gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    if train.optimizer == "prodigy":
        for parameter, state in optimizer.state.items():
            state |= {"s": torch.zeros_like(parameter), "p0": torch.zeros_like(parameter)}
    return optimizer


def _add_gradients(model: AlignedTransformer) -> None:
    for parameter in trainable(model):
        parameter.grad = torch.empty_like(parameter)


def _step(
    profile: Profile,
    family: Family,
    training: FakeTraining,
    timeline: Timeline,
    batch: Tensors,
    clips: Clips,
    *,
    backward: bool,
) -> None:
    """One optimizer step of the trainer; gradients without content take the place of a backward pass."""
    model, optimizer, live = training.model, training.optimizer, training.live
    timeline.begin(Part("inputs"))
    live.part = ACTIVATIONS
    tensors = fake_batch(batch)
    noise, sigmas = torch.empty(batch["latents"].shape), torch.full((profile.train.batch_size,), 0.5)
    with live.belonging_to(ALIGNMENT):
        teaching = Teaching(*_features(clips, profile.train.batch_size), coefficient=1.0)
    with fake_autocast(profile):
        losses = step_losses(model, family, profile, tensors, noise, sigmas, teaching)
    if backward:
        timeline.begin(Part("losses"))
        losses.total.backward()
    else:
        timeline.begin(Part("gradients"))
        with live.belonging_to(GRADIENTS):
            _add_gradients(model)
    live.part = OPTIMIZER
    timeline.begin(Part("clipping"))
    nn.utils.clip_grad_norm_(trainable(model), profile.train.max_grad_norm or math.inf)
    with EachCall(timeline, live, "update"):
        optimizer.step()
    timeline.begin(END)


def fake_batch(batch: Tensors) -> Tensors:
    """Tensors on the meta device as fake ones; those on the CPU, such as lengths, are read by the model: they stay."""
    return {name: _like(tensor) if tensor.is_meta else tensor for name, tensor in batch.items()}


def fake_autocast(profile: Profile) -> torch.autocast:
    """The automatic casts of the run, for fake tensors."""
    return torch.autocast("cpu", torch.bfloat16, enabled=profile.model.dtype == "bfloat16")


def _features(clips: Clips, batch_size: int) -> tuple[Tensor | None, TokenGrid | None]:
    """Features of an encoder, as read from the cache, and their grid."""
    grid = clips.teacher
    if grid is None:
        return None, None
    return torch.empty(batch_size, grid.frames, grid.tokens, clips.feature_size, dtype=torch.float16), grid


def _watch(model: AlignedTransformer, live: LiveBytes) -> None:
    """Count gradients, and tensors of the alignment's forward and backward, under their parts."""
    for parameter in trainable(model):
        parameter.register_post_accumulate_grad_hook(lambda one: live.assign(GRADIENTS, [one.grad]))
    if model.crepa is None:
        return
    live.assign(ALIGNMENT, model.crepa.parameters())

    def belong_to(part: str) -> None:
        live.part = part

    def before(_crepa: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        belong_to(ALIGNMENT)
        # Its gradient is complete when the backward of the alignment ends.
        hidden = arguments[0].view_as(arguments[0])
        hidden.register_hook(lambda _: belong_to(ACTIVATIONS))
        return hidden, *arguments[1:]

    def after(_crepa: nn.Module, _arguments: Any, alignment: Alignment) -> None:
        belong_to(ACTIVATIONS)
        alignment.loss.register_hook(lambda _: belong_to(ALIGNMENT))

    model.crepa.register_forward_pre_hook(before)
    model.crepa.register_forward_hook(after)


@contextmanager
def fake_memory() -> Iterator[LiveBytes]:
    """Within this context, new tensors are fake and counted."""
    # Garbage collection takes a fifth of the time; tensors here are freed by their last reference.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with QuickFakeMode(), LiveBytes() as live:
            yield live
    finally:
        if collecting:
            gc.enable()


def make_fake(module: nn.Module) -> None:
    """Replace the parameters and buffers of a module on the meta device with fake CPU tensors.

    Models are built on the meta device because libraries convert modules in place, which fake parameters refuse.
    """
    fakes = {one: nn.Parameter(_like(one), one.requires_grad) for one in module.parameters()}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, fakes[parameter])
        # Some modules keep their frequencies as plain attributes.
        plain = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
        for name, tensor in [*part.named_buffers(recurse=False), *plain.items()]:
            setattr(part, name, _like(tensor))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
