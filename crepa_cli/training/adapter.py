"""What is trained of a transformer, LoRA or all of it, and how it leaves the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict

from crepa_cli.errors import UserError
from crepa_cli.models.family import Family
from crepa_cli.profile import Adapter


def make_trainable(transformer: ModelMixin, adapter: Adapter) -> None:
    """Add a LoRA, or unfreeze everything; what is trained is in float32.

    Raises:
        UserError: if no layer has a name of `adapter.target_modules`.
    """
    if adapter.kind == "full":
        transformer.requires_grad_(True)
        return
    assert adapter.rank is not None, "the family's defaults give a rank"
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank if adapter.alpha is None else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.target_modules or ()),
    )
    try:
        transformer.add_adapter(config)
    except ValueError as error:
        raise UserError(f"adapter.target_modules = {list(adapter.target_modules or ())}: {error}") from error
    cast_training_params(transformer, dtype=torch.float32)


def export_weights(family: Family, transformer: ModelMixin, adapter: Adapter, folder: Path) -> None:
    """Write what was trained in diffusers' layout, replacing what the folder held; whole or not at all.

    A LoRA becomes `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights`; a full fine-tune becomes
    `transformer/`, for `from_pretrained`.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if adapter.kind == "full":
        transformer.save_pretrained(partial / "transformer")
    else:
        getattr(diffusers, family.pipelines[family.task]).save_lora_weights(
            partial,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
