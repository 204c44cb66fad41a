"""The families of video diffusion transformers that crepa trains, one file each.

Importing this package loads no torch: `load_family` imports a family's file when it is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from crepa_cli.errors import UserError

if TYPE_CHECKING:
    from crepa_cli.models.facts import Tables
    from crepa_cli.models.family import Family

FAMILIES = {
    "wan": "Wan",
    "ltxvideo": "LtxVideo",
    "sanavideo": "SanaVideo",
    "kandinsky5_video": "Kandinsky5Video",
    "cogvideox": "CogVideoX",
    "ltx2": "Ltx2",
    "kandinsky6": "Kandinsky6",
    "hunyuanvideo15": "HunyuanVideo15",
    "hunyuanvideo": "HunyuanVideo",
}
"""Name of each family, which is also its module here, and the class in it."""
FINAL_LORA = "pytorch_lora_weights.safetensors"
"""The end of the name by which diffusers' `load_lora_weights` finds a LoRA among the files of a repository."""


def load_family(name: str) -> type[Family]:
    """The class of a family.

    Raises:
        UserError: if there is no such family; the message lists the known ones.
    """
    if name not in FAMILIES:
        raise UserError(f"there is no CREPA support for the family {name!r}; choose one of: {', '.join(FAMILIES)}")
    family: type[Family] = getattr(import_module(f"crepa_cli.models.{name}"), FAMILIES[name])
    return family


def family_defaults(family: str, task: str, kind: str, checkpoint: str | None) -> dict[str, Tables]:
    """The layers of the default settings of a family's checkpoint, by their names; see `default_layers`.

    Raises:
        UserError: if there is no such family; the message lists the known ones.
    """
    from crepa_cli.models.defaults import default_layers

    return default_layers(load_family(family), task, kind, checkpoint)
