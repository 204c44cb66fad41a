"""The repositories that a run needs, and whether they are on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.filesize import decimal

from crepa_cli.doctor.findings import Check
from crepa_cli.errors import UserError
from crepa_cli.models.hub import go_offline_without_hub, needed_files

ADVICE = "connect to the network, log in with hf auth login if the repository is gated, or give a local folder"


def check_hub(repositories: Iterable[str]) -> Iterator[Check]:
    """Warn if the Hub may be needed but cannot be reached; later checks then no longer ask it."""
    if not all(Path(repository).is_dir() for repository in repositories) and not go_offline_without_hub():
        advice = "connect to the network, unless everything needed is on this machine"
        yield Check("hub", "warning", f"{constants.ENDPOINT} cannot be reached", advice)


def check_repository(
    name: str, repository: str, revision: str | None, weights: Sequence[str], folders: Sequence[str] | None = None
) -> Check:
    """Check whether a checkpoint is on this machine; the Hub is asked only if it is not.

    Args:
        name: name of the check.
        repository: Hub id or local folder.
        revision: branch, tag or commit on the Hub.
        weights: the subfolders that must contain weights.
        folders: the subfolders to download; None for the top folder.

    Raises:
        UserError: if a local folder lacks weights.
    """
    local = Path(repository) if Path(repository).is_dir() else _snapshot(repository, revision, needed_files(folders))
    lacking = [folder for folder in weights if local is None or not _has_weights(local / folder)]
    if not lacking:
        return Check(name, "fine", f"{repository} is on this machine")
    if Path(repository).is_dir():
        raise UserError(f"{repository}: weights are missing or incomplete in: {', '.join(lacking)}")
    return _download(name, repository, revision, needed_files(folders))


def _download(name: str, repository: str, revision: str | None, patterns: list[str]) -> Check:
    try:
        files = snapshot_download(repository, revision=revision, allow_patterns=patterns, dry_run=True)
    except OSError:
        return Check(
            name, "failure", f"{repository} is not on this machine and could not be fetched from the Hub", ADVICE
        )
    size = sum(file.file_size for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    message = f"{repository} is not on this machine: {decimal(size)} to download, {decimal(free)} free in {cache}"
    if size > free:
        return Check(name, "failure", message, "free up space there, or set HF_HOME to a folder on a larger disk")
    return Check(name, "warning", message, "training will download it first")


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path | None:
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _has_weights(folder: Path) -> bool:
    """Whether a folder has weights, with all shards named in their indices: a download may be incomplete."""
    parts = {path.name for path in folder.glob("*.safetensors")}
    indices = (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.safetensors.index.json"))
    named = {part for index in indices for part in index["weight_map"].values()}
    return bool(parts) and named <= parts
