"""A content-addressed store of tensors: computed once per clip, read by every step and every later run.

An entry is one safetensors file, named by a hash of everything it depends on. It appears under its name completely or
not at all, so any number of processes can share a store without locks: two processes that compute the same entry write
the same tensors, and the later rename wins.
"""

import hashlib
import json
import tempfile
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
from crepa_cli.profile import DataSettings

CACHE_FOLDER = ".crepa-cache"
LAYOUT_VERSION = 1
LEFTOVER_SECONDS = 24 * 3600


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

    `on_damage(path, reason)` is called for each damaged entry found, so that it can be reported.
    """

    def __init__(self, root: Path, on_damage: Callable[[Path, str], None] | None = None) -> None:
        self.root = root
        self._on_damage = on_damage

    def path(self, kind: str, key: str) -> Path:
        """The path of an entry; one folder for each first two digits of the key keeps folders small."""
        # In one piece: three joins take a fifth of the time of looking an entry up.
        return Path(f"{self.root}/{kind}/{key[:2]}/{key}.safetensors")

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

    def read(self, kind: str, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, copied, so that its file can be replaced or deleted. Nothing is verified again.

        Raises:
            UserError: if the entry is missing or cannot be read.
        """
        path = self.path(kind, key)
        try:
            # Tensors of safetensors map their file as long as they live, and Windows deletes no file that is mapped.
            return {name: tensor.clone() for name, tensor in _tensors(path)[0].items()}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read ({error}). Run the command again: missing entries are computed again."
            ) from error

    def write(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store `tensors`, of any dtype and device, replacing any existing entry.

        Raises:
            UserError: if the disk is full or the folder is not writable.
        """
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self.path(kind, key), save(stored, {"key": key, "crc32": _checksum(stored)}))

    def remove_leftovers(self) -> None:
        """Remove temporary files left behind by killed runs: those not written to for a day."""
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
        return "contains another entry"
    if metadata.get("crc32") != _checksum(tensors):
        return "its content does not match its checksum"
    if names := not_finite(tensors):
        return f"{', '.join(names)}: not finite"
    return None


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that contain NaN or infinity."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    # A CRC detects damage, which is the risk here; it need not stop attackers, who could write any entry. It runs at
    # memory speed, while a cryptographic hash of 100 GB would take minutes.
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
