"""Finding the clips of a training set and their captions.

File names and captions come from anywhere: they are read as data, never followed out of the clips' folder.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crepa_cli.errors import UserError
from crepa_cli.profile import Data

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION_BYTES = 1_000_000
MAX_METADATA_BYTES = 200_000_000


class ClipError(Exception):
    """A clip that cannot be used. The message is the reason alone, without the clip's name."""


@dataclass(frozen=True, order=True)
class Clip:
    """A video file (absolute path) and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True, order=True)
class SkippedClip:
    """A clip, caption or metadata line that is left out: its name relative to the clips' folder, and why.

    Both are safe to print: control characters of hostile names are escaped.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class ClipScan:
    """What a folder holds: usable clips and what was skipped, each in sorted order."""

    clips: list[Clip]
    skipped: list[SkippedClip]


def clips_folder(data: Data) -> Path:
    """The folder of clips that the settings name.

    Raises:
        UserError: if they name none.
    """
    if data.path is None:
        raise UserError("no clips: name their folder with --data DIR, or as path in [data] of crepa.toml")
    return Path(data.path)


def find_clips(folder: Path) -> ClipScan:
    """Find the video files of `folder` and its sub-folders, each with its caption.

    A caption is the text of `clip.txt` beside `clip.mp4`, or else the `text` that a `metadata.jsonl` or
    `metadata.csv` gives for the clip's `file_name`, relative to that metadata file. Hidden files and folders
    are not looked at. A clip or a metadata line that cannot be used is in the scan's `skipped`.

    Raises:
        UserError: there is no such folder, or it holds no video file at all.
    """
    root = _existing(folder)
    videos, metadata, skipped = _walk(root)
    if not videos:
        suffixes = ", ".join(suffix[1:] for suffix in VIDEO_SUFFIXES)
        raise UserError(
            f"No clip in {_printable(str(folder))}: it and its sub-folders hold no file that ends in {suffixes}. "
            "Each clip needs a caption: clip.txt beside clip.mp4, or metadata.jsonl with file_name and text."
        )
    captions = _metadata_captions(root, metadata, videos, skipped)
    clips = []
    for video in videos:
        try:
            clips.append(Clip(video, _caption(video, captions)))
        except (ClipError, OSError) as error:
            skipped.append(SkippedClip(_name(video, root), str(error)))
    return ClipScan(sorted(clips), sorted(skipped))


def file_digest(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal.

    Raises:
        ClipError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ClipError(f"cannot be read: {error.strerror}") from error


def _existing(folder: Path) -> Path:
    try:
        root = folder.resolve()
        problem = None if root.is_dir() else "is not a folder" if root.exists() else "does not exist"
    except (OSError, RuntimeError, ValueError) as error:  # no permission, a loop of links, a null character
        problem = f"cannot be opened: {error}"
    if problem:
        raise UserError(f"The clips' folder {_printable(str(folder))} {problem}. Name a folder of video files.")
    return root


def _walk(root: Path) -> tuple[list[Path], list[Path], list[SkippedClip]]:
    """Video files, metadata files and folders that cannot be listed; links to folders are not followed."""
    videos: list[Path] = []
    metadata: list[Path] = []
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
    return sorted(videos), sorted(metadata), skipped


def _caption(video: Path, captions: dict[Path, str]) -> str:
    if not video.is_file():
        raise ClipError("is not a regular file, or is a link to nothing")
    beside = video.with_suffix(".txt")
    if beside.is_file():
        caption = _read_text(beside, MAX_CAPTION_BYTES).strip()
    elif video in captions:
        caption = captions[video]
    else:
        raise ClipError(
            f"has no caption: write it in {_printable(beside.name)} beside the clip, or add the clip to metadata.jsonl"
        )
    if not caption:
        raise ClipError("has an empty caption: say in a sentence what the clip shows")
    return caption


def _metadata_captions(
    root: Path, metadata: list[Path], videos: list[Path], skipped: list[SkippedClip]
) -> dict[Path, str]:
    """The caption of each clip that the metadata files name; faults go to `skipped` by file and line."""
    captions: dict[Path, str] = {}
    known = set(videos)
    for file in metadata:
        try:
            for line, entry in _entries(file):
                try:
                    video, caption = _entry(entry, file.parent, root, known)
                    if captions.setdefault(video, caption) != caption:
                        raise ClipError(f"{_name(video, root)} has another caption already, which is kept")
                except ClipError as error:
                    skipped.append(SkippedClip(f"{_name(file, root)}, line {line}", str(error)))
        except ClipError as error:
            skipped.append(SkippedClip(_name(file, root), str(error)))
    return captions


def _entry(entry: object, folder: Path, root: Path, videos: set[Path]) -> tuple[Path, str]:
    """The clip that a metadata entry names, and its caption."""
    if isinstance(entry, ClipError):
        raise entry
    if not isinstance(entry, dict):
        raise ClipError("is not an object with file_name and text")
    name, caption = entry.get("file_name"), entry.get("text")
    if not isinstance(name, str) or not isinstance(caption, str):
        raise ClipError("needs file_name and text, both strings")
    if len(caption.encode(errors="replace")) > MAX_CAPTION_BYTES:
        raise ClipError(f"the caption is longer than {MAX_CAPTION_BYTES:,} bytes")
    # The name is compared with the clips that were found, so no path out of a metadata file is ever opened.
    video = Path(os.path.normpath(folder / name))
    if not video.is_relative_to(root) or (video in videos and not _stays_within(video, root)):
        raise ClipError(f"{_printable(name)} leaves the clips' folder")
    if video not in videos:
        raise ClipError(f"{_printable(name)} is not among the clips of this folder")
    return video, caption.strip()


def _stays_within(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a loop of links
        return False


def _entries(file: Path) -> Iterator[tuple[int, object]]:
    """Line numbers and entries of a metadata file; a line that cannot be read is a ClipError in an entry's place."""
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
        raise ClipError(f"cannot be read from line {rows.line_num} on: {error}") from error


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


def _name(path: Path, root: Path) -> str:
    return _printable(path.relative_to(root).as_posix())


def _printable(name: str) -> str:
    """`name` on one line, with what a terminal would act on or cannot show in escaped form."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
