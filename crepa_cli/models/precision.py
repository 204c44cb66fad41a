"""The dtypes of a model, and the parts of it that keep their own while the rest runs under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from crepa_cli.alignment.comparison import full_precision


def in_loaded_dtypes(model: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """A new model of diffusers with the dtypes that `from_pretrained` gives it, and parameters without gradient."""
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            parameter_dtype = torch.float32 if is_kept_in_float32(model, f"{path}.{name}") else dtype
            # Not model.to(): the parameters of a FakeTensorMode can be replaced, but not converted.
            setattr(module, name, nn.Parameter(parameter.to(parameter_dtype), requires_grad=False))
    return model


def is_kept_in_float32(model: ModelMixin, path: str) -> bool:
    """Whether diffusers keeps the module or parameter of a path, such as `blocks.0.norm1`, in float32."""
    return not set(path.split(".")).isdisjoint(model._keep_in_fp32_modules or ())


def keep_float32(transformer: ModelMixin) -> ModelMixin:
    """Run the modules that diffusers keeps in float32 without autocast, and return the transformer.

    Autocast looks at operations, not at weights: it would run a time embedding with float32 weights in bfloat16.
    """
    kept = set(transformer._keep_in_fp32_modules or ())
    for path, module in transformer.named_modules():
        if path.rpartition(".")[2] in kept:
            module.forward = without_autocast(module.forward)
    return transformer


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, run without autocast on the device of its first argument, a tensor."""

    def run(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        with full_precision(tensor.device):
            return function(tensor, *arguments, **keywords)

    return run


def compute_in_own_dtype(vae: Any) -> None:
    """Let a VAE encode and decode without autocast, whatever the dtype of what it gets."""

    def in_own_dtype(method: Callable[..., Any]) -> Callable[..., Any]:
        return without_autocast(lambda tensor, *rest, **named: method(tensor.to(vae.dtype), *rest, **named))

    vae.encode, vae.decode = in_own_dtype(vae.encode), in_own_dtype(vae.decode)


def under_this_autocast(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The same function, run under the autocast of this moment even where another one holds."""
    if not torch.amp.is_autocast_available(device.type):
        return function
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch.autocast(device.type, dtype, enabled=enabled):
            return function(*arguments, **keywords)

    return run
