"""A transformer in one file, with the names of its original checkpoint or of ComfyUI, which diffusers converts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crepa_cli.errors import UserError, listed
from crepa_cli.hub.read import file_fingerprint
from crepa_cli.models.base import BaseCheckpoint

SUFFIXES = {".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin"}
PREFIX = "model.diffusion_model."
"""Before the names of a transformer in files that ComfyUI reads."""
READ = {"F64", "F32", "F16", "BF16"}
"""The data types that safetensors names so, of weights that are read; those of quantized weights are left out."""


def is_single_file(checkpoint: str) -> bool:
    """Whether a checkpoint is named by one file, rather than by a folder or a Hub id."""
    return Path(checkpoint).suffix.lower() in SUFFIXES and not Path(checkpoint).is_dir()


def published_with(path: Path) -> str | None:
    """The Hub id of the checkpoint that diffusers takes a file for; None if the file cannot be read.

    It tells models of other widths and versions apart, and takes the experts of Wan 2.2 for Wan 2.1.
    """
    try:
        name: str = fetch_diffusers_config(_empty(path))["pretrained_model_name_or_path"]
    except UserError:
        return None
    return name


class SingleFile(BaseCheckpoint):
    """A base model whose transformer is in one file, and everything else in a repository in the layout of diffusers.

    Args:
        path: of the file.
        class_name: of the transformer in diffusers.
        component: the one of the repository that the file takes the place of.
        repository: a local folder or a Hub id.
        revision: branch, tag or commit of the repository.

    Raises:
        UserError: if the file is not one that is read, or does not fit the repository's configuration.
    """

    def __init__(self, path: Path, class_name: str, component: str, repository: str, revision: str | None) -> None:
        super().__init__(repository, revision)
        self.file = path
        self.class_name = class_name
        self.component = component
        if class_name not in SINGLE_FILE_LOADABLE_CLASSES:
            raise UserError(
                f"{path}: diffusers reads no single file of a {class_name}; give a folder in its layout or a Hub id"
            )
        config = json.dumps(self.read_config(f"{component}/config.json"), sort_keys=True)
        if mistake := _misfit(path, _changed(path), class_name, config):
            raise UserError(
                f"{path} does not fit {component}/config.json of {repository}: {mistake}; set model.components to the "
                "repository that the file belongs to"
            )

    @property
    def shown_name(self) -> str:
        """The name of the file, and that of the repository."""
        return f"{self.file.name} with {super().shown_name}" if self.file else super().shown_name

    @property
    def components(self) -> list[str]:
        """The folders of the repository that are used."""
        return [name for name in super().components if name != self.component]

    @property
    def extra_files(self) -> tuple[str, ...]:
        """Files of the repository that are used beside its components."""
        return (*super().extra_files, f"{self.component}/config.json")

    def fingerprints(self, *components: str) -> list[str]:
        """The digest of each component's files."""
        if self.file is not None:
            self._fingerprints.setdefault(self.component, file_fingerprint(self.file))
        return super().fingerprints(*components)

    def source(self, component: str) -> str:
        """The file, or the folder of another component, for messages."""
        return str(self.file) if component == self.component else super().source(component)

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """The weights of a component, one after the other, by the names of diffusers."""
        if component != self.component or self.file is None:
            yield from super().stored(component)
            return
        with _opened(self.file) as file:
            # They are mapped: their content is read when it is used.
            weights = {name: file.get_tensor(name) for name in _names(file)}
            converted = _converted(weights, _model(self.class_name, self.read_config(f"{component}/config.json")))
            while converted:
                yield converted.popitem()


def _changed(path: Path) -> tuple[int, int]:
    """Values that change when a file does."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file whose weights can be read.

    Raises:
        UserError: if there is none, or it holds weights of another form.
    """
    _changed(path)
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path}: only .safetensors files are read; GGUF and pickled files are not")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            quantized = {file.get_slice(name).get_dtype() for name in names} - READ
            if quantized or any("scaled_fp8" in name for name in names):
                raise UserError(
                    f"{path} holds quantized weights ({', '.join(sorted(quantized)) or 'scaled fp8'}), which are not "
                    "read: take the file in bfloat16 or float16; memory.quantize_base = 'int8' makes its weights small"
                )
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; download it anew") from error


def _names(file: Any) -> list[str]:
    """The names of the transformer's weights; a file may hold text encoders and a VAE too."""
    names: list[str] = list(file.keys())
    return [name for name in names if name.startswith(PREFIX)] or names


def _empty(path: Path) -> dict[str, Tensor]:
    """The weights of a file by their names in it, without content."""
    with _opened(path) as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in _names(file)}


def _model(class_name: str, config: dict[str, Any]) -> ModelMixin:
    """The transformer without weights."""
    with init_empty_weights():
        return getattr(diffusers, class_name).from_config(config)


def _converted(weights: dict[str, Tensor], model: ModelMixin) -> dict[str, Tensor]:
    """The weights by the names of diffusers, as `from_single_file` converts them."""
    if model.state_dict().keys() <= weights.keys():
        return weights
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"]
    converted: dict[str, Tensor] = convert(config=dict(model.config), checkpoint=weights)
    return converted


@lru_cache
def _misfit(path: Path, _changed: tuple[int, int], class_name: str, config: str) -> str | None:
    """How the weights of a file differ from those of a configuration, in words; None if they do not."""
    model = _model(class_name, json.loads(config))
    found = {name: one.shape for name, one in _converted(_empty(path), model).items()}
    wanted = {name: one.shape for name, one in model.state_dict().items()}
    if missing := sorted(wanted.keys() - found.keys()):
        return f"it lacks {listed(missing)}"
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unknown = [name for name in found if name not in wanted and not any(re.search(one, name) for one in ignored)]
    if unknown:
        return f"it has {listed(sorted(unknown))} beside"
    name = next((name for name in sorted(wanted) if found[name] != wanted[name]), None)
    return None if name is None else f"{name} is {tuple(found[name])} in it and {tuple(wanted[name])} there"
