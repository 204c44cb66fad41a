"""Writes the pages that repeat what the code says: `python docs/generate.py`."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer.main
from typer.core import TyperGroup

from crepa_cli import alignment, api
from crepa_cli.cli import app
from crepa_cli.profile import allowed_values, description, known_keys
from crepa_cli.profile.describe import default_value
from crepa_cli.profile.settings import LISTED_TABLES, TABLES
from crepa_cli.profile.simpletuner import COUNTERPARTS

DOCS = Path(__file__).parent
GENERATED = "<!-- Written by docs/generate.py. -->"
SETTINGS_INTRODUCTION = """\
A profile, `crepa.toml`, is a TOML file with the tables below. Every key may be left out. `"none"` stands for no
value. "the family's" is the value that the authors of the checkpoint publish, or one that follows from its
configuration; `crepa train --print-profile` shows each value and where it comes from. `--set table.key=value` sets a
value for one run.
"""
COMMANDS_INTRODUCTION = """\
`crepa COMMAND --help` prints the same. Exit codes: 0 if all went well, 1 if a run failed, 2 for a mistake in flags,
settings or files, 130 after Ctrl-C, 143 after SIGTERM.
"""
PYTHON_INTRODUCTION = """\
`crepa_cli.alignment` is the method as a library: plain torch, which imports nothing else of the package. The README
shows it in a training loop of sixteen lines. `crepa_cli.api` is what the commands call.
"""
OTHERS_INTRODUCTION = """\
`crepa init --from config.json` reads the configuration of SimpleTuner, or that of takenoko or of musubi-tuner's
forks, in JSON or TOML. It converts what is on another scale, says what it converted, and refuses what would train
another run. `crepa init --to config.json` writes the alignment settings in SimpleTuner's terms.

## What is different

- **Similarity threshold.** SimpleTuner compares it with the sum over a frame and its neighbors, which reaches 1.74 at
  distance 1. Here it is a mean cosine, at most 1: its 0.85 is 0.5 here.
- **End of the decay.** SimpleTuner counts it from the start of the run, `crepa.decay_steps` from the end of the
  warmup.
- **`crepa_loss` in the log.** SimpleTuner logs the loss times its coefficient: `crepa_weighted_loss` here.
- **Blocks of LayerSync.** SimpleTuner counts them from 1, we from 0.
- **Lambda of musubi-tuner's forks.** Their loss is divided by the number of comparisons; `crepa init --from` converts
  lambda.
- **Epochs.** Runs are counted in optimizer steps.
- **Several captions.** SimpleTuner, OneTrainer and kohya's `enable_wildcard` take each line of a text file as a caption
  of its own and draw one. Here the file is one caption unless `data.caption_lines = true`.

## diffusion-pipe

It has no CREPA, and its configuration is not read. Its keys and ours:

| diffusion-pipe | crepa |
| --- | --- |
| `[model] type`, `ckpt_path` | `model.family`, `model.checkpoint` |
| `[model] dtype` | `model.dtype` |
| `[model] transformer_dtype = "float8"` | `memory.quantize_base = "int8"` |
| `blocks_to_swap` | `memory.stream_weights` |
| `activation_checkpointing` | `train.activation_checkpointing` |
| `[adapter] type`, `rank`, `init_from_existing` | `adapter.kind`, `adapter.rank`, `adapter.init_from` |
| `[optimizer] type`, `lr`, `weight_decay` | `train.optimizer`, `train.learning_rate`, `train.weight_decay` |
| `micro_batch_size_per_gpu`, `gradient_accumulation_steps` | `train.batch_size`, `train.gradient_accumulation` |
| `gradient_clipping` | `train.max_grad_norm` |
| `warmup_steps` | `train.lr_warmup_steps` |
| `eval_every_n_epochs` | `validation.every`, with `data.validation_share` |
| `checkpoint_every_n_minutes`, `save_every_n_epochs` | `checkpoints.every` |
| `resolutions`, `frame_buckets` in the dataset's file | `data.width`, `data.height`, `data.frames` |

