"""Weights read tensor by tensor from safetensors into a transformer without content: whole, or this process's share."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crepa_cli.errors import UserError, listed
from crepa_cli.models.base import require_whole
from crepa_cli.models.int8 import Int8Linear, quantize

LOG = logging.getLogger(__name__)


def make_hollow(transformer: nn.Module) -> None:
    """Move each parameter from the meta device to the CPU, as a single number that is repeated.

    PEFT puts a LoRA on the device of its layer: on the meta device it would lose its first values.
    """
    for module, name, parameter in _parameters(transformer):
        if parameter.is_meta:
            number = torch.empty((), dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(number.expand(parameter.shape), requires_grad=False))


def make_empty(transformer: nn.Module) -> None:
    """Move the parameters of `make_hollow` to the meta device again, for FSDP2 to shard them without content."""
    for module, name, parameter in _parameters(transformer):
        if parameter.numel() > 1 and not any(parameter.stride()):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))


def _parameters(transformer: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter with the module that holds it and its name there."""
    return [
        (module, name, parameter)
        for module in transformer.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]


def read_weights(transformer: ModelMixin, stored: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Give the parameters on the meta device their weights, and quantize those of linear layers in int8.

    It reads tensor by tensor: beside what is kept, one is in memory at a time. Of a sharded parameter, each process
    keeps its own rows. Linear layers are quantized from the dtype in the file; everything else gets the dtype that it
    has in the transformer.

    Args:
        transformer: from the checkpoint's configuration, with or without a LoRA.
        stored: all weights by their names.
        source: what they are read from, for messages.

    Raises:
        UserError: if a file cannot be read, or a weight is missing or has another shape.
    """
    scales = {f"{path}.scale" for path, module in transformer.named_modules() if isinstance(module, Int8Linear)}
    names = {
        # PEFT puts the layers that have a LoRA one level deeper.
        name.replace(".base_layer.", "."): name
        for name, parameter in transformer.named_parameters()
        if parameter.is_meta and name not in scales
    }
    buffers = dict(transformer.named_buffers())
    unknown = []
    for key, weight in stored:
        if key in names:
            _set_weight(transformer, names.pop(key), weight)
        elif key in buffers:
            buffers[key].data = weight.to(buffers[key].device, transformer.dtype, copy=True)
        else:
            unknown.append(key)
    require_whole(source, list(names))
    ignored = transformer._keys_to_ignore_on_load_unexpected or ()
    if unknown := [name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)]:
        LOG.warning("%s has weights that the transformer does not use: %s", source, listed(unknown))


def _set_weight(transformer: ModelMixin, name: str, weight: Tensor) -> None:
    """Replace a parameter by a weight as it is in the file."""
    path, _, key = name.rpartition(".")
    module = transformer.get_submodule(path)
    empty: nn.Parameter = getattr(module, key)
    if weight.shape != empty.shape:
        raise UserError(
            f"{name} has the shape {tuple(weight.shape)} in the checkpoint, and {tuple(empty.shape)} by its config.json"
        )
    weight = _own_rows(weight, empty)
    if isinstance(module, Int8Linear) and key == "weight":
        codes, scale = quantize(weight, module.scale.dtype)
        module.weight, module.scale = _like(codes, empty), _like(scale, module.scale)
    else:
        # A copy, so that the file does not stay mapped.
        setattr(module, key, _like(weight.to(empty.dtype, copy=True), empty))


def _own_rows(weight: Tensor, parameter: nn.Parameter) -> Tensor:
    """The rows of a weight that this process holds if the parameter is sharded, as FSDP2 shares them out; else all."""
    if not isinstance(parameter, DTensor):
        return weight
    rank, shares = parameter.device_mesh.get_local_rank(), weight.chunk(parameter.device_mesh.size())
    # There are fewer shares than processes if there are fewer rows.
    return shares[rank] if rank < len(shares) else weight[:0]


def _like(values: Tensor, parameter: nn.Parameter) -> nn.Parameter:
    """A parameter with these values, in the place of another one and sharded as that is."""
    if isinstance(parameter, DTensor):
        mesh, local = parameter.device_mesh, values.to(parameter.device_mesh.device_type)
        values = DTensor.from_local(
            local, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    return nn.Parameter(values, requires_grad=parameter.requires_grad)
