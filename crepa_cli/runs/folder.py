"""The folder of a run: the name of every file in it, finding a run to resume, making a new one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from crepa_cli.errors import UserError
from crepa_cli.files import write_whole
from crepa_cli.profile import Profile, dump_toml

RUNS = Path("runs")
"""Parent of the folders of runs whose output is not named."""


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
    def weights(self) -> Path:
        """The exported weights."""
        return self.path / "weights"

    @property
    def trackers(self) -> Path:
        """Files of trackers that log to disk."""
        return self.path / "trackers"

    def samples(self, step: int) -> Path:
        """The folder of the validation videos after `step` steps."""
        return self.path / "samples" / f"step-{step:06d}"

    def create(self, profile: Profile) -> None:
        """Make the folder and write the settings, without the output: repeating the run starts a new folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        elsewhere = profile.model_copy(update={"train": profile.train.model_copy(update={"output": None})})
        write_whole(self.profile, dump_toml(elsewhere).encode())

    @classmethod
    def new(cls, profile: Profile) -> RunFolder:
        """The folder of a new run: `train.output`, or the next free one of `runs/<family>-<task>-<number>`.

        Raises:
            UserError: if `train.output` holds a run already.
        """
        if profile.train.output is None:
            stem = f"{profile.model.family}-{profile.model.task}"
            numbers = [int(match[1]) for path in RUNS.glob("*") if (match := _numbered(stem, path))]
            return cls(RUNS / f"{stem}-{max(numbers, default=0) + 1}")
        run = cls(Path(profile.train.output))
        if run.profile.exists():
            raise UserError(f"{run.path} already holds a run: add --resume to resume it, or choose another --output")
        return run

    @classmethod
    def to_resume(cls, output: str | None) -> RunFolder:
        """The run in `output`, or the one in `runs/` that was written to last.

        Raises:
            UserError: if there is no run.
        """
        if output is None:
            runs = [cls(path.parent) for path in RUNS.glob("*/profile.toml")]
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
