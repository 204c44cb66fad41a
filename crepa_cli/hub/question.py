"""The one question to the Hub: the commit of a revision, and its files with sizes and digests."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from crepa_cli.errors import UserError
from crepa_cli.hub.layout import is_commit, kind_and_id, known_commit, remember_commit
from crepa_cli.hub.messages import HubError, HubUnreachableError, explain

TIMEOUTS = (2.0, 4.0)
"""Seconds to wait for the Hub's first answer, and for its second if nothing is on this machine.

Before the first question of a day, huggingface_hub asks one of its own, for up to 3 seconds.
"""
SHA256_DIGITS = 64
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SILENCE_SECONDS = 60.0
"""For so long a Hub that did not answer is not asked again: each command asks about several repositories."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, its bytes, and the digest under which the cache holds it.

    The digest is the SHA-256 of a large file (64 digits), and git's SHA-1 of the others.
    """

    path: str
    size: int
    digest: str

    def new_hash(self) -> hashlib._Hash:
        """A hash that gives the digest after all bytes of the file."""
        if len(self.digest) == SHA256_DIGITS:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)


@dataclass(frozen=True)
class Listing:
    """The files of a repository at a commit, by path."""

    repository: str
    commit: str
    files: Mapping[str, RemoteFile]


class _Answers:
    """The answers of the Hub in this process: a command asks about each repository once."""

    def __init__(self) -> None:
        self.listings: dict[tuple[str, str], Listing] = {}
        self.silence: HubUnreachableError | None = None
        self.silent_since = 0.0

    def clear(self) -> None:
        self.listings.clear()
        self.silence = None


_answers = _Answers()


def ask_anew() -> None:
    """Forget what the Hub has said, as every run does once: a branch may have moved since the last one."""
    _answers.clear()


def unreachable() -> HubUnreachableError | None:
    """Why the Hub could not be asked a moment ago; None if it could, or was not needed."""
    recent = time.monotonic() - _answers.silent_since < SILENCE_SECONDS
    return _answers.silence if recent else None


def list_files(repository: str, revision: str | None = None) -> Listing:
    """The files of a repository.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None is the main branch.

    Raises:
        HubUnreachableError: if the Hub cannot be asked, or does not answer in time.
        HubError: if the Hub has no such repository or revision, or refuses it.
        UserError: if the name is none of the Hub's.
    """
    revision = revision or constants.DEFAULT_REVISION
    known = _answers.listings.get((repository, revision))
    if known is not None:
        return known
    if silence := unreachable():
        raise HubUnreachableError(repository, silence.reason, silence.advice, silent=True)
    listing = _ask(repository, revision)
    for name in (revision, listing.commit):
        _answers.listings[repository, name] = listing
    if not is_commit(revision):
        remember_commit(repository, revision, listing.commit)
    return listing


def _ask(repository: str, revision: str) -> Listing:
    kind, name = kind_and_id(repository)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        if kind == "dataset":
            raise UserError(f"{name!r} is not the Hub id of a dataset (owner/name)") from error
        raise UserError(f"no folder {repository!r}, and it is not a Hub id (owner/name) either") from error
    # A copy on this machine serves as well, so that nobody waits twice for a Hub that is not there.
    timeouts = TIMEOUTS[:1] if known_commit(repository, revision) else TIMEOUTS
    for timeout in timeouts:
        try:
            info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=timeout, files_metadata=True)
            break
        except Exception as error:  # the errors of the HTTP library share no base class with the Hub's
            explained = explain(error, repository, revision)
            if timeout != timeouts[-1] and isinstance(explained, HubUnreachableError):
                continue
            if isinstance(explained, HubUnreachableError) and explained.silent:
                _answers.silence, _answers.silent_since = explained, time.monotonic()
            raise explained from error
    if not is_commit(info.sha):
        raise HubError(f"{constants.ENDPOINT} answers for {repository} without a commit: is HF_ENDPOINT a Hub?")
    files = [
        RemoteFile(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else str(one.blob_id))
        for one in info.siblings or []
    ]
    return Listing(repository, str(info.sha), {file.path: file for file in files if _stays_in_the_cache(file)})


def _stays_in_the_cache(file: RemoteFile) -> bool:
    """Whether the names of a file lead nowhere else; a mirror of the Hub may send any."""
    parts = re.split(r"[/\\]", file.path)
    return DIGEST.fullmatch(file.digest) is not None and not {"", ".", ".."} & set(parts) and ":" not in file.path


def resolve(repository: str, revision: str | None = None) -> str:
    """The commit of a revision; without network, the newest one that this machine has seen.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None is the main branch.

    Raises:
        UserError: if there is none; see `list_files`.
    """
    if revision is not None and is_commit(revision):
        return revision
    try:
        return list_files(repository, revision).commit
    except HubError:
        if commit := known_commit(repository, revision or constants.DEFAULT_REVISION):
            return commit
        raise
