"""The trained part of a transformer: a LoRA, or all of it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from crepa_cli.errors import UserError
from crepa_cli.models.family import Family
from crepa_cli.models.lora import fetch_lora, lora_rank, read_lora
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
    for layer in lora_layers(transformer).values():
        # peft would copy every input to the float32 of the LoRA's weights, and autocast that copy back to bfloat16.
        layer.cast_input_dtype_enabled = False


def lora_layers(transformer: nn.Module) -> dict[str, LoraLayer]:
    """The layers of a transformer that have a LoRA, by name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def start_from(transformer: ModelMixin, family: Family, adapter: AdapterSettings) -> None:
    """Give the LoRA of a transformer the weights of `adapter.init_from`; layers that are not in it stay without effect.

    Raises:
        UserError: if there is no such LoRA, or it does not fit.
    """
    assert adapter.init_from is not None
    layers = lora_layers(transformer)
    path = fetch_lora(adapter.init_from)
    for name, (down, up, scale) in read_lora(path, family, transformer, layers).items():
        ours = layers[name].lora_A["default"].weight, layers[name].lora_B["default"].weight
        if (down.shape, up.shape) != tuple(weight.shape for weight in ours):
            raise UserError(
                f"adapter.init_from: {path} does not fit: {name} has {tuple(down.shape)} and {tuple(up.shape)} there, "
                f"{tuple(ours[0].shape)} and {tuple(ours[1].shape)} here"
            )
        ours[0].copy_(down)
        ours[1].copy_(up.float() * (scale * adapter.rank / adapter.alpha))


def add_lora(transformer: ModelMixin, family: Family, path: Path, adapter: AdapterSettings) -> None:
    """Add the LoRA of a file to a transformer, with the rank and the layers that it has there.

    Args:
        transformer: of the base model.
        family: of the transformer.
        path: of the file.
        adapter: settings of which rank, layers and start are replaced.

    Raises:
        UserError: if the file holds no LoRA, or one that does not fit.
    """
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    rank = lora_rank(path)
    update = {
        "kind": "lora",
        "rank": rank,
        "alpha": float(rank),
        "dropout": 0.0,
        "target_modules": tuple(read_lora(path, family, transformer, linears)),
        "init_from": str(path),
    }
    adapter = adapter.model_copy(update=update)
    make_trainable(transformer, adapter)
    start_from(transformer, family, adapter)
