"""The layout of the Hub's cache on disk, which the libraries of Hugging Face share.

`blobs/` holds each file under its digest, `snapshots/<commit>/` the files of a commit by name, as links to blobs, and
`refs/<branch>` the newest known commit of a branch or tag.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from crepa_cli.files import write_whole

COMMIT = re.compile(r"[0-9a-f]{40}")


DATASETS = "datasets/"
"""Before the name of a repository that is a dataset, as in its address on the Hub."""


def dataset(name: str) -> str:
    """The name of a dataset among those of all repositories."""
    return f"{DATASETS}{name}"


def kind_and_id(repository: str) -> tuple[str, str]:
    """The kind of a repository, in the libraries of Hugging Face, and its id."""
    name = repository.removeprefix(DATASETS)
    return ("model" if name == repository else "dataset"), name


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, which never changes, and no branch or tag."""
    return revision is not None and COMMIT.fullmatch(revision) is not None


def storage(repository: str) -> Path:
    """The folder of a repository in the cache."""
    kind, name = kind_and_id(repository)
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind))


def snapshot(repository: str, commit: str) -> Path:
    """The folder of a commit's files; those that were never downloaded are missing."""
    return storage(repository) / "snapshots" / commit


def blob(repository: str, digest: str) -> Path:
    """The content of a file."""
    return storage(repository) / "blobs" / digest


def lock(repository: str, digest: str) -> Path:
    """The lock that every process takes to download a file."""
    return Path(constants.HF_HUB_CACHE, ".locks", storage(repository).name, f"{digest}.lock")


def known_commit(repository: str, revision: str) -> str | None:
    """The newest commit of a branch or tag that this machine has seen; None if it has seen none."""
    path = _ref(repository, revision)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def remember_commit(repository: str, revision: str, commit: str) -> None:
    """Note the newest commit of a branch or tag, if the cache can be written."""
    if known_commit(repository, revision) != commit:
        with suppress(Exception):
            write_whole(_ref(repository, revision), commit.encode())


def _ref(repository: str, revision: str) -> Path:
    return storage(repository) / "refs" / revision


def link(repository: str, commit: str, path: str, digest: str) -> None:
    """Give a blob its name in the snapshot of a commit."""
    target, name = blob(repository, digest), snapshot(repository, commit) / path
    name.parent.mkdir(parents=True, exist_ok=True)
    try:
        name.symlink_to(os.path.relpath(target, name.parent))
    except FileExistsError:
        return
    except OSError:
        # Windows lets only developers make links; huggingface_hub moves the file there, too.
        target.replace(name)
