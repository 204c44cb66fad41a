"""Pushing files to a repository of the Hub, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from crepa_cli.errors import RunError, UserError
from crepa_cli.hub.messages import FORBIDDEN, UNAUTHORIZED, HubUnreachableError, explain
from crepa_cli.hub.read import fetch_file

MADE_BY_THE_HUB = {".gitattributes"}
"""Files of a repository that nothing has been pushed to."""
OWNED_FOLDERS = ("weights/", "samples/")
"""Folders that hold no other files than those of the last push."""


class Identity(NamedTuple):
    """A file that tells runs apart by its first line, which differs between any two of them.

    Attributes:
        path: of the file in the repository.
        line: the first line here; empty before the first step.
    """

    path: str
    line: bytes


def claim_repository(name: str, identity: Identity, *, private: bool) -> str:
    """Make a repository on the Hub, or check that one can be pushed to; the answer is its owner/name.

    Args:
        name: owner/name, or the name alone for the user who is logged in.
        identity: of the run.
        private: whether only its owner may see it.

    Raises:
        UserError: nobody is logged in, the token may not write there, or the name is taken by something else.
    """
    if get_token() is None:
        raise UserError(
            f"pushing to {name} needs a login: make a token with write access on {constants.ENDPOINT}/settings/tokens, "
            "then run: hf auth login"
        )
    api, repository = HfApi(), name
    try:
        if "/" not in name:
            repository = f"{api.whoami()['name']}/{name}"
        validate_repo_id(repository)
        try:
            info = api.model_info(repository)
        except RepositoryNotFoundError:
            api.create_repo(repository, private=private or None)
            return repository
        api.auth_check(repository, write=True)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} is no name of a repository: use name or owner/name, with letters, digits and . _ - inside"
        ) from error
    except Exception as error:  # the errors of the HTTP library share no base class with the Hub's
        raise _refusal(error, repository) from error
    files = {file.rfilename for file in info.siblings} - MADE_BY_THE_HUB
    if files and not _holds(repository, str(info.sha), identity, files):
        raise UserError(f"{page(repository)} holds something else, which would be overwritten: choose another name")
    if private and not info.private:
        raise UserError(f"{page(repository)} is public: make it private in its settings, or choose another name")
    return repository


def _holds(repository: str, commit: str, identity: Identity, files: set[str]) -> bool:
    """Whether a repository holds an earlier state of the run."""
    if not identity.line or identity.path not in files:
        return False
    with fetch_file(repository, identity.path, commit).open("rb") as file:
        return file.readline() == identity.line


def push_files(repository: str, files: Mapping[str, Path | bytes], message: str) -> None:
    """Push files in one commit, which removes those of an earlier one from `OWNED_FOLDERS`.

    What has arrived before an interruption is not sent again.

    Args:
        repository: owner/name, which exists.
        files: the files to push, or what they hold, by their paths in the repository.
        message: of the commit.

    Raises:
        RunError: if the Hub refuses a file or cannot be reached; the repository is as it was before.
    """
    api = HfApi()
    try:
        there = {file.rfilename for file in api.model_info(repository).siblings}
        gone = [path for path in there - files.keys() if path.startswith(OWNED_FOLDERS)]
        added = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(repository, [*added, *map(CommitOperationDelete, gone)], commit_message=message)
    except Exception as error:  # as above
        raise RunError(_reason(error, repository)) from error


def page(repository: str) -> str:
    """The address of a repository."""
    return f"{constants.ENDPOINT}/{repository}"


def _refusal(error: Exception, repository: str) -> UserError:
    """The error of a request as a message for the user."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status in (UNAUTHORIZED, FORBIDDEN):
        return UserError(
            f"your token may not write to {repository}: make one with write access to it on "
            f"{constants.ENDPOINT}/settings/tokens, then run: hf auth login"
        )
    explained = explain(error, repository, None)
    if isinstance(explained, HubUnreachableError):
        return UserError(f"{repository} cannot be pushed to: {explained.reason}: {explained.advice}")
    return explained


def _reason(error: Exception, repository: str) -> str:
    """Why a push failed: in words for an answer of the Hub, and in those of the library for all else."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, HfHubHTTPError | OfflineModeIsEnabled):
        return str(_refusal(cause, repository))
    return " ".join(str(cause).split()) or type(cause).__name__
