"""The trained weights to evaluate: those of a run's folder, or any LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import ModelMixin

from crepa_cli.data.clips import file_digest
from crepa_cli.errors import UserError
from crepa_cli.evaluate.videos import unique_names
from crepa_cli.hub.read import fingerprint
from crepa_cli.models.base import BaseCheckpoint
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.facts import BOTH
from crepa_cli.models.family import Family
from crepa_cli.models.lora import fetch_lora
from crepa_cli.models.sharing import SharedPlace
from crepa_cli.models.streaming import move, place
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import open_family
from crepa_cli.runs.folder import Exports, RunFolder
from crepa_cli.training.adapter import add_lora
from crepa_cli.training.build import compile_blocks, frozen_in_int8

BASE = "base"
COMPARED_TABLES = ("model", "memory", "adapter", "data", "train", "crepa", "layersync")
"""The tables of settings that can change the weights of a run."""


@dataclass(frozen=True)
class Weights:
    """The weights behind a column of videos.

    Attributes:
        name: of the column.
        kind: of training; `none` for the base model.
        paths: the file of a LoRA, or the folder that holds a whole transformer, by the names in `family.trained`.
        family: whose component was trained.
        profile: the settings of the run; None for a LoRA without them.
    """

    name: str
    kind: Literal["none", "lora", "full"]
    paths: Mapping[str, Path]
    family: Family
    profile: Profile | None = None

    @property
    def digest(self) -> str | None:
        """Values that change when the weights do."""
        digest = file_digest if self.kind == "lora" else fingerprint
        return "+".join(map(digest, self.paths.values())) or None

    @property
    def settings(self) -> dict[str, object]:
        """The settings of the run by "table.key", with absolute paths cut to names; empty for a LoRA without them."""
        if self.profile is None:
            return {}
        tables = self.profile.model_dump(mode="json")
        return {f"{table}.{key}": _named(value) for table in COMPARED_TABLES for key, value in tables[table].items()}

    def load(self, profile: Profile, device: torch.device) -> dict[str, ModelMixin]:
        """The transformers with these weights by their components, in their places for sampling.

        Args:
            profile: settings that say in which dtype and where its weights are kept.
            device: that computes.

        Raises:
            UserError: if the weights are incomplete or do not fit.
        """
        shared = SharedPlace(device) if profile.memory.offload_idle_expert else None
        return {
            family.component: self._load(family, self.paths.get(name), profile, device, shared)
            for name, family in self.family.trained.items()
        }

    def _load(
        self, family: Family, path: Path | None, profile: Profile, device: torch.device, shared: SharedPlace | None
    ) -> ModelMixin:
        if self.kind == "full":
            family = copy(family)
            family.base, family.component = BaseCheckpoint(str(path)), "transformer"
        transformer = family.load_transformer(torch_dtype(profile.model.dtype), int8=frozen_in_int8(profile))
        if self.kind == "lora":
            assert path is not None, "a LoRA has a file"
            add_lora(transformer, family, path, profile.adapter)
        if profile.train.compile:
            compile_blocks(family.blocks(transformer))
        if shared is not None:
            transformer.requires_grad_(False)
            move(transformer, device, shared.add(transformer, family.blocks(transformer)))
        else:
            place(transformer, device, streamed=profile.memory.stream_weights)
        return transformer


def open_weights(profile: Profile, runs: Sequence[tuple[str, Profile | None]]) -> list[Weights]:
    """The base model, and the weights of each run or LoRA.

    Args:
        profile: settings for the videos of all of them.
        runs: folders of runs with their settings, and LoRAs (a file, a folder, a Hub id) without.

    Raises:
        UserError: if weights cannot be found, or a run was trained from another base model.
    """
    found = [Weights(BASE, "none", {}, open_family(profile, resumes=True))]
    names = unique_names([BASE, *(_title(source) for source, _ in runs)])[1:]
    for name, (source, settings) in zip(names, runs, strict=True):
        if settings is None:
            found.append(Weights(name, "lora", {"": _lora(source)}, _one_expert(source, found[0].family)))
        else:
            _check_base(profile, source, settings)
            found.append(_of_run(name, RunFolder(Path(source)), profile, settings))
    return found


def _one_expert(source: str, family: Family) -> Family:
    """The family itself, if it is known which transformer a LoRA belongs to."""
    if family.trains_all:
        raise UserError(
            f"{source} is a LoRA for one expert, and the first run trained both: evaluate it on its own, with "
            f"--set model.variant={' or --set model.variant='.join(family.experts)}"
        )
    return family


def _named(value: object) -> object:
    if isinstance(value, list):
        return [_named(one) for one in value]
    if isinstance(value, dict):
        return {key: _named(one) for key, one in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _title(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.is_file() else source


def _check_base(profile: Profile, source: str, settings: Profile) -> None:
    for key in ("family", "task", "checkpoint", "components", "revision"):
        wanted, found = getattr(profile.model, key), getattr(settings.model, key)
        if wanted != found:
            raise UserError(
                f"{source} was trained with model.{key} = {found!r}, and the first run with {wanted!r}: all are "
                "compared with one base model; evaluate them one by one"
            )


def _of_run(name: str, run: RunFolder, profile: Profile, settings: Profile) -> Weights:
    update: dict[str, object] = {"model": profile.model.model_copy(update={"variant": settings.model.variant})}
    if settings.model.variant != BOTH:
        update["memory"] = profile.memory.model_copy(update={"offload_idle_expert": False})
    family = open_family(profile.model_copy(update=update), resumes=True)
    exports = zip(family.trained, run.all_exports(family), strict=True)
    paths = {expert: _exported(run, one, settings.adapter.kind) for expert, one in exports}
    return Weights(name, settings.adapter.kind, paths, family, settings)


def _exported(run: RunFolder, exports: Exports, kind: str) -> Path:
    """The file of a run's LoRA, or the folder that holds its whole transformer."""
    if kind == "full":
        files, path = [exports.folder / exports.transformer], exports.folder
    else:
        files = [exports.folder / name for name in (exports.diffusers, exports.comfyui)]
        path = next((file for file in files if file.is_file()), files[0])
    if not any(file.exists() for file in files):
        raise UserError(
            f"{run.path} has no weights that can be loaded: finish it with crepa train --resume --output {run.path}, "
            f"or export those of its newest checkpoint with crepa export {run.path} --format diffusers"
        )
    return path


def _lora(source: str) -> Path:
    try:
        return fetch_lora(source)
    except UserError as error:
        reason = re.sub(r"^adapter\.init_from( = .*?)?: ", "", str(error))
        raise UserError(f"{source} is neither the folder of a run nor a LoRA: {reason}") from error
