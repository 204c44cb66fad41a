"""The prompts that an evaluation samples videos from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from crepa_cli.data.clips import Clip, ClipError
from crepa_cli.data.images import write_frame
from crepa_cli.data.scan import ClipForm
from crepa_cli.data.video import decode
from crepa_cli.errors import UserError
from crepa_cli.evaluate.videos import CLIPS
from crepa_cli.profile import Profile


class Sampled(NamedTuple):
    """A prompt and, for image to video, the file of the first frame."""

    text: str
    image: str | None = None


def prompts_of_file(path: Path, task: str) -> list[Sampled]:
    """A prompt in each line of a text file; for image to video, a tab and the file of the first frame behind it.

    Raises:
        UserError: if the file cannot be read or holds no prompts, or an image is missing.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from error
    found = [_line(path, number, line, task) for number, line in enumerate(lines, start=1) if line]
    if not found:
        raise UserError(f"--prompts {path}: it holds no prompts; write one in each line")
    return list(dict.fromkeys(found))


def _line(path: Path, number: int, line: str, task: str) -> Sampled:
    text, _, image = (part.strip() for part in line.partition("\t"))
    if task == "t2v":
        return Sampled(line)
    if not image:
        raise UserError(
            f"--prompts {path}, line {number}: image to video starts from an image; write its file behind the prompt, "
            "after a tab"
        )
    return Sampled(text, image)


def prompts_of_run(profile: Profile, clips: Sequence[Clip], output: Path) -> list[Sampled]:
    """The prompts of the run's validation, then captions up to `CLIPS` prompts in all.

    For image to video, the first frames of these clips are written to the output.

    Raises:
        UserError: if there are neither, or a first frame cannot be written.
    """
    validation, form = profile.validation, ClipForm.of(profile.data)
    images = validation.images or (None,) * len(validation.prompts)
    found = {text: Sampled(text, image) for text, image in zip(validation.prompts, images, strict=True)}
    for clip in clips:
        if len(found) >= CLIPS:
            break
        if clip.caption not in found:
            image = _first_frame(clip, form, output) if profile.model.task == "i2v" else None
            found[clip.caption] = Sampled(clip.caption, image)
    if not found:
        raise UserError("no prompts: the run has none, and its clips are not there; name a file with --prompts")
    return list(found.values())


def _first_frame(clip: Clip, form: ClipForm, output: Path) -> str:
    path = output / "first-frames" / f"{clip.path.stem}.png"
    try:
        frame = decode(clip.path, frames=1, fps=form.fps, width=form.width, height=form.height)[0]
    except ClipError as error:
        raise UserError(f"{clip.path} {error}") from error
    write_frame(path, frame)
    return str(path)
