"""The folder of a run: the name of every file in it, finding a run to resume, making a new one."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from crepa_cli.errors import UserError
from crepa_cli.files import write_whole
from crepa_cli.models import FINAL_LORA
from crepa_cli.profile import Profile, dump_toml

if TYPE_CHECKING:
    from crepa_cli.models.family import Family

RUNS = Path("runs")
"""Parent of the folders of runs whose output is not named."""


@dataclass(frozen=True)
class Exports:
    """A folder of exported weights and the names in it.

    Attributes:
        folder: its path.
        run: name of the run.
        expert: the one that was trained, of a model with several.
        step: after how many steps the weights were saved; None for those of the whole run.
        transformer: the folder of a full fine-tune for diffusers.
    """

    folder: Path
    run: str
    expert: str | None = None
    step: int | None = None
    transformer: str = "transformer"

    @property
    def title(self) -> str:
        """A name that no other weights have, as ComfyUI keeps those of many runs in one folder."""
        step = None if self.step is None else f"step-{self.step:06d}"
        return "_".join(part for part in (self.run, self.expert, step) if part)

    @property
    def diffusers(self) -> str:
        """The LoRA's file for diffusers; only that of the whole run has the name that diffusers looks for."""
        if self.step is not None:
            return f"{self.title}_diffusers.safetensors"
        return f"{self.expert}_{FINAL_LORA}" if self.expert else FINAL_LORA

    @property
    def comfyui(self) -> str:
        """The file for ComfyUI."""
        return f"{self.title}_comfyui.safetensors"

    def merged(self, component: str | None = None) -> Exports:
        """The folder for the base with the LoRA merged into it.

        Args:
            component: of two experts that are merged, the one that these are for.
        """
        transformer = component or self.transformer
        return replace(self, folder=self.folder / "merged", run=f"{self.run}_merged", transformer=transformer)


@dataclass(frozen=True)
class RunFolder:
    """A folder `path` and the files of the run in it, of which some may not exist yet."""

    path: Path

    @property
    def profile(self) -> Path:
        """The resolved settings; a folder without them holds no run."""
        return self.path / "profile.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object for each optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object for each event but steps and progress."""
        return self.path / "events.jsonl"

    @property
    def curves(self) -> Path:
        """The plot of the metrics."""
        return self.path / "curves.svg"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def checkpoints(self) -> Path:
        """A folder for each checkpoint."""
        return self.path / "checkpoints"

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @property
    def weights(self) -> Path:
        """The exported weights."""
        return self.path / "weights"

    def exports(self, expert: str | None, step: int | None = None) -> Exports:
        """The exported weights of the run's last step, or of an earlier one; see `Exports`."""
        folder = self.weights if step is None else self.weights / f"step-{step:06d}"
        return Exports(folder, self.name, expert, step)

    def all_exports(self, family: Family) -> list[Exports]:
        """The exported weights of the last step, for each transformer that is trained."""
        return [self.exports(one.expert) for one in family.trained.values()]

    @property
    def facts(self) -> Path:
        """Facts on clips and machine for the model card and the headers of exported files, as JSON."""
        return self.path / "facts.json"

    @property
    def trackers(self) -> Path:
        """Files of trackers that log to disk."""
        return self.path / "trackers"

    @property
    def tracker_ids(self) -> Path:
        """The identity of the run in each tracker, by which it is continued."""
        return self.trackers / "runs.json"

    def samples(self, step: int) -> Path:
        """The folder of the validation videos after `step` steps."""
        return self.path / "samples" / f"step-{step:06d}"

    def videos(self, step: int) -> tuple[Path, ...]:
        """The validation videos that were made after `step` steps, in the order of their prompts."""
        return tuple(sorted(self.samples(step).glob("*.mp4")))

    @property
    def first_frames(self) -> Path:
        """The images that validation videos start from, if they were taken from clips."""
        return self.path / "first-frames"

    @property
    def evaluation(self) -> Path:
        """The folder of what `crepa eval` writes."""
        return self.path / "evaluation"

    def sheet(self, step: int) -> Path:
        """Frames of the validation videos after `step` steps, in one image."""
        return self.samples(step) / "sheet.png"

    def write_profile(self, profile: Profile) -> None:
        """Write the settings, without the output: repeating the run starts a new folder."""
        elsewhere = profile.model_copy(update={"train": profile.train.model_copy(update={"output": None})})
        write_whole(self.profile, dump_toml(elsewhere).encode())

    @classmethod
    def next(cls, profile: Profile) -> RunFolder:
        """The folder that a new run would get: `train.output`, or the next of `runs/<family>-<task>-<number>`.

        Raises:
            UserError: if `train.output` already holds a run.
        """
        if profile.train.output is None:
            stem = f"{profile.model.family}-{profile.model.task}"
            numbers = [int(match[1]) for path in RUNS.glob("*") if (match := _numbered(stem, path))]
            return cls(RUNS / f"{stem}-{max(numbers, default=0) + 1}")
        run = cls(Path(profile.train.output))
        if run.profile.exists():
            raise run._taken()
        return run

    @classmethod
    def claim(cls, profile: Profile) -> RunFolder:
        """Make the folder of a new run, with its settings; of several runs that start together, each gets its own.

        Raises:
            UserError: if `train.output` already holds a run, or the folder cannot be made.
        """
        while True:
            run = cls.next(profile)
            try:
                run.path.mkdir(parents=True, exist_ok=profile.train.output is not None)
                # The file decides between two runs with the same output.
                run.profile.touch(exist_ok=False)
            except FileExistsError as error:
                if profile.train.output is not None:
                    raise run._taken() from error
            except OSError as error:
                raise UserError(f"{run.path} cannot be made: {error.strerror}; choose another --output") from error
            else:
                run.write_profile(profile)
                return run

    def remove(self) -> None:
        """Undo `claim`: the folder stays if there is anything else in it."""
        self.profile.unlink(missing_ok=True)
        self.events.unlink(missing_ok=True)
        shutil.rmtree(self.first_frames, ignore_errors=True)
        with suppress(OSError):
            self.path.rmdir()

    def _taken(self) -> UserError:
        return UserError(f"{self.path} already holds a run: add --resume to resume it, or choose another --output")

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The run in a folder.

        Raises:
            UserError: if there is none.
        """
        run = cls(path)
        if not run.profile.is_file():
            raise UserError(f"{path} holds no run: it has no {run.profile.name}")
        return run

    @classmethod
    def to_resume(cls, output: str | None) -> RunFolder:
        """The run in `output`, or the one in `runs/` that was written to last.

        Raises:
            UserError: if there is no run.
        """
        if output is None:
            runs = [cls(path.parent) for path in RUNS.glob("*/profile.toml") if path.stat().st_size]
            if not runs:
                raise UserError("nothing to resume: there is no run in runs/; name its folder with --output")
            return max(runs, key=cls._last_written)
        run = cls(Path(output))
        if not run.profile.is_file():
            raise UserError(f"nothing to resume: {output} holds no run; leave out --resume to start one there")
        return run

    def _last_written(self) -> float:
        return max(path.stat().st_mtime for path in self.path.iterdir())


def _numbered(stem: str, path: Path) -> re.Match[str] | None:
    return re.fullmatch(rf"{re.escape(stem)}-(\d+)", path.name)
