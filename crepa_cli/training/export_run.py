"""Export from the checkpoints of a run: one of its steps, another program or dtype, or merged into the base."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file

from crepa_cli.errors import UserError
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family, Tensors
from crepa_cli.profile import Profile
from crepa_cli.runs.folder import Exports, RunFolder
from crepa_cli.runs.header import file_header
from crepa_cli.training.adapter import make_trainable
from crepa_cli.training.checkpoints import checkpoint_path, checkpoints_in, damage_of
from crepa_cli.training.export import export_weights, lora_layers

TRANSFORMER = "transformer."
"""Before the names of the transformer's weights in a checkpoint, which holds the projector's too."""


def export_run(run: RunFolder, family: Family, profile: Profile, *, step: int | None, merge: bool) -> list[Exports]:
    """Export the trained weights of a checkpoint; the moving average, if the run keeps one.

    Args:
        run: its folder.
        family: with the run's base model.
        profile: the run's settings, with the programs and the dtype to export for.
        step: of the checkpoint; None for the newest, whose weights become those of the run.
        merge: whether the LoRA is added to the weights of the base, as a full fine-tune is exported.

    Returns:
        The folder and the names of the files, for each transformer that was trained.

    Raises:
        UserError: if there is no such checkpoint, it is damaged, or there is nothing to merge.
    """
    if merge and profile.adapter.kind == "full":
        raise UserError(f"{run.path} is a full fine-tune: it has no LoRA to merge; leave out --merge")
    path, step = _checkpoint(run, step), None if step == profile.train.steps else step
    found = []
    for name, one in family.trained.items():
        exports = run.exports(one.expert, step)
        if merge:
            # Merged, each has the folder that the pipeline's own component has.
            exports = exports.merged(one.component if name else None)
        _export(run, one, profile, path / name, exports, merge=merge)
        found.append(exports)
    return found


def _export(
    run: RunFolder, family: Family, profile: Profile, checkpoint: Path, exports: Exports, *, merge: bool
) -> None:
    """Export the weights in a folder of a checkpoint."""
    transformer, weights = _trained(family, profile, checkpoint)
    if merge:
        transformer = family.load_transformer(torch_dtype(profile.adapter.export_dtype))
        weights = merged(transformer, lora_layers(weights, profile.adapter.alpha))
        profile = profile.model_copy(update={"adapter": profile.adapter.model_copy(update={"kind": "full"})})
    export_weights(family, transformer, weights, profile.adapter, exports, file_header(run, family, profile, exports))


def _checkpoint(run: RunFolder, step: int | None) -> Path:
    found = checkpoints_in(run.checkpoints)
    if not found:
        raise UserError(f"{run.path} has no checkpoint to export")
    path = found[-1] if step is None else checkpoint_path(run.checkpoints, step)
    if path not in found:
        raise UserError(f"{run.path} has no checkpoint of step {step}, but {', '.join(one.name for one in found)}")
    if damage := damage_of(path):
        raise UserError(f"{path} is damaged ({damage}); choose another with --step")
    return path


def _trained(family: Family, profile: Profile, checkpoint: Path) -> tuple[ModelMixin, Tensors]:
    """The transformer without weights, and the trained weights of a checkpoint by their names in it."""
    with torch.device("meta"):
        transformer = family.empty_transformer(torch.float32)
        make_trainable(transformer, profile.adapter)
    average = checkpoint / "average.safetensors"
    if average.is_file():
        averages = load_file(average)
        names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
        return transformer, {name: averages[str(index)] for index, name in enumerate(names)}
    saved = load_file(checkpoint / "model.safetensors")
    weights = {name.removeprefix(TRANSFORMER): tensor for name, tensor in saved.items() if name.startswith(TRANSFORMER)}
    return transformer, weights


@torch.no_grad()
def merged(transformer: ModelMixin, layers: Tensors) -> Tensors:
    """The weights of a transformer with those of a LoRA added, in the dtypes of the transformer.

    Args:
        transformer: the base; its weights are changed in place.
        layers: `<module>.lora_A.weight` and `<module>.lora_B.weight`, whose product is the change.
    """
    weights: Tensors = transformer.state_dict()
    for name, down in layers.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            weight = weights[f"{module}.weight"]
            weight.copy_(weight.float() + layers[f"{module}.lora_B.weight"].float() @ down.float())
    return weights
