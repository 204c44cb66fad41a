"""The trained part of a transformer: a LoRA, or all of it."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from crepa_cli.errors import UserError
from crepa_cli.profile import AdapterSettings


def make_trainable(transformer: ModelMixin, adapter: AdapterSettings) -> None:
    """Add a LoRA, or unfreeze everything; what is trained is in float32.

    Raises:
        UserError: if no layer has a name of `adapter.target_modules`.
    """
    if adapter.kind == "full":
        transformer.requires_grad_(True)
        return
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.target_modules),
    )
    try:
        transformer.add_adapter(config)
    except ValueError as error:
        raise UserError(f"adapter.target_modules = {list(adapter.target_modules)}: {error}") from error
    cast_training_params(transformer, dtype=torch.float32)
