"""Finds the clips of a training set and their captions.

File names and captions are untrusted: they are read as data and never followed out of the clips' folder.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crepa_cli.errors import UserError, counted, listed
from crepa_cli.profile import DataSettings

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".wmv", ".asf", ".flv"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".gif", ".webp"),
)
CAPTION_SUFFIX = ".txt"
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION_BYTES = 1_000_000
MAX_METADATA_BYTES = 200_000_000


class ClipError(Exception):
    """A clip that cannot be used. The message is only the reason, without the clip's name."""


@dataclass(frozen=True, order=True)
class Clip:
    """A video file (absolute path) and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True, order=True)
class SkippedClip:
    """A skipped clip, caption or metadata line: its name relative to the clips' folder, and the reason.

    Both are safe to print: control characters in hostile names are escaped.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class ClipScan:
    """The contents of a folder: usable clips, skipped ones, and the names of files of other kinds, each sorted."""

    clips: list[Clip]
    skipped: list[SkippedClip]
    left_out: list[str]


def clips_folder(data: DataSettings) -> Path:
    """The folder of clips named in the settings.

    Raises:
        UserError: if the settings name none.
    """
    if data.path is None:
        raise UserError("no clips: give their folder with --data DIR, or as path in [data] of crepa.toml")
    return Path(data.path)


def find_clips(folder: Path) -> ClipScan:
    """Find the video files in `folder` and its subfolders, each with its caption.

    The caption of `clip.mp4` is the text of `clip.txt` next to it, or else the `text` that a `metadata.jsonl` or
    `metadata.csv` gives for its `file_name`, relative to that metadata file. Hidden files and folders are ignored.
    Clips and metadata lines that cannot be used are listed in the result's `skipped`, files that are neither videos nor
    captions in `left_out`.

    Raises:
        UserError: if the folder does not exist or contains no video file.
    """
    root = _existing(folder)
    videos, metadata, left_out, skipped = _walk(root)
    if not videos:
        raise _no_clips(folder, _names(left_out, root))
    captions = _metadata_captions(root, metadata, videos, skipped)
    clips = []
    for video in videos:
        try:
            clips.append(Clip(video, _caption(video, captions)))
        except (ClipError, OSError) as error:
            skipped.append(SkippedClip(_name(video, root), str(error)))
    return ClipScan(sorted(clips), sorted(skipped), _names(left_out, root))


def check_clips(folder: Path) -> None:
    """Check that `find_clips` would find a video file, without reading captions.

    Raises:
        UserError: if the folder does not exist or contains no video file.
    """
    root = _existing(folder)
    videos, _, left_out, _ = _walk(root)
    if not videos:
        raise _no_clips(folder, _names(left_out, root))


