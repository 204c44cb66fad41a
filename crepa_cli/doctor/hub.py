"""The repositories that a run needs, and which of them are on this machine."""

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

ADVICE = "connect to the network, log in with hf auth login if it is gated, or name a local folder"


def check_hub(repositories: Iterable[str]) -> Iterator[Check]:
    """Whether the Hub answers, where it may be needed; where it does not, what follows asks it no more."""
    if not all(Path(repository).is_dir() for repository in repositories) and not go_offline_without_hub():
        advice = "connect to the network, unless all that is needed is on this machine"
        yield Check("hub", "warning", f"{constants.ENDPOINT} cannot be reached", advice)


def check_repository(
    name: str, repository: str, revision: str | None, weights: Sequence[str], folders: Sequence[str] | None = None
) -> Check:
    """Whether a checkpoint is on this machine; the Hub is asked only about one that is not.

    Args:
        name: of the check.
        repository: Hub id or local folder.
        revision: branch, tag or commit on the Hub.
        weights: the sub-folders whose weights are looked for.
        folders: the sub-folders that are downloaded; without it, the top.

    Raises:
        UserError: if a local folder lacks weights.
    """
    local = Path(repository) if Path(repository).is_dir() else _snapshot(repository, revision, needed_files(folders))
    lacking = [folder for folder in weights if local is None or not _has_weights(local / folder)]
    if not lacking:
        return Check(name, "fine", f"{repository} is on this machine")
    if Path(repository).is_dir():
        raise UserError(f"{repository} lacks weights, or some of their parts, in: {', '.join(lacking)}")
    return _download(name, repository, revision, needed_files(folders))


def _download(name: str, repository: str, revision: str | None, patterns: list[str]) -> Check:
    try:
        files = snapshot_download(repository, revision=revision, allow_patterns=patterns, dry_run=True)
    except OSError:
        return Check(name, "failure", f"{repository} is not on this machine, and the Hub does not give it", ADVICE)
    size = sum(file.file_size for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    message = f"{repository} is not on this machine: {decimal(size)} to download, {decimal(free)} free in {cache}"
    if size > free:
        return Check(name, "failure", message, "make room there, or set HF_HOME to a folder on a larger disk")
    return Check(name, "warning", message, "training starts with the download")


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path | None:
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _has_weights(folder: Path) -> bool:
    """Whether there are weights, with every part that their indices name: a snapshot may be half downloaded."""
    parts = {path.name for path in folder.glob("*.safetensors")}
    indices = (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.safetensors.index.json"))
    named = {part for index in indices for part in index["weight_map"].values()}
    return bool(parts) and named <= parts
