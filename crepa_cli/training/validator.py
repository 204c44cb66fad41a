"""Validation videos, sampled through the family's own pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from crepa_cli.data.images import first_frame
from crepa_cli.data.prepare import ClipForm
from crepa_cli.data.sheet import frame_row, write_sheet
from crepa_cli.data.video import write_video
from crepa_cli.events import ValidationSampled
from crepa_cli.heap import release_memory
from crepa_cli.models.family import Family, Tensors
from crepa_cli.models.streaming import place
from crepa_cli.processes import from_all
from crepa_cli.profile import Profile
from crepa_cli.runs.folder import RunFolder
from crepa_cli.runs.prompts import Prompts
from crepa_cli.training.learner import Learner


class Validator:
    """Samples one video for each validation prompt, always from the same noise, so that steps can be compared.

    Args:
        profile: the resolved settings.
        family: whose pipeline samples.
        prompts: one for each video, and the negative one of classifier-free guidance.
        form: size, length and frame rate of the clips; `validation.frames` may replace the length.
        run: the run's folder.
        accelerator: device and processes.
    """

    def __init__(
        self,
        profile: Profile,
        family: Family,
        prompts: Prompts,
        form: ClipForm,
        run: RunFolder,
        accelerator: Accelerator,
    ) -> None:
        self.validation = profile.validation
        self.streams = profile.memory.stream_weights
        self.seed = profile.train.seed
        self.family = family
        self.prompts = prompts
        self.form = form._replace(frames=self.validation.frames or form.frames)
        self.run = run
        self.accelerator = accelerator

    def sample(self, learner: Learner, step: int, should_stop: Callable[[], bool]) -> ValidationSampled:
        """Sample the videos after `step` steps, with a sheet of their frames beside them.

        The processes of a run share out the prompts and the main one writes. If `should_stop` becomes true, the videos
        that are complete are written and the others are left out.
        """
        transformer = learner.aligned.transformer
        with learner.averaged_weights(), torch.no_grad(), self.accelerator.autocast(), evaluating(transformer):
            pipeline = self._load_pipeline(transformer)
            videos = self._sample_share(pipeline, isinstance(transformer, FSDPModule), should_stop)
            del pipeline
        release_memory()
        frames = dict(from_all(videos))
        folder = self.run.samples(step)
        paths = {index: folder / f"{index:02d}.mp4" for index in sorted(frames)}
        if self.accelerator.is_main_process and frames:
            folder.mkdir(parents=True, exist_ok=True)
            for index, path in paths.items():
                write_video(path, frames[index], self.form.fps)
            write_sheet(self.run.sheet(step), [frame_row(frames[index]) for index in paths])
        return ValidationSampled(step, tuple(paths.values()))

    def _load_pipeline(self, transformer: nn.Module) -> DiffusionPipeline:
        pipeline = self.family.load_sampling_pipeline(transformer)
        device = self.accelerator.device
        for component in pipeline.components.values():
            # The transformer is in its place already, and its weights cannot be moved when they are sharded.
            if isinstance(component, nn.Module) and component is not transformer:
                another_expert = isinstance(component, type(transformer))
                place(component, device, streamed=self.streams and another_expert)
        return pipeline

    def _sample_share(
        self, pipeline: DiffusionPipeline, sharded: bool, should_stop: Callable[[], bool]
    ) -> list[tuple[int, Tensor]]:
        """Index and frames, uint8 `[F, 3, H, W]`, of this process's videos."""
        mine = range(len(self.prompts.validation))
        if not sharded:
            mine = mine[self.accelerator.process_index :: self.accelerator.num_processes]
        videos = []
        for index in mine:
            # A sharded transformer needs all processes in every step of the sampler: none may leave alone.
            video = self._sample_one(pipeline, index, (lambda: False) if sharded else should_stop)
            if video is None:
                break
            videos.append((index, video))
        return videos

    def _sample_one(self, pipeline: DiffusionPipeline, index: int, should_stop: Callable[[], bool]) -> Tensor | None:
        """The frames of one video, uint8 `[F, 3, H, W]`; None if the run is to stop."""

        def after_step(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if should_stop():
                raise _StoppedError
            return tensors

        validation, device = self.validation, self.accelerator.device
        inputs = self.family.form_arguments(**self.form._asdict())
        inputs |= self.family.sampling_arguments(
            _to(self.prompts.validation[index], device), _to(self.prompts.negative, device)
        )
        inputs["num_inference_steps"] = validation.steps
        inputs["guidance_scale"] = validation.guidance_scale
        if validation.images:
            inputs["image"] = first_frame(validation.images[index], self.form.width, self.form.height)
        generator = torch.Generator().manual_seed(self.seed)
        try:
            video = pipeline(**inputs, generator=generator, output_type="pt", callback_on_step_end=after_step).frames[0]
        except _StoppedError:
            return None
        frames: Tensor = (video.float().clamp(0, 1) * 255).round().byte().cpu()
        return frames


class _StoppedError(Exception):
    """The run is to stop: leave the sampler."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within this context a module is in evaluation mode, and in training mode afterwards."""
    module.eval()
    try:
        yield
    finally:
        module.train()


def _to(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
