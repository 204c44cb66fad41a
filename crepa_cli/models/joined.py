"""Linear layers that are several in diffusers and one in the original checkpoint, such as queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from crepa_cli.models.family import Family, Tensors


def original_groups(family: Family, names: Iterable[str]) -> dict[str, list[str]]:
    """Names of modules or parameters in diffusers by their original name; those that are joined, in their order there.

    Args:
        family: of the transformer.
        names: of modules, or of parameters of one kind.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(family.original_name(name), []).append(name)
    for original, parts in groups.items():
        order = family.comfyui_joined.get(_last_part(original), ())
        if order:
            parts.sort(key=lambda name: order.index(_last_part(name)))
    return groups


def _last_part(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def original_weights(family: Family, weights: Tensors) -> Tensors:
    """All weights of a transformer by their original names."""

    def rows(name: str) -> Tensor:
        return family.original_rows(name.rpartition(".")[0], weights[name])

    groups = original_groups(family, weights)
    return {
        original: rows(parts[0]) if len(parts) == 1 else torch.cat([rows(name) for name in parts])
        for original, parts in groups.items()
    }


def original_lora(family: Family, transformer: nn.Module, layers: Tensors) -> Tensors:
    """The layers of a LoRA by the original names of their modules.

    A joined layer has the ranks of its parts together, and a part without a LoRA is not changed.

    Args:
        family: of the transformer.
        transformer: with or without the LoRA.
        layers: `<module>.lora_A.weight` and `<module>.lora_B.weight`, by the names of diffusers.
    """
    changed = {name.rsplit(".", 2)[0] for name in layers}
    rows = linear_rows(transformer)
    found = {}
    for original, parts in original_groups(family, dict.fromkeys([*rows, *changed])).items():
        ours = [part for part in parts if part in changed]
        if not ours:
            continue
        first = layers[f"{ours[0]}.lora_B.weight"]
        ups = [
            family.original_rows(part, layers[f"{part}.lora_B.weight"])
            if part in changed
            else first.new_zeros(rows[part], 0)
            for part in parts
        ]
        downs = [layers[f"{part}.lora_A.weight"] for part in ours]
        found[f"{original}.lora_A.weight"] = downs[0] if len(parts) == 1 else torch.cat(downs)
        found[f"{original}.lora_B.weight"] = ups[0] if len(parts) == 1 else torch.block_diag(*ups)
    return found


def split_lora(
    family: Family, rows: Mapping[str, int], parts: Sequence[str], down: Tensor, up: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices of a joined layer's parts by their names, without ranks that change nothing in a part.

    Args:
        family: of the transformer.
        rows: of the parts, among others; see `linear_rows`.
        parts: names, in their order.
        down: of the joined layer, `[rank, in]`.
        up: of the joined layer, `[rows of all parts, rank]`.
    """
    if len(parts) == 1:
        return {parts[0]: (down, family.original_rows(parts[0], up))}
    sizes = [rows[part] for part in parts]
    if sum(sizes) != len(up):  # of a model of another width: its shapes tell
        return dict.fromkeys(parts, (down, up))
    found = {}
    for part, matrix in zip(parts, up.split(sizes), strict=True):
        used = matrix.any(dim=0)
        if used.any():
            found[part] = down[used], family.original_rows(part, matrix[:, used])
    return found


def linear_rows(transformer: nn.Module) -> dict[str, int]:
    """The outputs of the linear layers of a transformer by their names."""
    modules = transformer.named_modules()
    return {name: one.out_features for name, one in modules if isinstance(getattr(one, "out_features", None), int)}
