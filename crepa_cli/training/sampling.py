"""Videos sampled through the family's own pipeline, for validation and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from crepa_cli.data.images import first_frame
from crepa_cli.data.scan import ClipForm
from crepa_cli.models.family import Family, Tensors
from crepa_cli.models.streaming import place
from crepa_cli.profile import Profile


class VideoSampler:
    """Samples videos from encoded prompts.

    Args:
        profile: the resolved settings, those of `validation` among them.
        family: whose pipeline samples.
        form: size, length and frame rate of the clips; `validation.frames` may replace the length.
        device: where the pipeline runs.
    """

    def __init__(self, profile: Profile, family: Family, form: ClipForm, device: torch.device) -> None:
        self.validation = profile.validation
        self.streams = profile.memory.stream_weights
        self.family = family
        self.form = form._replace(frames=self.validation.frames or form.frames)
        self.device = device

    def load_pipeline(self, transformers: Mapping[str, ModelMixin]) -> DiffusionPipeline:
        """The pipeline around transformers, by their components, that are in their places already."""
        first = next(iter(transformers.values()))
        pipeline = self.family.load_sampling_pipeline(first)
        pipeline.register_modules(**transformers)
        for name, component in pipeline.components.items():
            # The transformer's weights cannot be moved when they are sharded.
            if isinstance(component, nn.Module) and name not in transformers:
                another_expert = isinstance(component, type(first))
                place(component, self.device, streamed=self.streams and another_expert)
        return pipeline

    def sample(
        self,
        pipeline: DiffusionPipeline,
        prompt: Tensors,
        negative: Tensors,
        *,
        image: str | None = None,
        seed: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Tensor | None:
        """The frames of one video, uint8 `[F, 3, H, W]` on the CPU; None if `should_stop` became true.

        Args:
            pipeline: from `load_pipeline`.
            prompt: encoded.
            negative: the encoded prompt of classifier-free guidance.
            image: file with the first frame, for image to video.
            seed: of the noise.
            should_stop: asked between steps of the sampler.
        """

        def before_step(*_: Any) -> None:
            if should_stop():
                raise _StoppedError

        form = self.form
        inputs = self.family.form_arguments(**form._asdict())
        inputs |= self.family.sampling_arguments(_to(prompt, self.device), _to(negative, self.device))
        inputs["num_inference_steps"] = self.validation.steps
        inputs |= self.family.guide(pipeline, self.validation.guidance_scale)
        if image is not None:
            inputs["image"] = first_frame(image, form.width, form.height)
        generator = torch.Generator().manual_seed(seed)
        with ExitStack() as stack:
            # Not all pipelines take a callback.
            for name in self.family.transformer_components:
                stack.enter_context(pipeline.components[name].register_forward_pre_hook(before_step))
            try:
                video = pipeline(**inputs, generator=generator, output_type="pt").frames[0]
            except _StoppedError:
                return None
        frames: Tensor = (video.float().clamp(0, 1) * 255).round().byte().cpu()
        return frames


class _StoppedError(Exception):
    """Leave the sampler."""


@contextmanager
def sampling(transformer: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within this context a transformer is in evaluation mode, under autocast and without gradients.

    Afterwards it is in training mode.
    """
    with evaluating(transformer), torch.no_grad(), accelerator.autocast():
        yield


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
