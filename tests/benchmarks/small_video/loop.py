"""The loop that all parts of the small model are trained by: resumable, the same bits from the same seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from crepa_cli.files import write_whole

SAVE_SECONDS = 120
BETAS = (0.9, 0.98)


def train(
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    path: Path,
    *,
    steps: int,
    rate: float,
    average: float = 0.995,
) -> None:
    """Train the parameters that require gradients, then load the moving average of them into the module.

    The state is saved to `path` every two minutes and at the end, and a training that finds it goes on from there.

    Args:
        module: changed in place.
        loss_of: the loss of a step; all that is random in it is a function of the step.
        path: a safetensors file.
        steps: of AdamW in all; the last fifth of them decays the learning rate.
        rate: the learning rate before that.
        average: decay of the moving average.
    """
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, betas=BETAS, weight_decay=0.0)
    averages = {name: value.detach().clone() for name, value in parameters.items()}
    start = _load(path, parameters, averages, optimizer) if path.exists() else 0
    saved, began, recent = time.monotonic(), time.monotonic(), 0.0
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 30, max(0.02, (steps - step) / (0.2 * steps)))
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        _average_gradients(list(parameters.values()))
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        weight = 1 - min(average, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averages.values()), [value.detach() for value in parameters.values()], weight)
        recent = loss.item() if step == start else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0 and rank() == 0:
            seconds = time.monotonic() - began
            print(f"{path.stem}: step {step} of {steps}, loss {recent:.4f}, {seconds:.0f} s", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS and rank() == 0:
            _save(path, step + 1, parameters, averages, optimizer)
            saved = time.monotonic()
    if start < steps and rank() == 0:
        _save(path, steps, parameters, averages, optimizer)
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(averages[name])


def rank() -> int:
    """Number of this process among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together; each takes its share of a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    if world() > 1:
        gradients = [value.grad for value in parameters if value.grad is not None]
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(whole)
        for gradient, part in zip(gradients, whole.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient) / world())


def load_average(module: nn.Module, path: Path) -> None:
    """Load the moving average of the parameters that a training has saved."""
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, value in module.named_parameters():
            if f"average/{name}" in file.keys():  # noqa: SIM118 (not a mapping)
                value.copy_(file.get_tensor(f"average/{name}"))


def _save(
    path: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    averages: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, value in parameters.items():
        state = optimizer.state[value]
        tensors |= {f"value/{name}": value.detach(), f"average/{name}": averages[name]}
        tensors |= {f"first/{name}": state["exp_avg"], f"second/{name}": state["exp_avg_sq"]}
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    write_whole(path, partial.read_bytes())
    partial.unlink()


def _load(
    path: Path, parameters: dict[str, nn.Parameter], averages: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Restore all state and return the step to go on with."""
    with safe_open(path, "pt") as file, torch.no_grad():
        step = int(file.get_tensor("step"))
        for name, value in parameters.items():
            value.copy_(file.get_tensor(f"value/{name}"))
            averages[name].copy_(file.get_tensor(f"average/{name}"))
            state = {"step": torch.tensor(float(step))}
            for key, short in {"exp_avg": "first", "exp_avg_sq": "second"}.items():
                # As the parameter lies in memory, which an optimizer may round by.
                state[key] = torch.empty_like(value).copy_(file.get_tensor(f"{short}/{name}"))
            optimizer.state[value] = state
    return step
