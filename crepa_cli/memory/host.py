"""The host's memory that a run pins: streamed weights and offloaded hidden states."""

from __future__ import annotations

import torch

from crepa_cli.data.buckets import Bucket
from crepa_cli.memory.shapes import caption_bytes, hidden_bytes
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.models.streaming import streamed_bytes, streamed_layers
from crepa_cli.profile import Profile
from crepa_cli.training.build import frozen_dtype, frozen_in_int8


def predict_pinned(profile: Profile, family: Family, bucket: Bucket) -> dict[str, int]:
    """Bytes of the host that a process pins in the preparation and in training, which come one after the other.

    Args:
        profile: the resolved settings.
        family: of the checkpoint, of which only configurations are read.
        bucket: the largest shape of its clips.
    """
    memory, encoders, blocks, states = profile.memory, 0, 0, 0
    if memory.stream_weights:
        dtype = torch_dtype(profile.model.dtype)
        models = [family.base.empty_model(name, dtype) for name in family.text_encoders]
        encoders = sum(streamed_bytes(layers) for model in models for layers in streamed_layers(model))
    if memory.stream_weights or memory.offload_idle_expert:
        with torch.device("meta"):
            transformer = family.empty_transformer(frozen_dtype(profile), int8=frozen_in_int8(profile))
        # A validation samples with all experts, which are equally large.
        experts = len(family.transformer_components) if profile.validation.every else len(family.trained)
        blocks = experts * streamed_bytes(family.blocks(transformer.requires_grad_(False)))
    if memory.offload_activations:
        moved = max(0, family.block_count - memory.keep_blocks - family.first_states_stay)
        states = moved * hidden_bytes(profile, family, bucket)
        states += family.caption_blocks * caption_bytes(profile, family)
    return {"preparation": encoders, "training": blocks + states}
