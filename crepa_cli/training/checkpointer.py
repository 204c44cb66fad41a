"""The checkpointer: saves what is trained while a run goes on."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from crepa_cli.events import CheckpointSaved
from crepa_cli.runs.folder import RunFolder
from crepa_cli.training.checkpoints import checkpoint_path, remove_old_checkpoints, write_checkpoint
from crepa_cli.training.experts import Experts


class Checkpointer:
    """Saves checkpoints into a run's folder and keeps the newest `keep` of them.

    Args:
        run: the run's folder.
        keep: how many checkpoints stay.
        accelerator: whose main process writes.
    """

    def __init__(self, run: RunFolder, keep: int, accelerator: Accelerator) -> None:
        self.run = run
        self.keep = keep
        self.accelerator = accelerator

    def save(self, experts: Experts, progress: dict[str, Any]) -> CheckpointSaved:
        """Save the learners and the trainer's `progress` after its `step`; every process has to call this.

        Raises:
            UserError: if the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        path = checkpoint_path(self.run.checkpoints, progress["step"])
        snapshots = {name: expert.learner.snapshot(progress) for name, expert in experts.items()}
        if self.accelerator.is_main_process:
            write_checkpoint(path, snapshots)
            remove_old_checkpoints(path, self.keep)
        return CheckpointSaved(progress["step"], path)
