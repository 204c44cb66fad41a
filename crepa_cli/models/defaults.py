"""The default settings of a checkpoint: those of its family, of full fine-tuning, and of its published kin."""

from __future__ import annotations

from pathlib import Path

from crepa_cli.errors import UserError
from crepa_cli.models.base import BaseCheckpoint
from crepa_cli.models.facts import Tables
from crepa_cli.models.family import Family
from crepa_cli.models.single_file import is_single_file, published_with


def default_layers(family: type[Family], task: str, kind: str, checkpoint: str | None) -> dict[str, Tables]:
    """The layers of defaults that override the built-in ones, by their names; later ones override earlier ones.

    Args:
        family: of the checkpoint.
        task: `t2v` or `i2v`.
        kind: `lora` or `full`, as `adapter.kind`.
        checkpoint: Hub id, local folder or single file; None for the default one of the task.
    """
    # A family without the task refuses it when this checkpoint is opened.
    name, default = f"family {family.name}", family.checkpoints.get(task, next(iter(family.checkpoints.values())))
    layers: dict[str, Tables] = {name: {**family.settings, "model": {"checkpoint": default}}}
    if kind == "full":
        layers[f"{name}, full"] = family.full_settings
    if (checkpoint := checkpoint or default) is not None:
        layers[f"checkpoint {checkpoint}"] = _checkpoint_settings(family, checkpoint, task)
    return layers


def _checkpoint_settings(family: type[Family], checkpoint: str, task: str) -> Tables:
    """Those of the published checkpoint, or of the one that an unpublished one resembles.

    If its configuration cannot be read, there are none: whoever opens the checkpoint explains that.
    """
    if is_single_file(checkpoint):
        found = published_with(Path(checkpoint))
        # A family without the task refuses it when it is opened.
        default = family.checkpoints.get(task, next(iter(family.checkpoints.values())))
        repository = default if found is None or found not in family.published else found
        settings = family.published.get(repository, {})
        return {**settings, "model": {**settings.get("model", {}), "components": repository}}
    if checkpoint in family.published:
        return family.published[checkpoint]
    try:
        alike = family.published_like(BaseCheckpoint(checkpoint), task)
    except UserError:
        return {}
    return {} if alike is None else family.published[alike]
