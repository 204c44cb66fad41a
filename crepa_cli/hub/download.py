"""Downloading what a run needs: planned, checked against the disk, in sight, and stopped in a moment."""

from __future__ import annotations

import queue
import re
import shutil
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants
from rich.filesize import decimal

from crepa_cli.errors import UserError
from crepa_cli.events import Event, Notice, Progress
from crepa_cli.hub import layout
from crepa_cli.hub.messages import HubError, HubUnreachableError, missing_file
from crepa_cli.hub.needed import is_model, lacking, small_files, weight_files
from crepa_cli.hub.question import RemoteFile, list_files, resolve
from crepa_cli.hub.read import read_config
from crepa_cli.hub.transfer import DownloadStoppedError, bring, partial

STAGE = "downloading"
TRANSFERS = 4
"""Files that are transferred at the same time."""
REFRESH_SECONDS = 0.5


@dataclass(frozen=True)
class Need:
    """The part of a repository or of a local checkpoint that a run needs: folders of models, or the clips of a dataset.

    Attributes:
        name: Hub id or local folder.
        revision: branch, tag or commit on the Hub; None is the main branch.
        folders: the sub-folders; "" is the top.
        files: single files that are of use if there are any.
        kinds: ends of the names of files that are needed of a dataset, whatever folder they are in.
    """

    name: str
    revision: str | None
    folders: tuple[str, ...]
    files: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


class Missing(NamedTuple):
    """A file of the Hub that is not on this machine."""

    repository: str
    commit: str
    file: RemoteFile

    @property
    def arrived(self) -> int:
        """Its bytes on this machine so far; another process may be bringing them."""
        whole = layout.snapshot(self.repository, self.commit) / self.file.path
        paths = (whole, layout.blob(self.repository, self.file.digest), partial(self.repository, self.file.digest))
        return next((path.stat().st_size for path in paths if path.exists()), 0)


def missing_files(need: Need) -> list[Missing]:
    """The files of a need that are not on this machine, those of configurations first.

    If the revision is a commit and all of it is here, the Hub is not asked.

    Raises:
        UserError: if a local folder lacks files, or the Hub lacks them or cannot be asked.
    """
    if need.kinds:
        return _missing_clips(need)
    if Path(need.name).is_dir():
        if absent := lacking(Path(need.name), need.folders):
            raise UserError(f"{need.name} is not complete: it lacks {', '.join(absent)}")
        return []
    commit = resolve(need.name, need.revision)
    root = layout.snapshot(need.name, commit)
    complete = not lacking(root, need.folders)
    if complete and layout.is_commit(need.revision):
        return []
    try:
        listing = list_files(need.name, need.revision)
    except HubError:
        if complete:
            return []
        raise
    chosen = _chosen(need, commit, list(listing.files))
    return [Missing(need.name, commit, listing.files[path]) for path in chosen if not (root / path).exists()]


def _missing_clips(need: Need) -> list[Missing]:
    """The files of a dataset that are not on this machine; if the Hub cannot be asked, what is here has to do."""
    commit = resolve(need.name, need.revision)
    root = layout.snapshot(need.name, commit)
    try:
        listing = list_files(need.name, commit)
    except HubUnreachableError:
        if root.is_dir():
            return []
        raise
    chosen = [file for path, file in listing.files.items() if path.lower().endswith(need.kinds)]
    if not chosen:
        raise HubError(f"{need.name} has no file that ends in {', '.join(need.kinds)}: is it a folder of clips?")
    return [Missing(need.name, commit, file) for file in chosen if not (root / file.path).exists()]


def _chosen(need: Need, commit: str, paths: list[str]) -> list[str]:
    """The files that `from_pretrained` reads, configurations first: an interrupted download has those at least."""

    def read_index(path: str) -> Any:
        return read_config(need.name, path, commit)

    small, weights = [path for path in need.files if path in paths], []
    for folder in need.folders:
        found = small_files(paths, folder)
        if not found:
            raise HubError(f"{need.name} has no folder {folder}; is it a checkpoint in the layout of diffusers?")
        small += found
        if is_model(found, folder):
            wanted = weight_files(paths, folder, read_index)
            if not wanted:
                raise HubError(f"{need.name}: {folder or 'it'} has no weights as safetensors, and no others are read")
            if absent := [path for path in wanted if path not in paths]:
                raise missing_file(need.name, absent[0], paths)
            weights += wanted
    return [*small, *weights]