def file_digest(path: Path) -> str:
    """The hexadecimal sha256 of a file's content.

    Raises:
        ClipError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ClipError(f"cannot be read: {error.strerror}") from error


def _no_clips(folder: Path, left_out: list[str]) -> UserError:
    suffixes = ", ".join(suffix[1:] for suffix in VIDEO_SUFFIXES)
    others = f", but {counted(len(left_out), 'other file')}: {listed(left_out)}" if left_out else ""
    return UserError(
        f"No clips in {_printable(str(folder))}: it and its subfolders hold no file that ends in {suffixes}{others}. "
        "Each clip needs a caption: clip.txt next to clip.mp4, or metadata.jsonl with file_name and text."
    )


def _existing(folder: Path) -> Path:
    try:
        root = folder.resolve()
        problem = None if root.is_dir() else "is not a folder" if root.exists() else "does not exist"
    except (OSError, RuntimeError, ValueError) as error:  # no permission, a symlink loop, a null character
        problem = f"cannot be opened: {error}"
    if problem:
        raise UserError(f"The clips' folder {_printable(str(folder))} {problem}. Give a folder of video files.")
    return root


def _walk(root: Path) -> tuple[list[Path], list[Path], list[Path], list[SkippedClip]]:
    """Videos, metadata, files that are neither nor captions, and folders that cannot be listed.

    Symlinks to folders are not followed.
    """
    videos: list[Path] = []
    metadata: list[Path] = []
    left_out: list[Path] = []
    skipped: list[SkippedClip] = []

    def unlisted(error: OSError) -> None:
        skipped.append(SkippedClip(_name(Path(error.filename), root), f"cannot be listed: {error.strerror}"))

    for parent, folders, files in os.walk(root, onerror=unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if name in METADATA_NAMES:
                metadata.append(path)
            elif path.suffix.lower() in VIDEO_SUFFIXES:
                videos.append(path)
            elif path.suffix.lower() != CAPTION_SUFFIX:
                left_out.append(path)
    return sorted(videos), sorted(metadata), sorted(left_out), skipped


def _caption(video: Path, captions: dict[Path, str]) -> str:
    if not video.is_file():
        raise ClipError("is not a regular file, or is a broken symlink")
    beside = video.with_suffix(CAPTION_SUFFIX)
    if beside.is_file():
        caption = _read_text(beside, MAX_CAPTION_BYTES).strip()
    elif video in captions:
        caption = captions[video]
    else:
        raise ClipError(
            f"has no caption: write one in {_printable(beside.name)} next to the clip, or add it to metadata.jsonl"
        )
    if not caption:
        raise ClipError("has an empty caption: describe the clip in a sentence")
    return caption


def _metadata_captions(
    root: Path, metadata: list[Path], videos: list[Path], skipped: list[SkippedClip]
) -> dict[Path, str]:
    """The caption of each clip named in the metadata files; mistakes go to `skipped` with file and line."""
    captions: dict[Path, str] = {}
    known = set(videos)
    for file in metadata:
        try:
            for line, entry in _entries(file):
                try:
                    video, caption = _entry(entry, file.parent, root, known)
                    if captions.setdefault(video, caption) != caption:
                        raise ClipError(f"{_name(video, root)} already has another caption, which is kept")
                except ClipError as error:
                    skipped.append(SkippedClip(f"{_name(file, root)}, line {line}", str(error)))
        except ClipError as error:
            skipped.append(SkippedClip(_name(file, root), str(error)))
    return captions


def _entry(entry: object, folder: Path, root: Path, videos: set[Path]) -> tuple[Path, str]:
    """The clip named by a metadata entry, and its caption."""
    if isinstance(entry, ClipError):
        raise entry
    if not isinstance(entry, dict):
        raise ClipError("is not a JSON object with file_name and text")
    name, caption = entry.get("file_name"), entry.get("text")
    if not isinstance(name, str) or not isinstance(caption, str):
        raise ClipError("needs file_name and text, both strings")
    if len(caption.encode(errors="replace")) > MAX_CAPTION_BYTES:
        raise ClipError(f"the caption is longer than {MAX_CAPTION_BYTES:,} bytes")
    # The name is only compared with the clips found, so no path from a metadata file is ever opened.
    video = Path(os.path.normpath(folder / name))
    if not video.is_relative_to(root) or (video in videos and not _stays_within(video, root)):
        raise ClipError(f"{_printable(name)} is outside the clips' folder")
    if video not in videos:
        raise ClipError(f"{_printable(name)} is not among the clips of this folder")
    return video, caption.strip()


def _stays_within(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a symlink loop
        return False


def _entries(file: Path) -> Iterator[tuple[int, object]]:
    """Line numbers and entries of a metadata file; for a line that cannot be read, the entry is a ClipError."""
    text = _read_text(file, MAX_METADATA_BYTES)
    if file.suffix == ".csv":
        yield from _csv_entries(text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, ClipError("is not JSON")


def _csv_entries(text: str) -> Iterator[tuple[int, object]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        missing = {"file_name", "text"} - set(rows.fieldnames or ())
        if missing:
            raise ClipError(f"has no column {' and no column '.join(sorted(missing))}")
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise ClipError(f"cannot be read beyond line {rows.line_num}: {error}") from error


def _read_text(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ClipError(f"{_printable(path.name)} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise ClipError(f"{_printable(path.name)} is larger than {limit:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClipError(f"{_printable(path.name)} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def _names(paths: list[Path], root: Path) -> list[str]:
    return [_name(path, root) for path in paths]


def _name(path: Path, root: Path) -> str:
    return _printable(path.relative_to(root).as_posix())


def _printable(name: str) -> str:
    """`name` on one line, with control characters and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
