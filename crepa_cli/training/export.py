"""Export of trained weights: files for diffusers and ComfyUI that need nothing but their tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from crepa_cli.files import whole_files
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family, Tensors
from crepa_cli.models.joined import original_lora, original_weights
from crepa_cli.profile import AdapterSettings
from crepa_cli.profile.settings import Export
from crepa_cli.runs.folder import Exports

WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
"""Names of the files that diffusers' `from_pretrained` looks for."""
HASH = "modelspec.hash_sha256"
IMPLEMENTATION = "modelspec.implementation"
UNKNOWN_HASH = f"0x{0:064x}"
CHUNK = 2**24
Header = Mapping[str, str]


def export_weights(
    family: Family,
    transformer: ModelMixin,
    weights: Tensors,
    adapter: AdapterSettings,
    exports: Exports,
    header: Header,
) -> None:
    """Write what was trained for the programs of the settings, each file whole or not at all.

    A LoRA becomes a file for diffusers and one with the names of the original checkpoint, which ComfyUI loads, and
    diffusers for most families. A full fine-tune becomes a folder for `from_pretrained` and one file with the
    original names. None needs its header: the scale alpha / rank is in the matrices.

    Args:
        family: of the transformer.
        transformer: whose configuration goes with a full fine-tune; its weights are not read.
        weights: the trained parameters, by their names in the transformer.
        adapter: what was trained, the programs and the dtype.
        exports: the folder and the names.
        header: text for the headers of the files, by key.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    dtype = torch_dtype(adapter.export_dtype)
    if adapter.kind == "lora":
        weights = lora_layers(weights, adapter.alpha)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    write = _write_lora if adapter.kind == "lora" else _write_all_weights
    with whole_files(exports.folder, len(adapter.export) * sum(tensor.nbytes for tensor in weights.values())) as folder:
        for program in adapter.export:
            write(program, folder, family, transformer, weights, exports, {IMPLEMENTATION: program, **header})


def lora_layers(weights: Tensors, alpha: float) -> Tensors:
    """`<module>.lora_A.weight` `[rank, in]` and `<module>.lora_B.weight` `[out, rank]`, whose product is the change.

    Args:
        weights: of a LoRA, by the names of peft, whose product is multiplied by alpha / rank.
        alpha: of the LoRA.
    """
    layers = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
    return {
        name: tensor * (alpha / tensor.shape[1]) if name.endswith(".lora_B.weight") else tensor
        for name, tensor in layers.items()
    }


def _write_lora(
    program: Export,
    folder: Path,
    family: Family,
    transformer: ModelMixin,
    layers: Tensors,
    exports: Exports,
    header: Header,
) -> None:
    if program == "diffusers":
        named = {f"transformer.{name}": tensor for name, tensor in layers.items()}
        write_safetensors(folder / exports.diffusers, named, header)
    else:
        original = original_lora(family, transformer, layers)
        named = {f"{family.comfyui_prefix}{name}": tensor for name, tensor in original.items()}
        write_safetensors(folder / exports.comfyui, named, header)


def _write_all_weights(
    program: Export,
    folder: Path,
    family: Family,
    transformer: ModelMixin,
    weights: Tensors,
    exports: Exports,
    header: Header,
) -> None:
    if program == "diffusers":
        path = folder / exports.transformer
        transformer.save_config(path)
        save_torch_state_dict(weights, path, filename_pattern=WEIGHTS_PATTERN)
    else:
        named = original_weights(family, weights)
        write_safetensors(folder / exports.comfyui, named, {**header, **family.comfyui_header})


def write_safetensors(path: Path, tensors: Tensors, header: Header) -> None:
    """Write tensors with a header to which the SHA-256 of their bytes is added, as ModelSpec asks.

    Equal tensors and headers make equal files.
    """
    save_file(tensors, path, metadata={"format": "pt", **header, HASH: UNKNOWN_HASH})
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        content: dict[str, Any] = json.loads(file.read(size))
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        # safetensors writes the metadata in random order. Sorted, it has the same length.
        metadata = content["__metadata__"] | {HASH: f"0x{digest.hexdigest()}"}
        content["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, f"the header of {path} has grown from {size} to {len(text)} bytes"
        file.seek(8)
        file.write(text.ljust(size))
