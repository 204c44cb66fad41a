"""The devices available for training: memory, bf16 and attention kernels."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import psutil
import torch
import torch.nn.functional as F
from rich.filesize import decimal
from torch.nn.attention import SDPBackend, sdpa_kernel

from crepa_cli.doctor.findings import Check
from crepa_cli.runs.capabilities import has_bfloat16

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}

NO_BFLOAT16 = (
    "training in bf16 needs a GPU of the Ampere generation or later (RTX 30, A10, L4, A100); "
    "model.dtype=float32 works here, at twice the memory: only for small models"
)
TORCH_WITH_CUDA = "pip install --force-reinstall --no-deps torch --index-url https://download.pytorch.org/whl/cu130"
"""`--force-reinstall`, because pip is content with the build for the CPU that is already there."""


def check_devices() -> Iterator[Check]:
    """Check every GPU, or the CPU if there is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()
    if cuda:
        yield from (_cuda(index) for index in range(torch.cuda.device_count()))
    elif torch.backends.mps.is_available():
        yield _mps()
    else:
        yield _cpu([str(warning.message).strip() for warning in caught])


def _cuda(index: int) -> Check:
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(device)
    name = f"{device}: {properties.name}"
    try:
        free, total = torch.cuda.mem_get_info(device)
        bf16 = has_bfloat16(device)
        kernels = attention_kernels(device)
    except RuntimeError as error:
        return Check(
            name, "failure", f"cannot be used: {error}", "check with nvidia-smi whether another program uses it"
        )
    facts = [f"{decimal(free)} of {decimal(total)} free", f"driver {_driver(index)}", f"CUDA {torch.version.cuda}"]
    message = ", ".join([*facts, f"bf16 {'yes' if bf16 else 'no'}", f"attention: {', '.join(kernels)}"])
    if not bf16:
        return Check(name, "warning", message, NO_BFLOAT16)
    if "flash" not in kernels:
        return Check(name, "warning", message, "without flash attention, long clips train slowly: update torch")
    return Check(name, "fine", message)


def _mps() -> Check:
    total, used = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
    kernels = ", ".join(attention_kernels(torch.device("mps")))
    message = f"{decimal(total - used)} of {decimal(total)} free, macOS's driver, bf16 yes, attention: {kernels}"
    return Check("mps", "fine", message)


def _cpu(reasons: list[str]) -> Check:
    memory = psutil.virtual_memory()
    kernels = ", ".join(attention_kernels(torch.device("cpu")))
    facts = [f"{decimal(memory.available)} of {decimal(memory.total)} free", "bf16 yes", f"attention: {kernels}"]
    no_gpu = "no GPU is usable" if torch.version.cuda or torch.version.hip else "this torch was built without CUDA"
    message = f"{', '.join(facts)}; {'; '.join([no_gpu, *reasons])}"
    return Check("cpu", "warning", message, f"enough for --demo; for real training, {_gpu_advice()}")


def _gpu_advice() -> str:
    """How to make a GPU usable. On Windows, the torch that pip installs by itself knows the CPU alone."""
    if sys.platform == "win32" and torch.version.cuda is None:
        return f"install torch for an NVIDIA GPU: {TORCH_WITH_CUDA}"
    return "install torch for your GPU and its driver"


def attention_kernels(device: torch.device) -> list[str]:
    """The kernels of scaled-dot-product attention that run on a device, each tested on a small bf16 input."""
    return [name for name, backend in KERNELS.items() if _runs(backend, device)]


def _runs(backend: SDPBackend, device: torch.device) -> bool:
    tokens = torch.zeros(1, 2, 64, 64, device=device, dtype=torch.bfloat16)
    with warnings.catch_warnings(), sdpa_kernel(backend):
        warnings.simplefilter("ignore")
        try:
            F.scaled_dot_product_attention(tokens, tokens, tokens)
        except RuntimeError:
            return False
    return True


def _driver(index: int) -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        versions = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return versions[min(index, len(versions) - 1)] if versions else "unknown"