## SimpleTuner

Keys that are not in the table are named by `crepa init --from`.
"""

RECIPES_INTRODUCTION = """\
A recipe is the preset `t2v` with the settings under which a family's default checkpoint trains on a card of this size:
a LoRA with CREPA on clips of the family's own size and length, one at a time. The settings are those that
`crepa doctor --fit` finds, cheapest in time first. Use it by its name:

```
crepa init --profile wan-24gb --data clips
```

or, without a `crepa.toml`, `crepa train --profile wan-24gb --data clips`. For other clips, another checkpoint, image to
video or a card of another size, let `crepa doctor --fit 16 --write` find the settings
([fitting the card](memory.md)).

GB are 10^9 bytes. Most cards have 7 % more than their name says, which is left for the driver. A card with ECC has
less: if its memory runs out, give `--fit` what `nvidia-smi` shows as free, or take the recipe of the next smaller card.
"""
NO_RECIPE = """\
Nothing fits these cards at the family's own size and length, so there is no recipe: {}.
`crepa doctor --model FAMILY --fit 12` names the longest and the largest clips that fit.
"""
TABLE_INTRODUCTION = """\
The predicted peak of training, preparation and validation in GB (10^9 bytes), with the settings that make it fit:
{}. A dash says that nothing fits. Image to video is listed where its checkpoint is another one.
"""
LETTERS = {
    "memory.stream_weights": "s",
    "memory.offload_activations": "o",
    "memory.finer_recompute": "r",
    "memory.quantize_base": "q",
    "memory.keep": "k",
    "memory.keep_blocks": "k",
    "model.vae_tiling": "t",
    "model.vae_dtype": "v",
    "validation.every": "n",
}
"""A letter for each setting in the table of all sizes; those that spend memory have the same."""


def settings_page() -> str:
    """Every setting: its key, its default, the values that it takes, and its meaning."""
    return _page("Settings", SETTINGS_INTRODUCTION, _settings())


def commands_page() -> str:
    """Every command with its arguments and options."""
    return _page("Commands", COMMANDS_INTRODUCTION, _commands())


def python_page() -> str:
    """The public names of `alignment` and `api`, with signatures and docstrings."""
    return _page("In Python", PYTHON_INTRODUCTION, _python())


def others_page() -> str:
    """Keys of other trainers and ours."""
    return _page("Coming from another trainer", OTHERS_INTRODUCTION, _counterparts())


def recipes_page() -> str:
    """The recipes, and what each family takes on each card."""
    return _page("Recipes", RECIPES_INTRODUCTION, _recipes())


PAGES = {
    "settings.md": settings_page,
    "commands.md": commands_page,
    "python.md": python_page,
    "coming-from.md": others_page,
    "recipes.md": recipes_page,
}


def _page(title: str, introduction: str, lines: Iterator[str]) -> str:
    return "\n".join([f"# {title}", "", GENERATED, "", introduction, *lines])


def _settings() -> Iterator[str]:
    for table, keys in known_keys().items():
        yield from _table(f"[{table}]", table, TABLES[table], keys)
        for name, part in LISTED_TABLES.items():
            if name.startswith(f"{table}."):
                yield from _table(f"[[{name}]]", name, part, part.model_fields)


def _table(heading: str, table: str, model: type, keys: Iterable[str]) -> Iterator[str]:
    yield from (f"## `{heading}`", "", _cell(inspect.getdoc(model) or ""), "")
    yield from ("| key | default | values | meaning |", "| --- | --- | --- | --- |")
    for key in keys:
        values = _cell(allowed_values(table, key))
        yield f"| `{key}` | {_cell(default_value(table, key))} | {values} | {_cell(description(table, key))} |"
    yield ""


def _commands() -> Iterator[str]:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        yield from (f"## `crepa {name}`", "", _cell(command.help or ""), "")
        yield from ("| argument or option | meaning |", "| --- | --- |")
        for parameter in command.params:
            forms = parameter.opts if parameter.param_type_name == "option" else [str(parameter.name).upper()]
            yield f"| {', '.join(f'`{form}`' for form in forms)} | {_cell(getattr(parameter, 'help', None) or '')} |"
        yield ""


def _python() -> Iterator[str]:
    for module in (alignment, api):
        yield from (f"## `{module.__name__}`", "")
        for name in module.__all__:
            yield from _member(module, name)


def _member(module: ModuleType, name: str) -> Iterator[str]:
    member = getattr(module, name)
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(member))).body
    yield from (f"### `{name}`", "", *_documented(name, node))
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                yield from _documented(f"{name}.{method.name}", method)


def _documented(name: str, node: ast.stmt) -> Iterator[str]:
    """The signature and the docstring of a function, or those of a class."""
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    yield from ("```python", f"{name}({_arguments(node)})", "```", "")
    if text := ast.get_docstring(node):
        yield from ("```text", text, "```", "")


def _arguments(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The arguments without `self`; those of a class are its initializer's, or its fields."""
    if isinstance(node, ast.FunctionDef):
        return ast.unparse(node.args).removeprefix("self").removeprefix(", ")
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return _arguments(part)
    return ", ".join(ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign))


