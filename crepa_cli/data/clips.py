"""Finds the clips of a training set and their captions.

File names and captions are untrusted: they are read as data and never followed out of the clips' folder.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crepa_cli.data.index import FileState, Index, Known, now, settled
from crepa_cli.errors import UserError, counted, listed
from crepa_cli.profile import DataSettings

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".wmv", ".asf", ".flv"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".gif", ".webp"),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CLIP_SUFFIXES = tuple(dict.fromkeys((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)))
CAPTION_SUFFIX = ".txt"
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION_BYTES = 1_000_000
MAX_METADATA_BYTES = 200_000_000


class ClipError(Exception):
    """A clip that cannot be used. The message is only the reason, without the clip's name."""


@dataclass(frozen=True, order=True, slots=True)
class Clip:
    """A video or image file (absolute path) and its captions, of which there is at least one."""

    path: Path
    captions: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]


@dataclass(frozen=True, order=True)
class SkippedClip:
    """A skipped clip, caption or metadata line: its name relative to the clips' folder, and the reason.

    Both are safe to print: control characters in hostile names are escaped.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class ClipScan:
    """The contents of a folder: usable clips, skipped ones, and the names of files of other kinds, each sorted.

    `states` has the state of each clip's file.
    """

    clips: list[Clip]
    states: list[FileState]
    skipped: list[SkippedClip]
    left_out: list[str]


@dataclass
class _Files:
    """The files of a folder by kind, by their absolute paths, and what cannot be listed or used.

    The state of a clip is None if it is no regular file. Symlinks are among the `links` too.
    """

    clips: dict[str, FileState | None] = field(default_factory=dict)
    captions: dict[str, FileState] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)
    metadata: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    skipped: list[SkippedClip] = field(default_factory=list)


def clips_folder(data: DataSettings) -> Path:
    """The folder of clips named in the settings: of several, the first one; the current folder if all are on the Hub.

    Raises:
        UserError: if the settings name none.
    """
    if not data.all_sources:
        raise UserError("no clips: give their folder with --data DIR, or as path in [data] of crepa.toml")
    return Path(next((source.path for source in data.all_sources if source.path is not None), ""))


def find_clips(folder: Path, index: Index | None = None, *, caption_lines: bool = False) -> ClipScan:
    """Find the video and image files in `folder` and its subfolders, each with its captions.

    The caption of `clip.mp4` is the text of `clip.txt` next to it, or else the `text` that a `metadata.jsonl` or
    `metadata.csv` gives for its `file_name`, relative to that metadata file. A list of texts in `metadata.jsonl` are
    several captions, and with `caption_lines` so are the lines of a text. Hidden files and folders are ignored.
    Clips and metadata lines that cannot be used are listed in the result's `skipped`, files that are neither clips nor
    captions in `left_out`. Captions that the `index` knows are not read again.

    Raises:
        UserError: if the folder does not exist or contains no clip.
    """
    root = _existing(folder)
    files = _listed_files(root)
    if not files.clips:
        raise _no_clips(folder, _names(files.left_out, root))
    beside = _captions_beside(files, index)
    captions = _metadata_captions(root, files)
    found = ClipScan([], [], files.skipped, _names(files.left_out, root))
    for video, state in files.clips.items():
        try:
            if state is None:
                raise ClipError("is not a regular file, or is a broken symlink")
            texts = _texts(video, beside, captions)
            found.clips.append(Clip(Path(video), _captions(texts, lines=caption_lines)))
            found.states.append(state)
        except ClipError as error:
            found.skipped.append(SkippedClip(_name(Path(video), root), str(error)))
    found.skipped.sort()
    return found


def check_clips(folder: Path) -> None:
    """Check that `find_clips` would find a clip, without reading captions.

    Raises:
        UserError: if the folder does not exist or contains no clip.
    """
    root = _existing(folder)
    if not any(_suffix(entry.name) in CLIP_SUFFIXES for entry in _walk(str(root), _Files(), root)):
        raise _no_clips(folder, _names(_listed_files(root).left_out, root))


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
    suffixes = ", ".join(suffix[1:] for suffix in CLIP_SUFFIXES)
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
        raise UserError(f"The clips' folder {_printable(str(folder))} {problem}. Give a folder of videos or images.")
    return root


def _listed_files(root: Path) -> _Files:
    files = _Files()
    for entry in _walk(str(root), files, root):
        suffix = _suffix(entry.name)
        if entry.name in METADATA_NAMES:
            files.metadata.append(Path(entry.path))
        elif suffix in CLIP_SUFFIXES:
            files.clips[entry.path] = _state(entry)
            if entry.is_symlink():
                files.links.add(entry.path)
        elif suffix != CAPTION_SUFFIX:
            files.left_out.append(Path(entry.path))
        elif state := _state(entry):
            files.captions[entry.path] = state
    return files


def _walk(folder: str, files: _Files, root: Path) -> Iterator[os.DirEntry[str]]:
    """The files of a folder and its subfolders, in the order of the paths; folders that cannot be listed are skipped.

    Symlinks to folders are not followed.
    """
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        files.skipped.append(SkippedClip(_name(Path(folder), root), f"cannot be listed: {error.strerror}"))
        return
    for entry in sorted(shown, key=lambda entry: os.path.normcase(entry.name)):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, files, root)
        elif not _is_folder(entry):
            yield entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symlink loop
        return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (a Path for every file takes ten times as long)


def _state(entry: os.DirEntry[str]) -> FileState | None:
    """The state of a file; None if it is no regular file."""
    try:
        return FileState.of(entry.stat()) if entry.is_file() else None
    except OSError:
        return None


def _captions_beside(files: _Files, index: Index | None) -> dict[str, str | ClipError]:
    """The text of each caption file, or why it cannot be read; those that are not in the index are read."""
    names, started = list(files.captions), now()
    captions: dict[str, str | ClipError] = {}
    read: list[tuple[str, Known]] = []
    for name, known in zip(names, index.find(names) if index else [None] * len(names), strict=True):
        state = files.captions[name]
        if known and known.state == state:
            captions[name] = known.content
            continue
        try:
            captions[name] = text = _read_text(Path(name), MAX_CAPTION_BYTES).strip()
        except ClipError as error:
            captions[name] = error
        else:
            if settled(state, started):
                read.append((name, Known(state, text)))
    if index:
        index.put(read)
    return captions


def _texts(
    video: str, beside: Mapping[str, str | ClipError], metadata: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """The texts of a video: the one of the file beside it, or those from metadata."""
    name = f"{os.path.splitext(video)[0]}{CAPTION_SUFFIX}"  # noqa: PTH122 (as above)
    caption = beside.get(name)
    if caption is None and video in metadata:
        return metadata[video]
    if caption is None:
        beside_video = Path(name)
        if not beside_video.is_file():
            shown = _printable(beside_video.name)
            raise ClipError(f"has no caption: write one in {shown} next to the clip, or add it to metadata.jsonl")
        # Its name differs in upper and lower case alone, which is the same file on some systems.
        caption = _read_text(beside_video, MAX_CAPTION_BYTES).strip()
    if isinstance(caption, ClipError):
        raise caption
    return (caption,)


def _captions(texts: tuple[str, ...], *, lines: bool) -> tuple[str, ...]:
    """The captions in some texts: each text, or each of its lines; a line without words is none."""
    if lines:
        texts = tuple(line.strip() for text in texts for line in text.split("\n") if line.strip())
    if not texts or not all(texts):
        raise ClipError("has an empty caption: describe the clip in a sentence")
    return texts


def _metadata_captions(root: Path, files: _Files) -> dict[str, tuple[str, ...]]:
    """The texts of each clip named in the metadata files; mistakes are skipped with file and line."""
    captions: dict[str, tuple[str, ...]] = {}
    for file in files.metadata:
        try:
            for line, entry in _entries(file):
                try:
                    video, caption = _entry(entry, file.parent, root, files)
                    if captions.setdefault(video, caption) != caption:
                        raise ClipError(f"{_name(Path(video), root)} already has another caption, which is kept")
                except ClipError as error:
                    files.skipped.append(SkippedClip(f"{_name(file, root)}, line {line}", str(error)))
        except ClipError as error:
            files.skipped.append(SkippedClip(_name(file, root), str(error)))
    return captions


def _entry(entry: object, folder: Path, root: Path, files: _Files) -> tuple[str, tuple[str, ...]]:
    """The clip named by a metadata entry, and its texts."""
    if isinstance(entry, ClipError):
        raise entry
    if not isinstance(entry, dict):
        raise ClipError("is not a JSON object with file_name and text")
    name, given = entry.get("file_name"), entry.get("text")
    listed_texts = given if isinstance(given, list) else [given]
    texts = [text for text in listed_texts if isinstance(text, str)]
    if not isinstance(name, str) or len(texts) < len(listed_texts):
        raise ClipError("needs file_name and text, both strings; text may be a list of them, for several captions")
    if sum(len(text.encode(errors="replace")) for text in texts) > MAX_CAPTION_BYTES:
        raise ClipError(f"the caption is longer than {MAX_CAPTION_BYTES:,} bytes")
    # The name is only compared with the clips found, so no path from a metadata file is ever opened.
    video = os.path.normpath(folder / name)
    outside = not Path(video).is_relative_to(root)
    if outside or (video in files.links and not _stays_within(Path(video), root)):
        raise ClipError(f"{_printable(name)} is outside the clips' folder")
    if video not in files.clips:
        raise ClipError(f"{_printable(name)} is not among the clips of this folder")
    return video, tuple(text.strip() for text in texts)


def _stays_within(path: Path, root: Path) -> bool:
    # The files of a snapshot in the Hub's cache are links to the blobs of its repository.
    roots = (root, root.parents[1] / "blobs") if root.parent.name == "snapshots" else (root,)
    try:
        return any(path.resolve().is_relative_to(one) for one in roots)
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
