"""Finds the settings of the recipes and of their table: `python docs/recipes.py [FAMILY ...]`.

What `crepa doctor --fit` would find is written to docs/recipes.json, and the recipes to profiles/recipes/.
`python docs/generate.py` makes the page from it. A family takes a minute or two.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w
import torch
from huggingface_hub import constants

from crepa_cli.errors import UserError
from crepa_cli.libraries import silence_libraries
from crepa_cli.memory.fit import fastest_fit
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models import FAMILIES, load_family
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import open_family
from crepa_cli.settings import resolve

DOCS = Path(__file__).parent
FOUND = DOCS / "recipes.json"
RECIPES = DOCS.parent / "profiles/recipes"
CARDS = (12, 24, 48, 80)
"""Memory of a card in GB (10^9 bytes)."""
LARGE = (1280, 720)
"""A size that many checkpoints are published for, rounded down to what a family takes."""
Row = Mapping[str, Any]


def read_found() -> list[Row]:
    """A row for each family, task and size, with the fit of each card by its memory, or None if nothing fits."""
    rows: list[Row] = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else []
    return rows


def found_of(name: str) -> Iterator[Row]:
    """The rows of a family: its default checkpoints, at their own size and at 1280x720 with as many frames."""
    checkpoints = load_family(name).checkpoints
    for task, checkpoint in checkpoints.items():
        if task == "i2v" and checkpoint == checkpoints["t2v"]:
            continue  # it takes next to the same memory
        usual = resolve(task, {"model.family": name}).profile
        family = open_family(usual)
        yield _row(usual, family, recipe=task == "t2v")
        width, height = (side // family.size_multiple * family.size_multiple for side in LARGE)
        if width * height > usual.data.width * usual.data.height:
            large = resolve(task, {"model.family": name, "data.width": width, "data.height": height}).profile
            with suppress(UserError):  # of a checkpoint that takes one size alone
                yield _row(large, open_family(large), recipe=False)


def _row(profile: Profile, family: Family, *, recipe: bool) -> Row:
    bucket = form_bucket(profile, family)
    size = f"{bucket.width}x{bucket.height}"
    print(f"{profile.model.family} {profile.model.task}: {size}, {bucket.frames} frames", flush=True)
    fits = {}
    for card in CARDS:
        fit = fastest_fit(profile, family, bucket, torch.device("cuda"), card * 10**9)
        settings = {one.name: one.value for one in fit.settings} if fit else {}
        fits[str(card)] = {"settings": settings, "peak": fit.peak, "price": fit.price} if fit else None
    return {
        "family": profile.model.family,
        "task": profile.model.task,
        "checkpoint": profile.model.checkpoint,
        "size": size,
        "frames": bucket.frames,
        "rank": profile.adapter.rank,
        "recipe": recipe,
        "fits": fits,
    }


def recipes(rows: Sequence[Row]) -> dict[str, str]:
    """The content of each recipe by its name."""
    return {
        recipe_name(row, card): _text(row, card, fit)
        for row in rows
        if row["recipe"]
        for card, fit in row["fits"].items()
        if fit is not None
    }


def recipe_name(row: Row, card: str) -> str:
    """The name of the recipe for a card."""
    return f"{row['family']}-{card}gb"


def _text(row: Row, card: str, fit: Mapping[str, Any]) -> str:
    tables: dict[str, dict[str, object]] = {"model": {"family": row["family"], "checkpoint": row["checkpoint"]}}
    for name, value in fit["settings"].items():
        table, key = name.split(".")
        tables.setdefault(table, {})[key] = value
    return (
        f"# {row['checkpoint']} on a card of {card} GB: a LoRA of rank {row['rank']}, {row['size']}, "
        f"{row['frames']} frames.\n"
        f"# The settings are those of crepa doctor --fit {card}, with a predicted peak of {fit['peak'] / 1e9:.1f} GB.\n"
        "# Written by docs/recipes.py.\n"
        f'\npreset = "{row["task"]}"\n\n{tomli_w.dumps(tables)}'
    )


def write_recipes(rows: Sequence[Row]) -> None:
    """Write all recipes, and remove those that are none any more."""
    RECIPES.mkdir(exist_ok=True)
    written = recipes(rows)
    for path in RECIPES.glob("*.toml"):
        if path.stem not in written:
            path.unlink()
    for name, text in written.items():
        (RECIPES / f"{name}.toml").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Search for the settings of the named families, or of all, and write everything."""
    silence_libraries()
    # The published configurations in the package answer, so that the result is the same on every machine.
    constants.HF_HUB_OFFLINE = True
    wanted = sys.argv[1:] or list(FAMILIES)
    rows = {name: [row for row in read_found() if row["family"] == name] for name in FAMILIES}
    for name in wanted:
        rows[name] = list(found_of(name))
        found = [row for name in FAMILIES for row in rows[name]]
        FOUND.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8", newline="\n")
        write_recipes(found)


if __name__ == "__main__":
    main()
