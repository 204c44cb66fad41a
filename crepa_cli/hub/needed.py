"""Which files of a repository a run needs: those that `from_pretrained` reads, and no other variant or format."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from crepa_cli.errors import UserError

SMALL = {".json", ".txt", ".model", ".jinja"}
"""Suffixes of configurations and tokenizers."""
SHARDED_FIRST = {"diffusion_pytorch_model": True, "model": False}
"""Stems of weights, and whether the library prefers the shards if there is one file as well (diffusers does)."""

ReadIndex = Callable[[str], Any]


def small_files(paths: Iterable[str], folder: str) -> list[str]:
    """Configurations and tokenizer files of a folder, without those of its sub-folders and without indices of weights.

    Args:
        paths: of the repository's files.
        folder: in the repository; "" is the top.
    """
    return [
        path
        for path in paths
        if _parent(path) == folder and PurePosixPath(path).suffix in SMALL and ".index." not in PurePosixPath(path).name
    ]


def is_model(paths: Collection[str], folder: str) -> bool:
    """Whether a folder holds a model, with weights: tokenizers and schedulers have no `config.json`."""
    return _join(folder, "config.json") in paths


def weight_files(paths: Collection[str], folder: str, read_index: ReadIndex) -> list[str]:
    """The weights of a model's folder, with the index of their shards; empty if it has none in safetensors.

    Args:
        paths: of the repository's files.
        folder: in the repository.
        read_index: reads a JSON file of the repository.
    """
    for stem, sharded_first in SHARDED_FIRST.items():
        single = _join(folder, f"{stem}.safetensors")
        index = f"{single}.index.json"
        found = [path for path in ((index, single) if sharded_first else (single, index)) if path in paths]
        if found and found[0] == index:
            names = dict.fromkeys(read_index(index)["weight_map"].values())
            return [index, *(_join(folder, name) for name in names)]
        if found:
            return [single]
    return []


def lacking(root: Path, folders: Iterable[str]) -> list[str]:
    """Which of the files that a local folder needs are not there, as far as its own files tell.

    Args:
        root: a checkpoint or a snapshot, whose download may have been interrupted.
        folders: the sub-folders that are needed; "" is the top.
    """
    missing = []
    for folder in folders:
        paths = {_join(folder, path.name) for path in (root / folder).glob("*") if path.is_file()}
        if not small_files(paths, folder):
            missing.append(folder)
        elif is_model(paths, folder):
            weights = weight_files(paths, folder, lambda path: read_json(root / path))
            missing += [path for path in weights if path not in paths] or ([] if weights else [f"{folder} (weights)"])
    return missing


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _parent(path: str) -> str:
    parent = str(PurePosixPath(path).parent)
    return "" if parent == "." else parent


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
