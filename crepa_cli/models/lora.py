"""LoRA files of other runs and programs: finding them, and reading them by the names of diffusers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from crepa_cli.errors import UserError, counted
from crepa_cli.hub.question import list_files
from crepa_cli.hub.read import fetch_file
from crepa_cli.models import FINAL_LORA
from crepa_cli.models.family import Family, Tensors
from crepa_cli.models.joined import linear_rows, original_groups, split_lora

SUFFIX = ".safetensors"
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "lora_unet_")
PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
METADATA = "lora_adapter_metadata"
"""Key of a header in which diffusers stores the configuration of peft."""


class LoraLayer(NamedTuple):
    """The change of a module's weight: `scale * up @ down`, of `[out, rank]` and `[rank, in]`."""

    down: Tensor
    up: Tensor
    scale: float


def fetch_lora(source: str) -> Path:
    """The local file of a LoRA.

    Args:
        source: a file, a folder or Hub id with one LoRA, or `owner/repository/file.safetensors` on the Hub.

    Raises:
        UserError: if there is no such file, or several of which none has the name that diffusers looks for.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return path / _only_lora(source, (file.name for file in path.glob(f"*{SUFFIX}")))
    owner, _, rest = source.partition("/")
    name, _, filename = rest.partition("/")
    if path.is_absolute() or (source.endswith(SUFFIX) and not filename):
        raise UserError(f"adapter.init_from = {source!r}: there is no such file")
    repository = f"{owner}/{name}"
    filename = filename or _only_lora(source, list_files(repository).files)
    return fetch_file(repository, filename)


def _only_lora(source: str, files: Iterable[str]) -> str:
    names = sorted(name for name in files if name.endswith(SUFFIX))
    names = [name for name in names if name.endswith(FINAL_LORA)] or names
    if len(names) != 1:
        found = f"several: {', '.join(names)}; name one, as {source}/{names[0]}" if names else "none"
        raise UserError(f"adapter.init_from = {source!r}: of LoRA files ({SUFFIX}) it holds {found}")
    return names[0]


def lora_rank(path: Path) -> int:
    """The rank of a LoRA's matrices; joined layers may have several times as much.

    Raises:
        UserError: if the file holds no LoRA.
    """
    downs = tuple(suffix for suffix, part in PARTS.items() if part == "down")
    with _opened(path) as file:
        ranks = [file.get_slice(key).get_shape()[0] for key in file.keys() if key.endswith(downs)]  # noqa: SIM118
    if not ranks:
        raise UserError(f"adapter.init_from: {path} holds no LoRA")
    return int(min(ranks))


def read_lora(path: Path, family: Family, transformer: nn.Module, modules: Collection[str]) -> dict[str, LoraLayer]:
    """The layers of a LoRA by the names of modules in diffusers.

    The file may have the names of diffusers, or the original ones that ComfyUI uses, with dots or underscores.

    Args:
        path: of the file.
        family: of the transformer.
        transformer: with or without a LoRA.
        modules: those that can have a layer.

    Raises:
        UserError: if the file has a layer for another module, or something that is not a LoRA's.
    """
    rows = linear_rows(transformer)
    known = _known(family, rows, modules)
    parts: dict[tuple[str, ...], Tensors] = {}
    unknown: list[str] = []
    with _opened(path) as file:
        metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        for key in file.keys():  # noqa: SIM118 (no dictionary)
            suffix = next((suffix for suffix in PARTS if key.endswith(suffix)), "")
            name = key.removesuffix(suffix)
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            if suffix and name in known:
                parts.setdefault(known[name], {})[PARTS[suffix]] = file.get_tensor(key)
            else:
                unknown.append(key)
    incomplete = [names[0] for names, part in parts.items() if not {"down", "up"} <= part.keys()]
    by_metadata = metadata.get("transformer.lora_alpha", 1.0) / metadata.get("transformer.r", 1.0)
    found = {}
    for names, part in parts.items():
        if names[0] in incomplete:
            continue
        scale = float(part["alpha"]) / len(part["down"]) if "alpha" in part else float(by_metadata)
        for name, matrices in split_lora(family, rows, names, part["down"], part["up"]).items():
            found[name] = LoraLayer(*matrices, scale)
    strange = [*unknown, *incomplete, *(name for name in found if name not in modules)]
    if strange:
        raise UserError(
            f"adapter.init_from: {path} has {counted(len(strange), 'tensor')} that this run would not train, such as "
            f"{', '.join(strange[:3])}; name their layers in adapter.target_modules, or choose a LoRA for "
            f"{family.base.name}"
        )
    return found


def _known(family: Family, rows: Iterable[str], modules: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The modules that a name in a LoRA's file stands for, if one of them can have a layer."""
    known: dict[str, tuple[str, ...]] = {module: (module,) for module in modules}
    if family.comfyui_names is not None:
        groups = original_groups(family, rows).items()
        known |= {original: tuple(parts) for original, parts in groups if not set(parts).isdisjoint(modules)}
    return known | {name.replace(".", "_"): found for name, found in known.items()}


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter.init_from: {path} cannot be read: {error}") from error
