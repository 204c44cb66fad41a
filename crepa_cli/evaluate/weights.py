"""The trained weights to evaluate: those of a run's folder, or any LoRA."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
from crepa_cli.models.family import Family
from crepa_cli.models.lora import fetch_lora
from crepa_cli.models.streaming import place
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import open_family
from crepa_cli.runs.folder import RunFolder
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
        path: the file of a LoRA, or the folder that holds a whole transformer.
        family: whose component was trained.
        profile: the settings of the run; None for a LoRA without them.
    """

    name: str
    kind: Literal["none", "lora", "full"]
    path: Path | None
    family: Family
    profile: Profile | None = None

    @property
    def digest(self) -> str | None:
        """Values that change when the weights do."""
        if self.path is None:
            return None
        return file_digest(self.path) if self.kind == "lora" else fingerprint(self.path)

    @property
    def settings(self) -> dict[str, object]:
        """The settings of the run by "table.key", with absolute paths cut to names; empty for a LoRA without them."""
        if self.profile is None:
            return {}
        tables = self.profile.model_dump(mode="json")
        return {f"{table}.{key}": _named(value) for table in COMPARED_TABLES for key, value in tables[table].items()}

    def load(self, profile: Profile, device: torch.device) -> ModelMixin:
        """The transformer with these weights, in its place for sampling.

        Args:
            profile: settings that say in which dtype and where its weights are kept.
            device: that computes.

        Raises:
            UserError: if the weights are incomplete or do not fit.
        """
        family = self.family
        if self.kind == "full":
            family = copy(family)
            family.base, family.component = BaseCheckpoint(str(self.path)), "transformer"
        transformer = family.load_transformer(torch_dtype(profile.model.dtype), int8=frozen_in_int8(profile))
        if self.kind == "lora":
            assert self.path is not None, "a LoRA has a file"
            add_lora(transformer, family, self.path, profile.adapter)
        if profile.train.compile:
            compile_blocks(family.blocks(transformer))
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
    found = [Weights(BASE, "none", None, open_family(profile, resumes=True))]
    names = unique_names([BASE, *(_title(source) for source, _ in runs)])[1:]
    for name, (source, settings) in zip(names, runs, strict=True):
        if settings is None:
            found.append(Weights(name, "lora", _lora(source), found[0].family))
        else:
            _check_base(profile, source, settings)
            found.append(_of_run(name, RunFolder(Path(source)), profile, settings))
    return found


def _named(value: object) -> object:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _title(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.is_file() else source


def _check_base(profile: Profile, source: str, settings: Profile) -> None:
    for key in ("family", "task", "checkpoint", "revision"):
        wanted, found = getattr(profile.model, key), getattr(settings.model, key)
        if wanted != found:
            raise UserError(
                f"{source} was trained with model.{key} = {found!r}, and the first run with {wanted!r}: all are "
                "compared with one base model; evaluate them one by one"
            )


def _of_run(name: str, run: RunFolder, profile: Profile, settings: Profile) -> Weights:
    expert = profile.model_copy(update={"model": profile.model.model_copy(update={"variant": settings.model.variant})})
    family = open_family(expert, resumes=True)
    exports = run.exports(family.expert)
    if settings.adapter.kind == "full":
        files, path = [exports.folder / exports.transformer], exports.folder
    else:
        files = [exports.folder / name for name in (exports.diffusers, exports.comfyui)]
        path = next((file for file in files if file.is_file()), files[0])
    if not any(file.exists() for file in files):
        raise UserError(
            f"{run.path} has no weights that can be loaded: finish it with crepa train --resume --output {run.path}, "
            f"or export those of its newest checkpoint with crepa export {run.path} --format diffusers"
        )
    return Weights(name, settings.adapter.kind, path, family, settings)


def _lora(source: str) -> Path:
    try:
        return fetch_lora(source)
    except UserError as error:
        reason = re.sub(r"^adapter\.init_from( = .*?)?: ", "", str(error))
        raise UserError(f"{source} is neither the folder of a run nor a LoRA: {reason}") from error
