"""Repositories on the Hub and local folders: fetching them, reading their configurations, identifying them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from crepa_cli.errors import UserError

PUBLISHED = Path(__file__).parent / "published"
"""Configurations of published checkpoints, by Hub id, in the layout of diffusers."""
HUB_TIMEOUT = 5.0


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
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return config


def _config_from_hub(repository: str, filename: str, revision: str | None) -> Path:
    try:
        return Path(from_hub(hf_hub_download, repository, filename=filename, revision=revision))
    except UserError as error:
        published = PUBLISHED / repository / filename
        if isinstance(error.__cause__, LocalEntryNotFoundError) and published.is_file():
            return published
        raise


def go_offline_without_hub() -> bool:
    """Whether the Hub can be reached; if not, this process makes no further requests to it.

    Each request would otherwise be retried for half a minute.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # networks and proxies raise many kinds
        constants.HF_HUB_OFFLINE = True
        return False
    return True


def fetch(checkpoint: str, revision: str | None = None, folders: Iterable[str] | None = None) -> Path:
    """The local folder of a checkpoint; from the Hub come only card, configurations, tokenizers and safetensors.

    Args:
        checkpoint: a local folder or a Hub id.
        revision: branch, tag or commit on the Hub.
        folders: the sub-folders that are needed beside the JSON files at the top; without it, only those at the top.

    Raises:
        UserError: if the checkpoint does not exist or cannot be fetched.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    return Path(from_hub(snapshot_download, checkpoint, revision=revision, allow_patterns=needed_files(folders)))


def needed_files(folders: Iterable[str] | None = None) -> list[str]:
    """Patterns of the files that `fetch` takes of a repository: no pickle, no code, no pictures."""
    kinds = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
    if folders is None:
        return list(kinds)
    return ["*.json", "README.md", *(f"{folder}/{kind}" for folder in folders for kind in kinds)]


def from_hub(request: Any, repository: str, **arguments: Any) -> Any:
    """The result of a function of huggingface_hub for a repository.

    Raises:
        UserError: says why there is none.
    """
    try:
        return request(repository, **arguments)
    except HFValidationError as error:
        raise UserError(f"no folder {repository!r}, and it is not a Hub id (owner/name) either") from error
    except GatedRepoError as error:
        raise UserError(
            f"{repository} asks you to accept its terms: do so on its page of the Hub, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {arguments['revision']!r}") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{repository} is not on this machine and the Hub cannot be reached; "
            "connect to the network, or name a local folder"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise UserError(f"no folder {repository!r}, and the Hub does not have it either: {error}") from error
    except Exception as error:  # The client passes on errors of its HTTP library, which share no base class.
        raise UserError(f"{repository} could not be fetched from the Hub: {error}") from error


def fingerprint(folder: Path) -> str:
    """A short digest of a checkpoint's folder, which changes when its configuration or weights do.

    Of large files the size, the first and the last MiB are read: a fine-tune changes those too, and a text encoder of
    20 GB is identified in a moment.
    """
    edge = 2**20
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in {".json", ".safetensors", ".model"}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(edge))
            if size > edge:
                file.seek(max(edge, size - edge))
                digest.update(file.read(edge))
    return digest.hexdigest()[:32]


def require_class(checkpoint: str, config: Mapping[str, Any], expected: str, family: str) -> None:
    """Check that a base model belongs to the family.

    Raises:
        UserError: if its transformer is of another class.
    """
    found = config.get("_class_name")
    if found != expected:
        raise UserError(
            f"{checkpoint} holds a {found}, the family {family} needs a {expected}; check --model and --checkpoint"
        )
