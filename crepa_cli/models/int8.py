"""Frozen linear layers in int8 with a scale for each output row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crepa_cli.models.precision import is_kept_in_float32

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
        codes, scale = quantize(linear.weight.detach(), linear.weight.dtype)
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
