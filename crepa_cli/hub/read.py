"""Reading a checkpoint's configurations and identifying its content, before and after it is downloaded."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crepa_cli.errors import UserError
from crepa_cli.hub import layout
from crepa_cli.hub.messages import PUBLISHED, HubUnreachableError, missing_file
from crepa_cli.hub.needed import read_json
from crepa_cli.hub.question import list_files, resolve
from crepa_cli.hub.transfer import bring


def read_config(checkpoint: str, filename: str, revision: str | None = None) -> dict[str, Any]:
    """A JSON file of a checkpoint; nothing else is downloaded.

    Without network, the configurations of published checkpoints in this package are used.

    Args:
        checkpoint: a local folder or a Hub id.
        filename: path inside the checkpoint, such as `transformer/config.json`.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: if the checkpoint or the file does not exist, cannot be fetched or is not JSON.
    """
    if Path(checkpoint).is_dir():
        path = Path(checkpoint, filename)
        if not path.is_file():
            raise UserError(f"{checkpoint} has no {filename}; is it a checkpoint in the layout of diffusers?")
    else:
        path = _config_from_hub(checkpoint, filename, revision)
    config: dict[str, Any] = read_json(path)
    return config


def _config_from_hub(repository: str, filename: str, revision: str | None) -> Path:
    try:
        return fetch_file(repository, filename, revision)
    except HubUnreachableError:
        published = PUBLISHED / repository / filename
        if published.is_file():
            return published
        raise


def fetch_file(repository: str, filename: str, revision: str | None = None) -> Path:
    """The local path of one file of a repository on the Hub, which is downloaded if need be.

    Raises:
        UserError: if the repository or the file does not exist or cannot be fetched.
    """
    commit = resolve(repository, revision)
    path = layout.snapshot(repository, commit) / filename
    if not path.is_file():
        listing = list_files(repository, commit)
        if filename not in listing.files:
            raise missing_file(repository, filename, listing.files)
        bring(repository, commit, listing.files[filename], threading.Event())
    return path


def fingerprint(folder: Path) -> str:
    """A short digest of a checkpoint's folder, which changes when its configuration or weights do.

    Of large files the size, the first and the last MiB are read: a fine-tune changes those too, and a text encoder of
    20 GB is identified in a moment.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix in {".json", ".safetensors", ".model"})
    return _digest((path, str(path.relative_to(folder))) for path in paths)


def file_fingerprint(path: Path) -> str:
    """The same for one file."""
    return _digest([(path, path.name)])


def _digest(files: Iterable[tuple[Path, str]]) -> str:
    """A short digest of files and their names."""
    edge = 2**20
    digest = hashlib.sha256()
    for path, name in files:
        size = path.stat().st_size
        digest.update(f"{name}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(edge))
            if size > edge:
                file.seek(max(edge, size - edge))
                digest.update(file.read(edge))
    return digest.hexdigest()[:32]
