"""A content-addressed store of tensors: computed once per clip, read by every step and every later run.

An entry is one safetensors file, named by a hash of everything that it depends on. It appears whole under its
name or not at all, so any number of processes may share a store without locks: two that compute the same
entry write the same tensors, and the later rename wins.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crepa_cli.data.clips import clips_folder
from crepa_cli.errors import UserError
from crepa_cli.files import write_whole
from crepa_cli.profile import Data

CACHE_FOLDER = ".crepa-cache"
LAYOUT_VERSION = 1
LEFTOVER_SECONDS = 24 * 3600


def cache_folder(data: Data) -> Path:
    """The cache's folder: `data.cache`, or by default one among the clips.

    Raises:
        UserError: if the settings name neither.
    """
    return Path(data.cache) if data.cache else clips_folder(data) / CACHE_FOLDER


def cache_key(**parts: object) -> str:
    """The sha256, in hexadecimal, of everything that an entry depends on.

    `parts` are plain JSON values, nested as needed; their order does not matter.

    Raises:
        TypeError, ValueError: a part is no JSON value (NaN included), so it has no single spelling.
    """
    text = json.dumps([LAYOUT_VERSION, parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """Named tensors on disk under a kind ("latents", "prompts", "features") and a key from `cache_key`.

    `on_damage(path, reason)` is called for each entry that is found damaged, so that it can be reported.
    """

    def __init__(self, root: Path, on_damage: Callable[[Path, str], None] | None = None) -> None:
        self.root = root
        self._on_damage = on_damage

    def path(self, kind: str, key: str) -> Path:
        """Where an entry lies; a folder per two digits of the key keeps folders small."""
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether a whole, undamaged entry exists: every byte is read and compared with the entry's checksum.

        A damaged entry counts as absent; writing it again heals it.
        """
        path = self.path(kind, key)
        try:
            damage = _damage(path, key)
        except FileNotFoundError:
            return False
        if damage is not None and self._on_damage is not None:
            self._on_damage(path, damage)
        return damage is None

    def read(self, kind: str, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, memory-mapped: what is not used is not read. Nothing is verified again.

        Raises:
            UserError: the entry is gone or cannot be read.
        """
        path = self.path(kind, key)
        try:
            return _tensors(path)[0]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}). Start again: what is missing is made again.") from error

    def write(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store `tensors`, of any dtype and device, replacing an entry that is there already.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self.path(kind, key), save(stored, {"key": key, "crc32": _checksum(stored)}))

    def remove_leftovers(self) -> None:
        """Remove temporary files that killed runs left behind: those that nobody has written to for a day."""
        for path in self.root.rglob(".*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    path.unlink()
            except FileNotFoundError:  # another process cleans up too
                continue


def _damage(path: Path, key: str) -> str | None:
    try:
        tensors, metadata = _tensors(path)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        return f"cannot be read: {error}"
    if metadata.get("key") != key:
        return "holds another entry"
    if metadata.get("crc32") != _checksum(tensors):
        return "its content does not match its checksum"
    return None


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    # A CRC finds damage, which is what happens to caches; it is not there to stop forgers, who could write
    # any entry. It runs at the speed of memory, while a cryptographic hash would hold up 100 GB for minutes.
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
