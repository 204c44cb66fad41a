"""Frozen linear layers in int8 with a scale for each output row, quantized while they are read from the checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crepa_cli.errors import UserError, listed
from crepa_cli.models.base import require_whole
from crepa_cli.models.precision import is_kept_in_float32

LOG = logging.getLogger(__name__)
LARGEST = 127
"""Codes are from -127 to 127."""
CHUNK = 2**17
"""Numbers that are quantized at a time."""


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes `[out, in]` in int8 and scales `[out, 1]`, whose product differs from the weight by half a scale at most.

    Args:
        weight: `[out, in]`, in any floating dtype.
        dtype: of the scales, which are rounded to it before the codes are chosen.
    """
    codes = torch.empty_like(weight, dtype=torch.int8)
    if weight.is_meta:
        return codes, weight.new_empty(len(weight), 1, dtype=dtype)
    largest = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))
    # A row of zeros must not be divided by zero.
    scale = (largest.float() / LARGEST).to(dtype).clamp_(min=torch.finfo(dtype).tiny)
    # A few rows at a time: no copy of the whole weight in float32 is made while a model is loaded.
    rows = max(1, CHUNK // weight.shape[1])
    for part, values, scales in zip(*(tensor.split(rows) for tensor in (codes, weight, scale)), strict=True):
        part.copy_((values.float() / scales).round_())
    return codes, scale


class Int8Linear(nn.Linear):
    """A frozen linear layer whose weight is the product of codes, `weight`, and scales, `scale`; see `quantize`.

    It computes in the dtype of autocast, or else in that of its input. PEFT adds a LoRA to it as to any nn.Linear.

    Args:
        linear: the layer to quantize. Its bias is used as it is; the scales have the dtype of its weight.
    """

    scale: nn.Parameter

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.set_weight(linear.weight.detach(), linear.weight.dtype)

    def set_weight(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Quantize a weight `[out, in]` with scales in a dtype."""
        codes, scale = quantize(weight, dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in nn.Linear)
        """`input @ (weight * scale).T + bias`, `[..., out]`; the gradient goes to the input `[..., in]` alone."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        arguments = input.to(dtype), self.weight, self.scale.to(dtype), bias
        output: Tensor = _Int8Product.apply(*arguments)  # type: ignore[no-untyped-call]  # untyped in torch
        return output


class _Int8Product(torch.autograd.Function):
    """Saves codes and scales for the backward, and multiplies them again there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return F.linear(hidden, codes * scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scale = ctx.saved_tensors
        return gradient @ (codes * scale), None, None, None


def quantize_linears(transformer: ModelMixin, blocks: nn.ModuleList) -> None:
    """Replace the linear layers of a transformer's blocks, except those that diffusers keeps in float32."""
    inside = set(blocks.modules())
    for path, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear) and module in inside and not is_kept_in_float32(transformer, path):
            transformer.set_submodule(path, Int8Linear(module))


def has_int8(transformer: nn.Module) -> bool:
    """Whether a transformer has linear layers in int8."""
    return any(isinstance(module, Int8Linear) for module in transformer.modules())


def read_weights(transformer: ModelMixin, files: Sequence[Path]) -> None:
    """Give a transformer without content its weights, and quantize those of its linear layers in int8.

    It reads tensor by tensor: beside what is kept, one is in memory at a time. Linear layers are quantized from the
    dtype in the file; everything else gets the dtype that it has in the transformer.

    Args:
        transformer: from the checkpoint's configuration, with parameters on the meta device.
        files: in safetensors; together they hold all weights.

    Raises:
        UserError: if a file cannot be read, or a weight is missing or has another shape.
    """
    scales = {f"{path}.scale" for path, module in transformer.named_modules() if isinstance(module, Int8Linear)}
    empty = {name: parameter for name, parameter in transformer.named_parameters() if name not in scales}
    unknown = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no dictionary)
                    if name in empty:
                        _set_weight(transformer, name, file.get_tensor(name), empty.pop(name))
                    else:
                        unknown.append(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}; download it anew") from error
    require_whole(files[0].parent, list(empty))
    ignored = transformer._keys_to_ignore_on_load_unexpected or ()
    if unknown := [name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)]:
        LOG.warning("%s has weights that the transformer does not use: %s", files[0].parent, listed(unknown))


def _set_weight(transformer: ModelMixin, name: str, weight: Tensor, empty: nn.Parameter) -> None:
    """Replace a parameter by a weight as it is in the file."""
    if weight.shape != empty.shape:
        raise UserError(
            f"{name} has the shape {tuple(weight.shape)} in the checkpoint, and {tuple(empty.shape)} by its config.json"
        )
    path, _, key = name.rpartition(".")
    module = transformer.get_submodule(path)
    if isinstance(module, Int8Linear) and key == "weight":
        module.set_weight(weight, module.scale.dtype)
    else:
        # A copy, so that the file does not stay mapped.
        setattr(module, key, nn.Parameter(weight.to(empty.dtype, copy=True), requires_grad=False))
