"""A stub of the Hub on this machine: downloads with Range requests, uploads, and the faults of real networks."""

from __future__ import annotations

import base64
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
POLL_SECONDS = 0.02
"""How long a stub may take to notice that it is to end."""
LARGE = {".safetensors", ".model", ".bin", ".onnx", ".mp4", ".png"}
"""Suffixes that the Hub keeps as large files, with a SHA-256."""


@dataclass
class StubRepository:
    """A repository: the files of each commit, oldest first.

    `gated` refuses it; `wrong` are contents that are served in place of the true ones, one per request.
    """

    commits: list[dict[str, bytes]]
    gated: bool = False
    private: bool = False
    wrong: dict[str, list[bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

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
        user: whose token every request has.
        writable: the owners to whose repositories that token may write.
        objects: large files that have arrived, by their SHA-256.
        upload_statuses: answers in place of the next uploads of large files.
        slow_uploads: take large files, and never say that they have arrived.
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
        self.user = "me"
        self.writable = {"me"}
        self.objects: dict[str, bytes] = {}
        self.upload_statuses: list[int] = []
        self.slow_uploads = False
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

            # The server looks these up by their names.
            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

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
        self.body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))

    def give(self) -> None:
        if self.stub.silent:
            self.stub.closed.wait()
            self.handler.close_connection = True
            return
        parts = self.request.path.strip("/").split("/")
        if self._pushed(parts):
            return
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

    def _pushed(self, parts: list[str]) -> bool:
        """Answer a request that belongs to a push; False for all others."""
        name = "/".join(parts[2:4])
        match self.request.method, parts:
            case "GET", ["api", "whoami-v2"]:
                self._give({"name": self.stub.user})
            case "POST", ["api", "repos", "create"]:
                asked = json.loads(self.body)
                self._create(f"{asked['organization']}/{asked['name']}", private=asked.get("visibility") == "private")
            case "POST", ["api", "validate-yaml"]:
                self._give({})
            case "GET", ["api", "models", owner, _, "auth-check", "write"]:
                self._give({}) if owner in self.stub.writable else self._refuse(403)
            case "POST", ["api", "models", _, _, "preupload", "main"]:
                self._preupload(self.stub.repositories[name])
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                self._batch()
            case "PUT", ["upload", digest]:
                self._upload(digest)
            case "POST", ["api", "models", _, _, "commit", "main"]:
                self._commit(name)
            case _:
                return False
        return True

    def _create(self, name: str, *, private: bool) -> None:
        if name.split("/")[0] not in self.stub.writable:
            self._refuse(403)
            return
        self.stub.repositories[name] = StubRepository([{".gitattributes": b""}], private=private)
        self._give({"url": f"{self.stub.address}/{name}"})

    def _preupload(self, repository: StubRepository) -> None:
        there = repository.commits[-1]
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        self._give(
            {
                "files": [
                    {
                        "path": path,
                        "uploadMode": "lfs" if Path(path).suffix in LARGE else "regular",
                        "shouldIgnore": False,
                        "oid": _digest(path, there[path]) if path in there else None,
                    }
                    for path in paths
                ]
            }
        )

    def _batch(self) -> None:
        objects = json.loads(self.body)["objects"]
        for one in objects:
            if one["oid"] not in self.stub.objects:
                one["actions"] = {"upload": {"href": f"{self.stub.address}/upload/{one['oid']}"}}
        self._give({"objects": objects})

    def _upload(self, digest: str) -> None:
        if self.stub.slow_uploads:
            self.stub.closed.wait()
            return
        if self.stub.upload_statuses:
            self._refuse(self.stub.upload_statuses.pop(0))
            return
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.stub.objects[digest] = self.body
        self._give({})

    def _commit(self, name: str) -> None:
        repository = self.stub.repositories[name]
        files = dict(repository.commits[-1])
        for line in self.body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.stub.objects[value["oid"]]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
            else:
                repository.messages.append(value["summary"])
        repository.commits.append(files)
        self._give({"commitUrl": f"{self.stub.address}/{name}/commit/{repository.head}", "commitOid": repository.head})

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
        self._give({"id": name, "sha": commit, "siblings": siblings, "private": repository.private})

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

    def _give(self, answer: dict[str, object]) -> None:
        self._send(200, json.dumps(answer).encode())

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
    thread = threading.Thread(target=stub.server.serve_forever, args=(POLL_SECONDS,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.closed.set()
        stub.server.shutdown()
        stub.server.server_close()
        thread.join()
