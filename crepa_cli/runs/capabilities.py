"""Settings checked against what this machine can do, before any clip is read."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton, has_triton_package

from crepa_cli.models.attention import KERNELS, Attention
from crepa_cli.models.dtypes import torch_dtype

if TYPE_CHECKING:
    from crepa_cli.models.family import Family
    from crepa_cli.profile import Profile

BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability of the first NVIDIA GPUs with bfloat16: Ampere."""
NO_C_COMPILER = (
    "Triton needs a C compiler, and finds none: install gcc and put it on the PATH, or name another one in the "
    "environment variable CC"
)
ON_WINDOWS = sys.platform == "win32"


def attention_mistakes(profile: Profile, family: Family, device: torch.device) -> list[str]:
    """Whether the family's attention needs `train.compile` on this device, and it is off."""
    if profile.train.compile or not family.needs_compilation or device.type == "cpu":
        return []
    return [
        f"train.compile: the attention of {family.base.name} would hold every score, hundreds of gigabytes for a long "
        "clip, unless it is compiled; set train.compile = true"
    ]


def process_mistakes(profile: Profile, family: Family, processes: int) -> list[str]:
    """Settings that do not go with several processes."""
    if processes == 1:
        return []
    mistakes = []
    if family.trains_all:
        mistakes.append(
            f"model.variant = 'both': it trains in one process, and there are {processes}; train one expert after the "
            f"other, with model.variant = {' or '.join(family.experts)}, or leave --processes out"
        )
    if profile.adapter.kind == "full" and not (family.uses_all_weights or profile.train.sharding):
        # DistributedDataParallel waits for the gradient of every weight.
        mistakes.append(
            f"adapter.kind = 'full': {family.name} has weights that get no gradient, and {processes} processes train "
            "whole weights of it with train.sharding = true alone; set it, or leave --processes out"
        )
    return mistakes


def kernel_mistakes(profile: Profile, family: Family, device: torch.device) -> list[str]:
    """Whether the settings name a kernel of attention that does not compute that of the family on this device."""
    name = profile.train.attention
    if name in ("auto", "native"):
        return []
    if not family.attention_heads:
        return [
            f"train.attention = {name!r}: {family.base.name} has a kind of attention with a single kernel; leave it out"
        ]
    attention = Attention.of(family, torch_dtype(profile.model.dtype))
    if attention.runs(name, device):
        return []
    others = ", ".join(kernel for kernel in KERNELS if attention.runs(kernel, device))
    here = "this CPU" if device.type == "cpu" else "this GPU"
    return [
        f"train.attention = {name!r}: it computes no heads of {attention.size} numbers in {profile.model.dtype} on "
        f"{here}; leave it out, or choose one of: {others}"
    ]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; NVIDIA's GPUs before Ampere only emulate it, many times slower."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY


def dtype_mistakes(profile: Profile, device: torch.device) -> list[str]:
    """Whether the settings ask for bfloat16 on a device that lacks it."""
    if profile.model.dtype != "bfloat16" or has_bfloat16(device):
        return []
    return [
        f"model.dtype = 'bfloat16': {torch.cuda.get_device_name(device)} cannot compute in it; use a GPU of the Ampere "
        "generation or later (RTX 30, A10, L4, A100), or, if crepa doctor says that it fits, model.dtype = 'float32'"
    ]


def compile_mistakes(profile: Profile, device: torch.device) -> list[str]:
    """Compilers that `train.compile` needs and this machine lacks: Triton and C for GPUs, C++ for the CPU."""
    if not profile.train.compile:
        return []
    missing = {"cuda": _without_triton, "xpu": _without_triton, "cpu": _without_compiler}.get(
        device.type, lambda: None
    )()
    return [f"train.compile: {missing}, or leave train.compile out"] if missing else []


def _without_triton() -> str | None:
    if has_triton():
        return None if has_c_compiler() else NO_C_COMPILER
    if has_triton_package():
        return "Triton does not support this GPU (it needs CUDA compute capability 7.0): use a newer one"
    package = "triton-windows" if ON_WINDOWS else "triton"
    return f"torch.compile needs Triton on a GPU, and it is not installed: pip install {package}"


def has_c_compiler() -> bool:
    """Whether Triton finds a C compiler, as it looks for one; on Windows it brings its own."""
    return ON_WINDOWS or bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def _without_compiler() -> str | None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        compiler = "cl, from the Build Tools for Visual Studio," if ON_WINDOWS else "g++"
        return (
            f"torch.compile needs a C++ compiler on the CPU, and finds none: install {compiler} and put it on the PATH"
        )
    return None
