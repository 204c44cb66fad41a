"""Memory of a validation: a step of the sampler and the decoding of its video, run on fake tensors."""

from __future__ import annotations

from copy import copy

import torch
from diffusers import ModelMixin

from crepa_cli.memory.shapes import Clips
from crepa_cli.memory.step import fake_autocast, fake_batch, fake_training, make_fake
from crepa_cli.models.family import Family
from crepa_cli.models.precision import compute_in_own_dtype
from crepa_cli.models.streaming import stream
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
    one_batch = family.guides_in_one_batch and profile.validation.guidance_scale > 1
    batch = {name: torch.stack([tensor] * (2 if one_batch else 1)) for name, tensor in clip.tensors.items()}
    pipeline = family.empty_vae_pipeline()
    compute_in_own_dtype(pipeline.vae)
    experts = _other_experts(family, profile)
    image_encoder = family.base.empty_model(family.image_encoder, family.vae_dtype) if family.image_encoder else None
    with fake_training(profile, family, clip.feature_size, device) as training:
        live, trained = training.live, training.model.transformer.eval()
        if training.average is not None and device.type == "cpu":
            # The weights that the average stands in for are set aside in the memory of the CPU.
            training.average.store(trainable(trained))
        for module in filter(None, (pipeline.vae, image_encoder, *experts)):
            make_fake(module)
        if profile.memory.stream_weights:
            for expert in experts:
                stream(family.blocks(expert), torch.device("cpu"))
        tensors = fake_batch(batch)
        # Autocast keeps the casts of weights until it ends: those of the sampler are there during the decoding.
        with fake_autocast(profile):
            live.reset_peak()
            latents = tensors["latents"]
            inputs = family.step(tensors, torch.empty_like(latents), torch.full((len(latents),), 0.5)).inputs
            for transformer in (trained, *experts):
                transformer(**inputs)
            sampling = live.peak
            live.reset_peak()
            video = family.decode_latents(pipeline, latents[0])
            pipeline.video_processor.postprocess_video(video[None], output_type="pt")
        return {"sampling": sampling, "decoding": live.peak}


def _other_experts(family: Family, profile: Profile) -> list[ModelMixin]:
    """The transformers that the sampler needs beside the trained one, on the meta device."""
    experts = []
    for component in family.transformer_components:
        if component != family.component:
            other = copy(family)
            other.config = family.base.read_config(f"{component}/config.json")
            with torch.device("meta"):
                experts.append(other.empty_transformer(frozen_dtype(profile), int8=frozen_in_int8(profile)))
    return experts
