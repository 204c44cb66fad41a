"""The trained part of a transformer, a LoRA or all of it, and its export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from crepa_cli.errors import UserError
from crepa_cli.files import whole_folder
from crepa_cli.models.family import COMFYUI_FILE, Family, Tensors
from crepa_cli.profile import AdapterSettings

WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
"""Names of the files that diffusers' `from_pretrained` looks for."""


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


def export_weights(
    family: Family, transformer: ModelMixin, weights: Tensors, adapter: AdapterSettings, folder: Path
) -> None:
    """Write what was trained in the layouts of the settings, replacing what the folder held; whole or not at all.

    A LoRA becomes `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights`, and `comfyui_lora.safetensors`;
    a full fine-tune becomes `transformer/`, for `from_pretrained`.

    Args:
        family: of the transformer.
        transformer: whose configuration, and that of its LoRA, go with the weights.
        weights: the trained parameters, by their names in the transformer.
        adapter: what was trained, and the layouts.
        folder: for the files.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    with whole_folder(folder, sum(tensor.nbytes for tensor in weights.values())) as partial:
        if adapter.kind == "full":
            transformer.save_config(partial / "transformer")
            save_torch_state_dict(weights, partial / "transformer", filename_pattern=WEIGHTS_PATTERN)
        else:
            _export_lora(family, transformer, weights, adapter, partial)


def _export_lora(
    family: Family, transformer: ModelMixin, weights: Tensors, adapter: AdapterSettings, folder: Path
) -> None:
    layers = get_peft_model_state_dict(transformer, state_dict=weights)
    config = transformer.peft_config["default"]
    if "diffusers" in adapter.export:
        getattr(diffusers, family.pipeline_class).save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
        )
    if "comfyui" in adapter.export:
        assert family.comfyui_names is not None, "open_family has checked it"
        renamed = comfyui_layers(layers, family.comfyui_names, config.r, config.lora_alpha)
        save_file(renamed, folder / COMFYUI_FILE, metadata={"format": "pt"})


def comfyui_layers(layers: Tensors, names: Mapping[str, str], rank: int, alpha: float) -> Tensors:
    """A LoRA by the module names of the original checkpoint, as ComfyUI reads it.

    Args:
        layers: `<module>.lora_A.weight` and `<module>.lora_B.weight`, by the names of diffusers.
        names: `comfyui_names` of the family.
        rank: of the matrices.
        alpha: stored as `<module>.alpha` unless it is the rank, which is what its absence means.
    """
    renamed = {}
    for key, tensor in layers.items():
        module, matrix, _ = key.rsplit(".", 2)
        for pattern, name in names.items():
            module = re.sub(pattern, name, module)
        renamed[f"diffusion_model.{module}.{matrix}.weight"] = tensor.detach().cpu().contiguous()
        if alpha != rank:
            renamed[f"diffusion_model.{module}.alpha"] = torch.tensor(float(alpha))
    return renamed