def _counterparts() -> Iterator[str]:
    yield from ("| SimpleTuner | crepa |", "| --- | --- |")
    for theirs, ours in COUNTERPARTS.items():
        yield f"| `{theirs}` | `{ours}` |"
    yield ""


def _recipes() -> Iterator[str]:
    rows = json.loads((DOCS / "recipes.json").read_text(encoding="utf-8"))
    yield from ("## The recipes", "", "| recipe | clips | settings | predicted peak | effect |")
    yield "| --- | --- | --- | --- | --- |"
    missing = []
    for row in rows:
        for card, fit in row["fits"].items() if row["recipe"] else ():
            if fit is None:
                missing.append(f"`{row['family']}` on {card} GB")
                continue
            settings = ", ".join(f"`{name} = {json.dumps(value)}`" for name, value in fit["settings"].items())
            clips = f"{row['size']}, {row['frames']} frames"
            name, peak = f"`{row['family']}-{card}gb`", f"{fit['peak'] / 1e9:.1f} GB"
            yield f"| {name} | {clips} | {settings or 'none'} | {peak} | {fit['price']} |"
    if missing:
        yield from ("", NO_RECIPE.format(", ".join(missing)).rstrip())
    used = {name for row in rows for fit in row["fits"].values() if fit for name in fit["settings"]}
    legend: dict[str, list[str]] = {}
    for name, letter in LETTERS.items():
        if name in used:
            legend.setdefault(letter, []).append(f"`{name}`")
    letters = ", ".join(f"{letter} {' and '.join(names)}" for letter, names in legend.items())
    yield from ("", "## Families, sizes and cards", "", TABLE_INTRODUCTION.format(letters))
    cards = list(rows[0]["fits"])
    yield f"| family | checkpoint | clips | {' | '.join(f'{card} GB' for card in cards)} |"
    yield f"| {' | '.join(['---'] * (3 + len(cards)))} |"
    for row in rows:
        cells = [_fit_cell(row["fits"][card]) for card in cards]
        clips = f"{row['size']}, {row['frames']} frames"
        yield f"| `{row['family']}`, {row['task']} | `{row['checkpoint']}` | {clips} | {' | '.join(cells)} |"
    yield ""


def _fit_cell(fit: dict[str, Any] | None) -> str:
    if fit is None:
        return "-"
    letters = "".join(dict.fromkeys(LETTERS[name] for name in fit["settings"]))
    return f"{fit['peak'] / 1e9:.1f} {letters}".strip()


def _cell(text: str) -> str:
    """Text in one line in which nothing is read as markup of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<=", "≤").replace(">=", "≥")


def main() -> None:
    """Write all of them."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
