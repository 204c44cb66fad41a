"""A stub of the Hub on this machine: its two addresses, Range requests, and the faults of real networks."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

CHUNK = 16 * 1024
LARGE = {".safetensors", ".model", ".bin", ".onnx"}
"""Suffixes that the Hub keeps as large files, with a SHA-256."""


@dataclass
class StubRepository:
    """A repository: the files of each commit, oldest first.

    `gated` and `hidden` refuse it; `wrong` are contents that are served in place of the true ones, one per request.
    """

    commits: list[dict[str, bytes]]
    gated: bool = False
    wrong: dict[str, list[bytes]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        """The newest commit."""
        return self.commit(len(self.commits) - 1)

    def commit(self, index: int) -> str:
        """The name of a commit."""
        content = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in self.commits[index].items()})
        return hashlib.sha1(f"{index}{content}".encode()).hexdigest()

    def files(self, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision; None if there is none."""
        for index in range(len(self.commits)):
            if revision == self.commit(index):
                return revision, self.commits[index]
        return (self.head, self.commits[-1]) if revision in (None, "main") else None


@dataclass
class Request:
    """A request that arrived, when, when it was last sent anything, and the bytes of files that were sent for it."""

    method: str
    path: str
    authorized: bool
    at: float
    sent_at: float = 0.0
    first: int = 0
    sent: int = 0


class HubStub:
    """The server and what it has seen.

    Attributes:
        repositories: by owner/name, datasets by datasets/owner/name.
        requests: all that arrived.
        silent: accept connections and never answer.
        bytes_per_second: the speed of each transfer; None for no limit.
        statuses: answers in place of the next files, such as [500, 429].
        listing_statuses: the same in place of the next listings.
        drop_after: bytes after which a transfer is cut off; None for never.
        drops: how many transfers are cut off.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, StubRepository] = {}
        self.requests: list[Request] = []
        self.silent = False
        self.bytes_per_second: float | None = None
        self.statuses: list[int] = []
        self.listing_statuses: list[int] = []
        self.drop_after: int | None = None
        self.drops = 0
        self.closed = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True

    @property
    def address(self) -> str:
        """The value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def sent(self) -> int:
        """Bytes of files that were sent."""
        return sum(request.sent for request in self.requests)

    def add(self, name: str, *folders: Path, decoys: dict[str, bytes] | None = None) -> StubRepository:
        """Publish local folders as the commits of a repository, with files that nobody needs."""
        commits = [
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            | (decoys or {})
            for folder in folders
        ]
        self.repositories[name] = StubRepository(commits)
        return self.repositories[name]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Print nothing."""

            def do_GET(self) -> None:
                _Answer(stub, self).give()

            do_HEAD = do_GET  # noqa: N815 (the server looks it up by this name)

        return Handler


class _Answer:
    """The answer to one request."""

    def __init__(self, stub: HubStub, handler: BaseHTTPRequestHandler) -> None:
        self.stub = stub
        self.handler = handler
        path = unquote(urlsplit(handler.path).path)
        authorized = "authorization" in {key.lower() for key in handler.headers}
        self.request = Request(handler.command, path, authorized, time.monotonic())
        stub.requests.append(self.request)

    def give(self) -> None:
        if self.stub.silent:
            self.stub.closed.wait()
            self.handler.close_connection = True
            return
        parts = self.request.path.strip("/").split("/")
        kind = "datasets/" if "datasets" in parts[:2] else ""
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            self._listing(kind + "/".join(parts[2:4]), parts[5] if len(parts) > 5 else None)
            return
        if kind:
            parts = parts[1:]
        if len(parts) > 4 and parts[2] == "resolve":
            self._file(kind + "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404)

    def _open(self, name: str) -> StubRepository | None:
        repository = self.stub.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound")
        elif repository.gated:
            self._refuse(403, "GatedRepo")
            return None
        return repository

    def _listing(self, name: str, revision: str | None) -> None:
        if self.stub.listing_statuses:
            self._refuse(self.stub.listing_statuses.pop(0))
            return
        repository = self._open(name)
        if repository is None:
            return
        found = repository.files(revision)
        if found is None:
            self._refuse(404, "RevisionNotFound")
            return
        commit, files = found
        siblings = [_sibling(path, data) for path, data in files.items()]
        self._send(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())

    def _file(self, name: str, revision: str, path: str) -> None:
        if self.stub.statuses:
            self._refuse(self.stub.statuses.pop(0))
            return
        repository = self._open(name)
        if repository is None:
            return
        found = repository.files(revision)
        if found is None or path not in found[1]:
            self._refuse(404, "EntryNotFound")
            return
        wrong = repository.wrong.get(path)
        data = wrong.pop(0) if wrong else found[1][path]
        asked = self.handler.headers.get("Range")
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.request.first = first
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{_digest(path, data)}"'}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._send(206 if asked else 200, data[first:], headers)

    def _refuse(self, status: int, code: str = "") -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        is_file = "/resolve/" in self.request.path
        try:
            self.handler.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.handler.send_header(key, value)
            self.handler.end_headers()
            if self.request.method == "HEAD":
                return
            for start in range(0, len(body), CHUNK):
                piece = body[start : start + CHUNK]
                if is_file:
                    # Counted first, so that whoever has received it finds it counted.
                    self.request.sent += len(piece)
                    self.request.sent_at = time.monotonic()
                self.handler.wfile.write(piece)
                if is_file and self._dropped():
                    return
                if self.stub.bytes_per_second and is_file:
                    time.sleep(len(piece) / self.stub.bytes_per_second)
        except OSError:
            self.handler.close_connection = True

    def _dropped(self) -> bool:
        limit = self.stub.drop_after
        if limit is None or self.request.sent < limit or self.stub.drops <= 0:
            return False
        self.stub.drops -= 1
        self.handler.close_connection = True
        return True


def _sibling(path: str, data: bytes) -> dict[str, object]:
    sibling: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": _git_digest(data)}
    if Path(path).suffix in LARGE:
        sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return sibling


def _git_digest(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _digest(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if Path(path).suffix in LARGE else _git_digest(data)


@contextmanager
def running_stub() -> Iterator[HubStub]:
    """A stub that answers until the context ends."""
    stub = HubStub()
    thread = threading.Thread(target=stub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.closed.set()
        stub.server.shutdown()
        stub.server.server_close()
        thread.join()
