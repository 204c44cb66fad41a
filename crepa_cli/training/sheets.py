"""Contact sheets of validation videos, beside those of step 0 and a training clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property

from PIL import Image
from torch import Tensor

from crepa_cli.data.clips import ClipError
from crepa_cli.data.scan import PreparedClip, clip_name, clip_pixels
from crepa_cli.data.sheet import labeled_row, write_sheet
from crepa_cli.data.video import decode
from crepa_cli.runs.folder import RunFolder


class SampleSheets:
    """Writes a sheet for each validation of a run.

    Args:
        run: the run's folder.
        prompts: the text of each video.
        fps: frames per second of the videos.
        reference: a clip that is trained on, or None.
    """

    def __init__(self, run: RunFolder, prompts: Sequence[str], fps: float, reference: PreparedClip | None) -> None:
        self.run = run
        self.prompts = prompts
        self.fps = fps
        self.reference = reference

    def write(self, step: int, videos: Mapping[int, Tensor]) -> None:
        """Write the sheet after `step` steps, next to the videos, uint8 `[F, 3, H, W]`, by the index of the prompt.

        Each row has frames of one video. A prompt has the video of step 0 above the one of this step. Of files that are
        gone or damaged there is no row.

        Raises:
            UserError: if the disk is full or the folder is not writable.
        """
        rows = []
        for index, frames in sorted(videos.items()):
            first = self._first(index, frames) if step else None
            rows += [
                labeled_row(shown, self.fps, f"step {moment:,}: {self.prompts[index]}")
                for moment, shown in ((0, first), (step, frames))
                if shown is not None
            ]
        write_sheet(self.run.sheet(step), rows, self._reference)

    def _first(self, index: int, frames: Tensor) -> Tensor | None:
        """The video of a prompt at step 0, with as many frames as another one of it."""
        count, _, height, width = frames.shape
        with suppress(ClipError):
            path = self.run.samples(0) / f"{index:02d}.mp4"
            return decode(path, frames=count, fps=self.fps, width=width, height=height)
        return None

    @cached_property
    def _reference(self) -> list[Image.Image]:
        clip = self.reference
        if clip is not None:
            with suppress(ClipError):
                label = f"training clip {clip_name(clip)}: {clip.clip.caption}"
                return [labeled_row(clip_pixels(clip), clip.fps, label)]
        return []


def reference_clip(clips: Sequence[PreparedClip], prompts: Sequence[str]) -> PreparedClip:
    """The clip that sheets show: a video if there is one, with the caption of a prompt if there is one."""
    return min(clips, key=lambda clip: (clip.info.image, clip.clip.caption not in prompts))
