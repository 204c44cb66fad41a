"""Memory of a validation: a step of the sampler and the decoding of its video, run on fake tensors."""

from __future__ import annotations

from copy import copy

import torch
from diffusers import ModelMixin
from torch import Tensor

from crepa_cli.kept import kept
from crepa_cli.memory.depth import END, Part, Segments, Timeline, highest, segments_of_all_blocks
from crepa_cli.memory.repeats import run_vae_once_per_shape
from crepa_cli.memory.shapes import Clips
from crepa_cli.memory.step import fake_autocast, fake_batch, fake_memory, fake_training, make_fake
from crepa_cli.models.family import Family
from crepa_cli.models.streaming import place
from crepa_cli.profile import Profile
from crepa_cli.training.build import frozen_dtype, frozen_in_int8, trainable


@torch.no_grad()
def predict_validation(profile: Profile, family: Family, clip: Clips, device: torch.device) -> dict[str, int]:
    """Peak bytes of a step of the sampler, and of the decoding after it, with all that training keeps meanwhile.

    Args:
        profile: the resolved settings.
        family: of the checkpoint, of which only configurations are read.
        clip: the tensors of a clip like the validation's videos, and of a prompt.
        device: the device that trains.

    Raises:
        UserError: if a configuration cannot be read.
    """

    def run(profile: Profile, family: Family, _backward: bool) -> Segments:
        return _sampling(profile, family, clip, device)

    segments = segments_of_all_blocks(profile, family, run)
    # Autocast keeps the casts of weights until it ends: those of the sampler are there during the decoding.
    left = segments[-1][1].end.total()
    return {"sampling": highest(segments).total(), "decoding": left + _kept_decoding(family, clip.tensors["latents"])}


def _kept_decoding(family: Family, latents: Tensor) -> int:
    """The peak of the decoding, which is stored for all tasks."""
    vae = family.base.read_config("vae/config.json")
    facts = [family.name, vae, family.vae_dtype, family.vae_tiling, latents.shape]
    return kept(["decoding", *facts], lambda: {"decoding": decoding_peak(family, latents)})["decoding"]


def _sampling(profile: Profile, family: Family, clip: Clips, device: torch.device) -> Segments:
    """The segments of a step of the sampler, with its VAE in memory."""
    one_batch = family.guides_in_one_batch and profile.validation.guidance_scale > 1
    batch = {name: torch.stack([tensor] * (2 if one_batch else 1)) for name, tensor in clip.tensors.items()}
    vae = family.empty_vae_pipeline().vae
    experts = _other_experts(family, profile)
    image_encoder = family.base.empty_model(family.image_encoder, family.vae_dtype) if family.image_encoder else None
    with fake_training(profile, family, clip.feature_size, device) as training:
        live, trained = training.live, [learner.model.transformer.eval() for learner in training.learners]
        for learner in training.learners:
            if learner.average is not None and device.type == "cpu":
                # The weights that the average stands in for are set aside in the memory of the CPU.
                learner.average.store(trainable(learner.model.transformer))
        for module in filter(None, (vae, image_encoder, *experts)):
            make_fake(module)
        for expert in experts:
            place(expert, torch.device("cpu"), streamed=profile.memory.stream_weights)
        timeline = Timeline(live)
        for index, transformer in enumerate((*trained, *experts)):
            timeline.watch(family.blocks(transformer), f"forward {index}")
        timeline.begin(Part("inputs"))
        tensors = fake_batch(batch)
        with fake_autocast(profile):
            latents = tensors["latents"]
            inputs = family.step(tensors, torch.empty_like(latents), torch.full((len(latents),), 0.5)).inputs
            for transformer in (*trained, *experts):
                transformer(**inputs)
            timeline.begin(END)
        return timeline.segments


@torch.no_grad()
def decoding_peak(family: Family, latents: Tensor) -> int:
    """The most bytes that the decoding of latents `[C, T, h, w]` holds beside them and the VAE's weights."""
    pipeline = family.empty_vae_pipeline()
    with fake_memory() as live:
        make_fake(pipeline.vae)
        run_vae_once_per_shape(pipeline.vae, "decoder", live)
        given = torch.empty(latents.shape)
        held = live.live
        video = family.decode_latents(pipeline, given)
        pipeline.video_processor.postprocess_video(video[None], output_type="pt")
        return live.peak - held


def _other_experts(family: Family, profile: Profile) -> list[ModelMixin]:
    """The transformers that the sampler needs beside those that are trained, on the meta device."""
    experts = []
    for component in family.idle_components:
        other = copy(family)
        other.config = family.base.read_config(f"{component}/config.json")
        other = other.with_blocks(*family.depths)
        with torch.device("meta"):
            experts.append(other.empty_transformer(frozen_dtype(profile), int8=frozen_in_int8(profile)))
    return experts
