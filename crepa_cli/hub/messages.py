"""Errors of the Hub in words: what is wrong, whose fault it is, and what to do."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from crepa_cli.errors import UserError
from crepa_cli.hub.layout import kind_and_id

PUBLISHED = Path(__file__).parents[1] / "models" / "published"
"""Configurations of published checkpoints, by Hub id, in the layout of diffusers."""
UNAUTHORIZED, FORBIDDEN, TOO_MANY, SERVER_ERROR = 401, 403, 429, 500


class HubError(UserError):
    """The Hub has no such repository, revision or file, or refuses it."""


class HubUnreachableError(HubError):
    """The Hub could not be asked about something that is not on this machine.

    Args:
        repository: that is needed.
        reason: such as "huggingface.co does not answer".
        advice: what to do about it.
        silent: whether the same is to be expected for every repository.
    """

    def __init__(self, repository: str, reason: str, advice: str, *, silent: bool = False) -> None:
        super().__init__(
            f"{repository} is not on this machine, and {reason}: {advice}, or name a local folder that holds the model"
        )
        self.reason = reason
        self.advice = advice
        self.silent = silent


def explain(error: Exception, repository: str, revision: str | None) -> HubError:
    """The error of a request as a message for the user, without the text of the library."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachableError(repository, "HF_HUB_OFFLINE forbids downloads", "unset it", silent=True)
    if isinstance(error, GatedRepoError):
        return HubError(f"{repository} asks you to accept its terms: do so on {page}{_then_log_in()}")
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{repository} has no revision {revision!r}; see {page}/commits")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(_not_found(repository))
    if status in (UNAUTHORIZED, FORBIDDEN):
        return HubError(f"{repository}: your token gives no access to it; see {page}{_then_log_in()}")
    if status == TOO_MANY:
        return HubUnreachableError(repository, "the Hub has had too many requests from here", "try again in a minute")
    if status >= SERVER_ERROR:
        return HubUnreachableError(repository, f"the Hub has a fault of its own ({status})", "try again later")
    if status:
        return HubUnreachableError(repository, f"the Hub refused the request ({status})", f"see {page}")
    reason = f"{constants.ENDPOINT} does not answer"
    return HubUnreachableError(repository, reason, "connect this machine to the network", silent=True)


def _then_log_in() -> str:
    return ", then log in with: hf auth login" if get_token() is None else ""


def _not_found(repository: str) -> str:
    private = "" if get_token() else " If it is private, log in first: hf auth login."
    kind, name = kind_and_id(repository)
    if kind == "dataset":
        return f"the Hub has no dataset {name}; look for it on {constants.ENDPOINT}/datasets{private}"
    near = get_close_matches(repository, published_ids(), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"look for it on {constants.ENDPOINT}/models"
    return f"there is no folder {repository!r}, and the Hub has no model of that name; {hint}{private}"


def published_ids() -> list[str]:
    """The Hub ids of the published checkpoints and encoders that crepa knows."""
    return sorted(f"{path.parent.name}/{path.name}" for path in PUBLISHED.glob("*/*"))


def missing_file(repository: str, path: str, present: Collection[str]) -> HubError:
    """Say which file a repository lacks, and what it seems to hold instead."""
    if path != "model_index.json":
        return HubError(f"{repository} has no {path}; is it a checkpoint in the layout of diffusers?")
    if any("lora" in Path(name).name or Path(name).name == "adapter_config.json" for name in present):
        return HubError(
            f"{repository} has no model_index.json: it holds a LoRA; name the base model that it was trained on"
        )
    near = get_close_matches(f"{repository}-Diffusers", published_ids(), n=1, cutoff=0.8)
    advice = f"use {near[0]}" if near else "look for a repository whose name ends in -Diffusers"
    return HubError(f"{repository} has no model_index.json, so it is not in the layout of diffusers: {advice}")
