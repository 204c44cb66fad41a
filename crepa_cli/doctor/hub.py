"""The repositories that a run needs, and whether they are on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants
from rich.filesize import decimal

from crepa_cli.doctor.findings import Check
from crepa_cli.errors import UserError
from crepa_cli.hub.download import Need, bytes_to_come, free_bytes, plan
from crepa_cli.hub.question import resolve, unreachable


def check_hub(repositories: Iterable[tuple[str, str | None]]) -> Iterator[Check]:
    """Warn if the Hub is needed and does not answer; later checks then do not wait for it.

    Args:
        repositories: Hub ids and local folders, with their revisions.
    """
    for name, revision in repositories:
        if not Path(name).is_dir() and unreachable() is None:
            with suppress(UserError):  # reported where the repository is checked
                resolve(name, revision)
    if silence := unreachable():
        yield Check("hub", "warning", silence.reason, f"{silence.advice}, unless everything needed is on this machine")


def check_need(name: str, need: Need) -> Check:
    """Check whether everything a run needs of a repository is on this machine, and what it would download.

    Args:
        name: name of the check.
        need: the repository or local folder.

    Raises:
        UserError: if a local folder is not complete, or the Hub lacks files or cannot be asked.
    """
    missing = plan([need])
    if not missing:
        return Check(name, "fine", f"{need.name} is on this machine")
    size, free = bytes_to_come(missing), free_bytes()
    message = (
        f"{need.name} is not on this machine: {decimal(size)} to download, {decimal(free)} free in "
        f"{constants.HF_HUB_CACHE}"
    )
    if size > free:
        return Check(name, "failure", message, "make room there, or set HF_HOME to a folder on a larger disk")
    return Check(name, "warning", message, "training downloads it first; crepa train --download-only does that alone")
