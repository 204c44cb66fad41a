"""The transfer of one file: it resumes where it was cut off, and its content is checked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status

from crepa_cli.errors import UserError
from crepa_cli.files import NO_ROOM
from crepa_cli.hub import layout
from crepa_cli.hub.messages import HubUnreachableError, explain
from crepa_cli.hub.question import RemoteFile

READ_TIMEOUT = 10.0
"""Seconds without a byte, after which a connection is made anew."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between attempts that bring nothing; after the last one the transfer fails."""
LONGEST_PAUSE = 60.0
PASSING = {408, 429, 500, 502, 503, 504}
"""Answers after which asking again may help."""
PARTIAL_CONTENT = 206
TIMES = 2
"""How often a file with the wrong content is fetched."""


class DownloadStoppedError(Exception):
    """The download was asked to stop."""


def partial(repository: str, digest: str) -> Path:
    """The part of a blob that has arrived."""
    return layout.blob(repository, f"{digest}.incomplete")


def bring(repository: str, commit: str, file: RemoteFile, stop: threading.Event) -> None:
    """Bring a file of the Hub into the cache, under its name in the snapshot of the commit.

    Of several processes, one transfers it and the others wait.

    Raises:
        DownloadStoppedError: if `stop` was set.
        UserError: if the Hub refuses it, the disk is full, or its content is wrong.
    """
    target = layout.blob(repository, file.digest)
    lock = layout.lock(repository, file.digest)
    with _disk_errors(target, file.size):
        for folder in (target.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock), _disk_errors(target, file.size):
        if (layout.snapshot(repository, commit) / file.path).exists():
            return
        if not target.exists():
            _bring_blob(repository, commit, file, target, stop)
        layout.link(repository, commit, file.path, file.digest)


def _bring_blob(repository: str, commit: str, file: RemoteFile, target: Path, stop: threading.Event) -> None:
    part = partial(repository, file.digest)
    for _ in range(TIMES):
        with part.open("ab+") as output:
            found = _Transfer(repository, commit, file, output, stop).run()
        if found == file.digest:
            part.replace(target)
            return
        part.unlink()
    raise UserError(
        f"{repository}: {file.path} arrived {TIMES} times with the wrong content (the Hub states the digest "
        f"{file.digest[:12]}..., the file has {found[:12]}...); a proxy or the disk may damage it. Nothing was kept"
    )


class _Transfer:
    """One attempt after the other to complete a file.

    Args:
        repository: owner/name.
        commit: of the file.
        file: its path, size and digest.
        output: what has arrived so far, opened to append.
        stop: set to interrupt the transfer.
    """

    def __init__(self, repository: str, commit: str, file: RemoteFile, output: BinaryIO, stop: threading.Event) -> None:
        self.repository = repository
        kind, name = layout.kind_and_id(repository)
        self.url = hf_hub_url(name, file.path, repo_type=kind, revision=commit)
        self.commit = commit
        self.file = file
        self.output = output
        self.stop = stop

    def run(self) -> str:
        """Transfer what is missing, and return the digest of the whole."""
        self._start(keep=True)
        failures = 0
        while self.done < self.file.size:
            before = self.done
            try:
                self._attempt()
            except DownloadStoppedError:
                raise
            except HfHubHTTPError as error:
                passes = error.response.status_code in PASSING
                self._pause(error, failures if passes else len(PAUSES), _asked_pause(error))
            except OSError:
                raise  # the disk's: those of the network share no base class
            except Exception as error:
                self._pause(error, failures, 0.0)
            failures = 0 if self.done > before else failures + 1
        return self.hash.hexdigest()

    def _attempt(self) -> None:
        # Uncompressed, because the bytes that have arrived are counted.
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if self.done:
            headers["Range"] = f"bytes={self.done}-"
        with get_session().stream(
            "GET", self.url, headers=headers, timeout=READ_TIMEOUT, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            if self.done and response.status_code != PARTIAL_CONTENT:
                self._start(keep=False)
            for chunk in response.iter_bytes():
                self._check_stop()
                self.output.write(chunk)
                self.hash.update(chunk)
                self.done += len(chunk)
                if self.done > self.file.size:
                    return

    def _start(self, *, keep: bool) -> None:
        """Begin with the part that has arrived, or from the first byte."""
        self.hash = self.file.new_hash()
        self.done = 0
        if not keep:
            self.output.truncate(0)
        self.output.seek(0)
        for chunk in iter(lambda: self.output.read(2**20), b""):
            self._check_stop()
            self.hash.update(chunk)
            self.done += len(chunk)

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise DownloadStoppedError

    def _pause(self, error: Exception, failures: int, asked: float) -> None:
        """Wait before the next attempt, and give up after the last one."""
        if failures >= len(PAUSES):
            explained = explain(error, self.repository, self.commit)
            reason = str(explained)
            if isinstance(explained, HubUnreachableError):
                reason = f"{explained.reason}: {explained.advice}"
            raise UserError(
                f"{self.file.path} of {self.repository} could not be downloaded: {reason}. What has arrived is kept"
            ) from error
        self.stop.wait(min(max(asked, PAUSES[failures]), LONGEST_PAUSE))
        self._check_stop()


def _asked_pause(error: HfHubHTTPError) -> float:
    """Seconds that the Hub asks to wait."""
    value = error.response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


@contextmanager
def _disk_errors(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        room = f"; it needs {size:,} bytes" if error.errno in NO_ROOM else ""
        raise UserError(f"{path} cannot be written: {error.strerror}{room}. What has arrived is kept") from error
