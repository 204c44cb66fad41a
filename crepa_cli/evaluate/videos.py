"""Reading and measuring video files: folders that are compared by the names of their files, and training clips."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from crepa_cli.data.clips import VIDEO_SUFFIXES, Clip, ClipError, file_digest, find_clips
from crepa_cli.data.encoder import load_teacher
from crepa_cli.data.images import is_image
from crepa_cli.data.scan import ClipForm
from crepa_cli.data.video import decode, frames_available, probe, write_video
from crepa_cli.errors import UserError, counted, listed
from crepa_cli.evaluate.result import Column, Evaluation, Row, Video
from crepa_cli.events import ClipSkipped, Event, Notice, Progress
from crepa_cli.measures import Encoder, Flow, measure
from crepa_cli.measures.raft import Raft
from crepa_cli.profile import CrepaSettings

REFERENCE = "training clips"
CLIPS = 8
"""The most training clips that are measured, and the fewest prompts if there are captions for as many."""
INPUT_PATCHES = 16
"""The side of the encoder's input, if the settings make it depend on the model's tokens."""


class Tools(NamedTuple):
    """Tools that measures need beside the frames, and why some are left out."""

    encode: Encoder | None
    flow: Flow | None
    notes: tuple[str, ...]


def load_tools(crepa: CrepaSettings | None, device: torch.device) -> Generator[Event, None, Tools]:
    """Load the teacher of the settings, and the optical flow if torchvision is installed.

    Args:
        crepa: settings of the encoder; None if there is none.
        device: that runs them.

    Raises:
        UserError: if the encoder cannot be loaded.
    """
    encode, flow = None, None
    notes = []
    if crepa is None:
        notes.append("DINOv2 consistency is left out: no settings name an encoder (crepa.encoder)")
    else:
        yield Progress("loading", 0, 1, "the encoder")
        encode = _encoder(crepa, device)
    if find_spec("torchvision") is None:
        notes.append("warping error is left out: torchvision is not installed, which has its optical flow")
    else:
        yield Progress("loading", 0, 1, "the optical flow")
        try:
            flow = Raft.load(device)
        except UserError as error:
            notes.append(f"warping error is left out: {error}")
    for note in notes:
        yield Notice(note)
    return Tools(encode, flow, tuple(notes))


def _encoder(crepa: CrepaSettings, device: torch.device) -> Encoder:
    teacher = load_teacher(crepa, device)
    size = crepa.encoder_image_size
    side = size if isinstance(size, int) else INPUT_PATCHES * teacher.patch_size

    def encode(video: Tensor) -> Tensor:
        return teacher.features((video * 255).round().byte(), (side, side)).float()

    return encode


def measured(
    named: Sequence[tuple[str, Sequence[Path]]], tools: Tools
) -> Generator[Event, None, list[tuple[Video, ...]]]:
    """Measure columns of video files, given by name.

    Raises:
        UserError: names a file that cannot be read.
    """
    total, done = sum(len(paths) for _, paths in named), 0
    columns = []
    for name, paths in named:
        videos = []
        for path in paths:
            yield Progress("measuring", done, total, f"{name}: {path.name}")
            frames, fps = read_video(path)
            videos.append(Video(path, fps, measure(frames.float() / 255, tools.encode, tools.flow)))
            done += 1
        columns.append(tuple(videos))
    yield Progress("measuring", total, total)
    return columns


def read_video(path: Path) -> tuple[Tensor, float]:
    """All frames of a video as they are stored, uint8 `[F, 3, H, W]` of even sides, and how many make a second.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        info = probe(path)
        size = {"width": max(2, info.width // 2 * 2), "height": max(2, info.height // 2 * 2)}
        return decode(path, frames=frames_available(info, info.fps), fps=info.fps, **size), info.fps
    except ClipError as error:
        raise UserError(f"{path} {error}") from error


def compare_folders(
    folders: Sequence[Path], clips: Path | None, crepa: CrepaSettings | None, output: Path
) -> Generator[Event, None, Evaluation]:
    """Compare videos of the same name in several folders; the first is the base.

    Args:
        folders: of videos.
        clips: folder of training clips, the reference; None without any.
        crepa: settings of the encoder; None if there is none.
        output: folder of the evaluation.

    Raises:
        UserError: if a folder has no videos, or none has the name of one in every other folder.
    """
    found = [_videos_in(folder) for folder in folders]
    names = sorted(set(found[0]).intersection(*found))
    if not names:
        raise UserError(
            f"no name of a video is in all of {', '.join(map(str, folders))}: videos are compared with those of the "
            "same name, such as 00.mp4; rename them"
        )
    if others := sorted(set().union(*found) - set(names)):
        yield Notice(f"{counted(len(others), 'video')} left out, not in every folder: {listed(others)}")
    titles = unique_names([folder.resolve().name for folder in folders])
    named = [(title, [videos[name] for name in names]) for title, videos in zip(titles, found, strict=True)]
    reference = []
    if clips is not None:
        first, fps = read_video(named[0][1][0])
        form = ClipForm(first.shape[-1], first.shape[-2], len(first), fps)
        reference = yield from written_clips(chosen_clips(find_clips(clips).clips), form, output)
    tools = yield from load_tools(crepa, device_of_measures())
    columns = yield from measured([*named, (REFERENCE, reference)], tools)
    base, *rest = (Column(title, videos) for title, videos in zip(titles, columns, strict=False))
    return Evaluation(
        rows=tuple(Row(name) for name in names),
        base=base,
        others=tuple(rest),
        reference=Column(REFERENCE, columns[-1]) if reference else None,
        notes=tools.notes,
    )


def device_of_measures() -> torch.device:
    """The accelerator, or the CPU if there is none."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that occurred before."""
    unique: list[str] = []
    for name in names:
        number, title = 2, name
        while title in unique:
            number, title = number + 1, f"{name}-{number}"
        unique.append(title)
    return unique


def chosen_clips(clips: Sequence[Clip]) -> list[Clip]:
    """Up to `CLIPS` videos with different captions, spread over all of them."""
    distinct = list({clip.caption: clip for clip in reversed(clips) if not is_image(clip.path)}.values())[::-1]
    count = min(CLIPS, len(distinct))
    return [distinct[index * len(distinct) // count] for index in range(count)]


def written_clips(clips: Sequence[Clip], form: ClipForm, output: Path) -> Generator[Event, None, list[Path]]:
    """Write clips in the size, the frame rate and at most the length of the other videos, and return the files.

    Raises:
        UserError: if one cannot be written.
    """
    paths = []
    for done, clip in enumerate(clips):
        yield Progress("reference", done, len(clips), clip.path.name)
        try:
            paths.append(_written(clip, form, output))
        except ClipError as error:
            yield ClipSkipped(clip.path.name, str(error))
    yield Progress("reference", len(clips), len(clips))
    return paths


def _written(clip: Clip, form: ClipForm, output: Path) -> Path:
    folder = output / "videos" / REFERENCE.replace(" ", "-")
    shape = f"{form.width}x{form.height}x{form.frames}-{form.fps:.4g}"
    path = folder / f"{clip.path.stem}-{shape}-{file_digest(clip.path)[:8]}.mp4"
    if not path.is_file():
        frames = min(form.frames, frames_available(probe(clip.path), form.fps))
        pixels = decode(clip.path, frames=frames, fps=form.fps, width=form.width, height=form.height)
        write_video(path, pixels, form.fps)
    return path


def _videos_in(folder: Path) -> dict[str, Path]:
    """The video files of a folder by name."""
    if not folder.is_dir():
        raise UserError(f"--videos {folder}: there is no such folder")
    found = {path.name: path for path in sorted(folder.iterdir()) if path.suffix.lower() in VIDEO_SUFFIXES}
    if not found:
        raise UserError(f"--videos {folder}: it holds no file that ends in {', '.join(VIDEO_SUFFIXES)}")
    return found
