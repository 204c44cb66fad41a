"""The kernel that computes self-attention: one of torch's, through the attention backends of diffusers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crepa_cli.kept import kept
from crepa_cli.models.family import Family

KERNELS = {
    "native": "native",
    "flash": "_native_flash",
    "cudnn": "_native_cudnn",
    "efficient": "_native_efficient",
}
"""The backends of diffusers that can be trained through under automatic casts, by the name of the setting. Those of
sage and flash-attn 3 have no backward; flash-attn 2 and xformers refuse the float32 queries of some families."""
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""The same, for attention of diffusers that has no choice of backends."""
GAIN = 0.03
"""Another kernel than torch's own choice must be faster by this share of the time."""
WARMUP, TIMED = 2, 3


@dataclass(frozen=True)
class Attention:
    """The self-attention of a block.

    Attributes:
        clips: in a batch.
        tokens: of a clip.
        heads: the number of heads.
        size: of a head.
        dtype: of queries, keys and values.
    """

    clips: int
    tokens: int
    heads: int
    size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, family: Family, dtype: torch.dtype, *, clips: int = 1, tokens: int = 64) -> Attention:
        """The self-attention of a family whose blocks compare all tokens with all."""
        heads = family.attention_heads
        return cls(clips, tokens, heads, family.hidden_size // heads, dtype)

    def runs(self, kernel: str, device: torch.device) -> bool:
        """Whether a kernel computes it, and its gradient, on a device."""
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch, on why it does not
                self._run(kernel, self._inputs(device))
        except RuntimeError:
            return False
        return True

    def times(self, device: torch.device) -> dict[str, int]:
        """Nanoseconds of a forward and backward by kernel, of those that run; stored for the next run."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        facts = ["attention", name, asdict(self)]
        return kept(facts, lambda: {name: self._time(name, device) for name in KERNELS if self.runs(name, device)})

    def _time(self, kernel: str, device: torch.device) -> int:
        inputs, found = self._inputs(device), []
        for _ in range(WARMUP + TIMED):
            _wait(device)
            started = time.perf_counter_ns()
            self._run(kernel, inputs)
            _wait(device)
            found.append(time.perf_counter_ns() - started)
        return min(found[WARMUP:])

    def _inputs(self, device: torch.device) -> list[Tensor]:
        shape = self.clips, self.tokens, self.heads, self.size
        return [torch.randn(shape, device=device, dtype=self.dtype).requires_grad_() for _ in range(3)]

    @staticmethod
    def _run(kernel: str, inputs: list[Tensor]) -> None:
        output = dispatch_attention_fn(*inputs, backend=KERNELS[kernel])
        torch.autograd.grad(output, inputs, torch.ones_like(output))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(times: Mapping[str, int]) -> str:
    """The kernel to take: torch's own choice, unless another one is clearly faster."""
    best = min(times, key=times.__getitem__, default="native")
    return best if times.get(best, 0) < (1 - GAIN) * times.get("native", 0) else "native"


def described(times: Mapping[str, int]) -> str:
    """The choice of `fastest` and its reason, as a line of text."""
    found = ", ".join(f"{name} {times[name] / 1e6:.1f} ms" for name in sorted(times, key=times.__getitem__))
    return f"train.attention is {fastest(times)!r}, by measurement for the largest clips: {found or 'none runs'}"


def compute_attention_with(kernel: str, family: Family, blocks: Iterable[nn.Module]) -> None:
    """Let the self-attention of blocks be computed by a kernel, in place.

    `native` leaves them as they are, and so does `auto`, which is left where nothing is measured.
    """
    if kernel in ("native", "auto"):
        return
    for block in blocks:
        # Attention to a caption stays, as its mask would not go with every kernel.
        part = block.get_submodule(family.attention_parts[0])
        if isinstance(part, AttentionModuleMixin):
            part.set_attention_backend(KERNELS[kernel])
        else:
            part.forward = _limited_to(SDPA[kernel], part.forward)


def _limited_to(backend: SDPBackend, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with sdpa_kernel(backend):
            return forward(*arguments, **keywords)

    return run
