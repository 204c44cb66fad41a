"""Checkpoints: all that a run needs to go on, in safetensors and JSON, whole or absent, with checksums."""

from __future__ import annotations

import functools
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from crepa_cli.errors import UserError
from crepa_cli.files import remove_folder, remove_leftovers, whole_folder
from crepa_cli.models.family import Tensors

OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
SEPARATOR = ":"
"""Between the name of a parameter and that of its optimizer state, such as `exp_avg`, which may be a table itself."""
NAME = re.compile(r"step-(\d{6,})")
MANIFEST = "manifest.json"
"""Size and CRC-32 of every other file of a checkpoint."""
STATE = "state.json"
CHUNK = 2**24


class Snapshot(NamedTuple):
    """The content of a checkpoint, gathered from all processes on the CPU of the main one.

    `average` is the moving average of the weights; `state` are JSON values: progress, the optimizer's groups, and the
    part of its state that is not tensors, as that of 8-bit optimizers.
    """

    model: Tensors
    optimizer: Tensors
    average: Tensors
    state: dict[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:06d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. One that was not finished has another name."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def trained_weights(model: nn.Module) -> Tensors:
    """The trained parameters by name, on the CPU of the main process; every process has to call it."""
    weights = cast(Tensors, get_model_state_dict(model, options=OPTIONS))
    # What was sharded comes as views of larger buffers, which safetensors refuses.
    return {name: weight.clone() if _is_view(weight) else weight for name, weight in weights.items()}


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor] | None,
    progress: Mapping[str, Any],
) -> Snapshot:
    """Gather what is saved; every process of a run has to call it, and the main one has the tensors.

    Args:
        model: whose trained parameters are saved, those of the projector included.
        optimizer: over these parameters.
        average: the moving average of the weights, in the order of the parameters.
        progress: JSON values: the step, the schedules.
    """
    states = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=OPTIONS))
    values = dict(_flattened(states.get("state", {})))
    moments = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    averages = {str(index): whole_tensor(tensor).cpu() for index, tensor in enumerate(average or ())}
    state = {
        "progress": progress,
        "param_groups": states.get("param_groups"),
        "optimizer": {key: value for key, value in values.items() if key not in moments},
    }
    return Snapshot(trained_weights(model), moments, averages, state)


def write_checkpoint(path: Path, snapshots: Mapping[str, Snapshot]) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: its folder.
        snapshots: its content, by the name of the expert, which is that of a folder in it; "" for the folder itself.

    Raises:
        UserError: if the disk is full or the folder cannot be written; what was there before is untouched.
    """
    size = sum(tensor.nbytes for one in snapshots.values() for part in one[:3] for tensor in part.values())
    with whole_folder(path, size) as partial:
        for expert, snapshot in snapshots.items():
            _write_snapshot(partial / expert, snapshot)
        (partial / MANIFEST).write_text(json.dumps(_manifest(partial), indent=2), encoding="utf-8")


def _write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    folder.mkdir(exist_ok=True)
    files = {"model": snapshot.model, "optimizer": snapshot.optimizer, "average": snapshot.average}
    for name, tensors in files.items():
        if tensors or name != "average":
            save_file(_separate(tensors), folder / f"{name}.safetensors")
    (folder / STATE).write_text(json.dumps(snapshot.state), encoding="utf-8")


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and messages about newer ones, which are set aside under another name."""
    messages: list[str] = []
    for path in reversed(checkpoints_in(folder)):
        damage = damage_of(path)
        if damage is None:
            return path, messages
        aside = _free_name(path.with_name(f"{path.name}.damaged"))
        path.replace(aside)
        messages.append(f"{path} is damaged ({damage}); it is now {aside.name}, and an older one is used")
    return None, messages


def _free_name(path: Path) -> Path:
    """The path, or with a number behind it if it exists."""
    candidates = (path.with_name(f"{path.name}{number or ''}") for number in itertools.count())
    return next(candidate for candidate in candidates if not candidate.exists())