def plan(needs: Iterable[Need]) -> list[Missing]:
    """Everything that is missing, each content once; see `missing_files`."""
    found: dict[tuple[str, str], Missing] = {}
    for need in needs:
        for one in missing_files(need):
            found.setdefault((one.repository, one.file.path), one)
    return list(found.values())


def bytes_to_come(missing: Iterable[Missing]) -> int:
    """The bytes that a download would transfer."""
    return sum(one.file.size - one.arrived for one in missing)


def free_bytes() -> int:
    """The bytes that are free in the Hub's cache."""
    cache = Path(constants.HF_HUB_CACHE)
    return shutil.disk_usage(next(path for path in (cache, *cache.absolute().parents) if path.exists())).free


def download(needs: Sequence[Need]) -> Generator[Event, None, None]:
    """Bring what is missing onto this machine; yields events, and none if everything is here.

    What has arrived is kept if the download is interrupted, and the next one goes on from there.

    Raises:
        UserError: if it does not fit the disk, or the Hub lacks it, refuses it or does not answer.
    """
    missing = plan(needs)
    if not missing:
        return
    size, free = bytes_to_come(missing), free_bytes()
    message = f"{decimal(size)} to download into {constants.HF_HUB_CACHE}, {decimal(free)} free"
    if size > free:
        raise UserError(f"{message}: make room there, or set HF_HOME to a folder on a larger disk")
    yield Notice(message)
    yield from _transfer(missing)


def _transfer(missing: Sequence[Missing]) -> Iterator[Event]:
    waiting: queue.SimpleQueue[Missing] = queue.SimpleQueue()
    for one in missing:
        waiting.put(one)
    stop, failures = threading.Event(), queue.SimpleQueue[BaseException]()
    # Not a pool: that waits for its threads when the process ends, and a stalled connection takes its time-out.
    threads = [
        threading.Thread(target=_work, args=(waiting, stop, failures), name="crepa-download", daemon=True)
        for _ in range(min(TRANSFERS, len(missing)))
    ]
    total = sum(one.file.size for one in missing)
    yield Progress(STAGE, sum(one.arrived for one in missing), total, "", "B")
    for thread in threads:
        thread.start()
    try:
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(REFRESH_SECONDS)
            if not failures.empty():
                raise failures.get()
            yield _progress(missing, total)
        if not failures.empty():
            raise failures.get()
    finally:
        stop.set()
    yield Progress(STAGE, total, total, "", "B")


def _work(
    waiting: queue.SimpleQueue[Missing], stop: threading.Event, failures: queue.SimpleQueue[BaseException]
) -> None:
    while not stop.is_set():
        try:
            one = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            bring(one.repository, one.commit, one.file, stop)
        except DownloadStoppedError:
            return
        except Exception as error:  # raised in the main thread
            failures.put(error)
            return


def _progress(missing: Sequence[Missing], total: int) -> Progress:
    """The state of the download, with the files that are under way and how much of each has arrived."""
    sizes = [(one.file, one.arrived) for one in missing]
    under_way = [f"{_label(file.path)} {size / file.size:.0%}" for file, size in sizes if 0 < size < file.size]
    return Progress(STAGE, min(total, sum(size for _, size in sizes)), total, ", ".join(under_way), "B")


def _label(path: str) -> str:
    """The name of a file, short enough for a line with several: `transformer/00001-of-00002`."""
    return re.sub(r"(diffusion_pytorch_)?model-(\d+-of-\d+)", r"\2", path.removesuffix(".safetensors"))


def fetch(need: Need) -> Path:
    """The local folder of a need; whatever is missing is downloaded without a word.

    Raises:
        UserError: see `download`.
    """
    for _ in download([need]):
        pass
    return local_folder(need.name, need.revision)


def local_folder(name: str, revision: str | None) -> Path:
    """The local folder of a checkpoint, or the snapshot of a repository's commit.

    Raises:
        UserError: if the commit of a branch is not known and the Hub cannot be asked.
    """
    return Path(name) if Path(name).is_dir() else layout.snapshot(name, resolve(name, revision))
