"""A content-addressed store of tensors: computed once per clip, read by every step and every later run.

An entry is one safetensors file, named by a hash of everything it depends on. It appears under its name completely or
not at all, so any number of processes can share a store without locks: two processes that compute the same entry write
the same tensors, and the later rename wins.
"""

import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crepa_cli.data.clips import clips_folder
from crepa_cli.data.index import FileState, Index, Known
from crepa_cli.errors import UserError
from crepa_cli.files import write_whole
from crepa_cli.profile import DataSettings

CACHE_FOLDER = ".crepa-cache"
LAYOUT_VERSION = 1
LEFTOVER_SECONDS = 24 * 3600
SUFFIX = ".safetensors"


class DamagedEntryError(UserError):
    """An entry that is there and not as it was written.

    Attributes:
        kind: of the entry.
        key: of the entry.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, kind: str, key: str, reason: str) -> None:
        super().__init__(
            f"{path} is damaged: {reason}. `crepa train --verify-cache` makes all damaged entries again, and so does "
            "deleting the file and running the command again"
        )
        self.kind = kind
        self.key = key
        self.reason = reason


def cache_folder(data: DataSettings) -> Path:
    """The folder of the cache: `data.cache`, or by default a folder next to the clips.

    Raises:
        UserError: if the settings name neither a cache nor a folder of clips.
    """
    return Path(data.cache) if data.cache else clips_folder(data) / CACHE_FOLDER


def check_writable(root: Path, clips: Path) -> None:
    """Check that a cache can be made, by writing there; one that exists may be complete, and is not checked.

    Args:
        root: the folder of the cache.
        clips: the folder of the clips.

    Raises:
        UserError: if nothing can be written there; it names the setting to change.
    """
    if root.is_dir() and any(root.iterdir()):
        return
    place = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as error:
        if root != clips / CACHE_FOLDER:
            raise UserError(f"data.cache = {root}: {place} cannot be written ({error.strerror})") from error
        other = Path.home() / ".cache/crepa" / clips.absolute().name
        raise UserError(
            f"the folder of clips {clips} cannot be written ({error.strerror}), so the cache cannot be there: set "
            f"data.cache, for example with --set data.cache={other.as_posix()}"
        ) from error


def cache_key(**parts: object) -> str:
    """The hexadecimal sha256 of everything that an entry depends on.

    `parts` are plain JSON values and may be nested; their order does not matter.

    Raises:
        TypeError, ValueError: if a part is not a JSON value. NaN is not one either.
    """
    text = json.dumps([LAYOUT_VERSION, parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """Named tensors on disk under a kind ("latents", "prompts", "features") and a key from `cache_key`.

    Args:
        root: its folder.
        on_damage: called with the path of each damaged entry that is looked for, and the reason.
        verify: whether every entry that is looked for is read and verified. Otherwise that waits until it is needed.
    """

    def __init__(
        self, root: Path, on_damage: Callable[[Path, str], None] | None = None, *, verify: bool = False
    ) -> None:
        self.root = root
        self.verify = verify
        self.index = Index(root)
        self._on_damage = on_damage

    def path(self, kind: str, key: str) -> Path:
        """The path of an entry; one folder for each first two digits of the key keeps folders small."""
        # In one piece: three joins take a fifth of the time of looking an entry up.
        return Path(f"{self.root}/{kind}/{key[:2]}/{key}{SUFFIX}")

    def has(self, kind: str, key: str) -> bool:
        """Whether a complete, undamaged entry exists: every byte is read and verified against the checksum.

        A damaged entry counts as missing, and so does one with values that are not finite, which earlier versions
        stored; writing it again repairs it.
        """
        path = self.path(kind, key)
        try:
            damage = _damage(path, key)
        except FileNotFoundError:
            return False
        if damage is not None and self._on_damage is not None:
            self._on_damage(path, damage)
        return damage is None

    def missing(self, kind: str, keys: Collection[str], doubted: Collection[str] = ()) -> set[str]:
        """Those of some keys that have no whole entry.

        An entry is verified, as by `has`, if its key is `doubted` or its file was changed since it was last looked for.
        The others are not opened; they are verified when they are read.
        """
        states = self._states(kind, set(keys))
        known = self.index.find([f"{kind}/{key}" for key in states])
        missing, fresh = set(keys) - states.keys(), []
        for (key, state), seen in zip(states.items(), known, strict=True):
            changed = seen is not None and seen.state != state
            if (self.verify or changed or key in doubted) and not self.has(kind, key):
                missing.add(key)
            elif seen is None or changed:
                fresh.append((f"{kind}/{key}", Known(state, "")))
        self.index.put(fresh)
        return missing

    def remember(self, kind: str, keys: Collection[str]) -> None:
        """Remember the state of entries that have been written."""
        self.index.put((f"{kind}/{key}", Known(state, "")) for key, state in self._states(kind, set(keys)).items())

    def _states(self, kind: str, keys: set[str]) -> dict[str, FileState]:
        """The states of the files of some entries, without those that are missing."""
        states = {}
        for part in {key[:2] for key in keys}:
            try:
                with os.scandir(f"{self.root}/{kind}/{part}") as entries:
                    for entry in entries:
                        key = entry.name.removesuffix(SUFFIX)
                        if key in keys and key != entry.name:
                            states[key] = FileState.of(entry.stat())
            except OSError:  # no such folder, or none that can be listed: nothing of it can be used
                continue
        return states

    def read(self, kind: str, key: str) -> dict[str, Tensor]:
        """The verified tensors of an entry, copied, so that its file can be replaced or deleted.

        Values that are not finite are passed on.

        Raises:
            DamagedEntryError: if its content is not as it was written.
            UserError: if the entry is missing.
        """
        path = self.path(kind, key)
        try:
            mapped, metadata = _tensors(path)
        except FileNotFoundError as error:
            raise UserError(
                f"{path} cannot be read ({error}). Run the command again: missing entries are computed again."
            ) from error
        except (OSError, SafetensorError) as error:
            raise DamagedEntryError(path, kind, key, f"cannot be read: {error}") from error
        # Tensors of safetensors map their file as long as they live, and Windows deletes no file that is mapped.
        tensors = {name: tensor.clone() for name, tensor in mapped.items()}
        if damage := _mismatch(tensors, metadata, key):
            raise DamagedEntryError(path, kind, key, damage)
        return tensors

    def write(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store `tensors`, of any dtype and device, replacing any existing entry.

        Raises:
            UserError: if the disk is full or the folder is not writable.
        """
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self.path(kind, key), save(stored, {"key": key, "crc32": _checksum(stored)}))

    def remove_leftovers(self) -> None:
        """Remove temporary files left behind by killed runs: those not written to for a day."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                if name.startswith(".") and name.endswith(".tmp"):
                    self._remove_leftover(Path(folder, name))

    def _remove_leftover(self, path: Path) -> None:
        with suppress(FileNotFoundError):  # another process cleans up too
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def _damage(path: Path, key: str) -> str | None:
    try:
        tensors, metadata = _tensors(path)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        return f"cannot be read: {error}"
    if damage := _mismatch(tensors, metadata, key):
        return damage
    if names := not_finite(tensors):
        return f"{', '.join(names)}: not finite"
    return None


def _mismatch(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], key: str) -> str | None:
    """Why tensors are not the entry of a key as it was written; None if they are."""
    if metadata.get("key") != key:
        return "contains another entry"
    if metadata.get("crc32") != _checksum(tensors):
        return "its content does not match its checksum"
    return None


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that contain NaN or infinity."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dictionary)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    # A CRC detects damage, which is the risk here; it need not stop attackers, who could write any entry. It runs at
    # memory speed, while a cryptographic hash of 100 GB would take minutes.
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