def read_progress(path: Path) -> dict[str, Any]:
    """The JSON values that a checkpoint was saved with; of several experts, those of one."""
    folder = min(state.parent for state in path.rglob(STATE))
    progress: dict[str, Any] = _read_state(folder)["progress"]
    return progress


def holds_projector(path: Path) -> bool:
    """Whether a checkpoint was saved while its run still had a projector."""
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return any(name.startswith("crepa.") for name in file.keys())  # noqa: SIM118 (no dictionary)


def _read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor] | None
) -> None:
    """Put a checkpoint's weights and optimizer state into objects made as they were for the saved run.

    Raises:
        UserError: if a trained parameter of the model has another shape in the checkpoint, or is not in it.
    """
    weights = load_file(path / "model.safetensors")
    wanted = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: weight.shape for name, weight in weights.items()}
    if unlike := sorted(name for name, shape in wanted.items() if found.get(name) != shape):
        name = unlike[0]
        raise UserError(
            f"{path} does not fit these settings: {len(unlike)} trained weights differ, such as {name}, which is "
            f"{tuple(found[name]) if name in found else 'missing'} there and {tuple(wanted[name])} here; resume with "
            "the settings of the run, or start a new one"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in wanted:
                parameter.copy_(_like(weights[name], parameter))
    state: dict[str, Any] = {}
    saved = _read_state(path)
    for key, value in {**load_file(path / "optimizer.safetensors"), **saved.get("optimizer", {})}.items():
        *tables, name = key.split(SEPARATOR)
        functools.reduce(lambda table, part: table.setdefault(part, {}), tables, state)[name] = value
    groups = [
        # How the update is computed depends on the device, which may be another one than that of the saved run.
        group | {name: present[name] for name in ("foreach", "fused") if name in present}
        for group, present in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=OPTIONS)
    _unmap(optimizer)
    if average is not None:
        averages = load_file(path / "average.safetensors")
        for index, tensor in enumerate(average):
            tensor.copy_(_like(averages[str(index)], tensor))


def remove_old_checkpoints(newest: Path, keep: int) -> None:
    """Delete all but `keep` checkpoints, of which `newest`, just written, is one, and leftovers of killed runs.

    On Windows a checkpoint that another program has open stays until the next call.
    """
    others = [path for path in checkpoints_in(newest.parent) if path != newest]
    for path in others[: max(0, len(others) - keep + 1)]:
        with suppress(PermissionError):
            remove_folder(path)
    remove_leftovers(newest.parent)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor without its sharding; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _separate(tensors: Tensors) -> Tensors:
    """The tensors contiguous and without shared memory, as safetensors asks; 8-bit optimizers share tables."""
    separate: Tensors = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        separate[name] = tensor.clone() if tensor.numel() and tensor.data_ptr() in addresses else tensor
        addresses.add(tensor.data_ptr())
    return separate


def _flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables with the names that lead to them."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}{SEPARATOR}")
        else:
            yield f"{prefix}{name}", value


def _unmap(optimizer: torch.optim.Optimizer) -> None:
    """Copy the state that still maps the file it was read from: Windows deletes no file that is mapped.

    Copying tensor by tensor, once they are in place, needs no memory beyond the optimizer's own.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                state[name] = value.clone()


def _is_view(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor, sharded as the other one is."""
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def _manifest(folder: Path) -> dict[str, dict[str, int]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _checksum(path)} for path in files
    }


def damage_of(path: Path) -> str | None:
    """The damage of a checkpoint, in words; None for a whole one."""
    try:
        expected = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found = _manifest(path)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if found == expected:
        return None
    if not isinstance(expected, dict):
        return f"{MANIFEST} holds no table"
    changed = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return f"{', '.join(changed)} not as written"


def _checksum(path: Path) -> int:
    crc = 0
    for chunk in _chunks(path):
        crc = zlib.crc32(chunk, crc)
    return crc


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
