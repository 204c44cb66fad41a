"""Checkpoints: all that a run needs to go on, in safetensors and JSON, whole or absent."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
SEPARATOR = ":"
"""Between the name of a parameter and that of its optimizer state, such as `exp_avg`."""
NAME = re.compile(r"step-(\d{6,})")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return folder / f"step-{step:06d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. One that was not finished has another name."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor] | None,
    progress: Mapping[str, Any],
) -> None:
    """Write a checkpoint under a temporary name and rename it.

    Args:
        path: its final folder.
        model: whose trained parameters are saved, those of the projector included.
        optimizer: over these parameters.
        average: the moving average of the weights, in the order of the parameters.
        progress: JSON values: the step, the schedules.
    """
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = cast(dict[str, Tensor], get_model_state_dict(model, options=OPTIONS))
    save_file(_contiguous(weights), partial / "model.safetensors")
    optimizer_state = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=OPTIONS))
    moments = {
        f"{parameter}{SEPARATOR}{name}": tensor
        for parameter, state in optimizer_state["state"].items()
        for name, tensor in state.items()
    }
    save_file(_contiguous(moments), partial / "optimizer.safetensors")
    if average is not None:
        save_file({str(index): tensor.cpu() for index, tensor in enumerate(average)}, partial / "average.safetensors")
    (partial / "state.json").write_text(
        json.dumps({"progress": progress, "param_groups": optimizer_state["param_groups"]}), encoding="utf-8"
    )
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


def read_progress(path: Path) -> dict[str, Any]:
    """The JSON values that a checkpoint was saved with."""
    progress: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))["progress"]
    return progress


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor] | None
) -> None:
    """Put a checkpoint's weights and optimizer state into objects made as they were for the saved run.

    Raises:
        ValueError: if the checkpoint lacks a trained parameter of the model.
    """
    weights = load_file(path / "model.safetensors")
    missing = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - weights.keys()
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} trained parameters, such as {min(missing)}")
    set_model_state_dict(model, weights, options=OPTIONS)
    state: dict[str, Any] = {}
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        parameter, _, name = key.rpartition(SEPARATOR)
        state.setdefault(parameter, {})[name] = tensor
    groups = json.loads((path / "state.json").read_text(encoding="utf-8"))["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=OPTIONS)
    if average is not None:
        saved = load_file(path / "average.safetensors")
        for index, tensor in enumerate(average):
            tensor.copy_(saved[str(index)])


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
