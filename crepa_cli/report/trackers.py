"""TensorBoard, Weights & Biases and the other trackers that Accelerate supports."""

from __future__ import annotations

from dataclasses import asdict

from accelerate import Accelerator

from crepa_cli.events import Event, StepDone, TrainingStarted
from crepa_cli.profile import Profile


class Trackers:
    """A listener that sends every `report.every`-th step to the trackers of the accelerator."""

    def __init__(self, accelerator: Accelerator, profile: Profile) -> None:
        self.accelerator = accelerator
        self.profile = profile

    def __call__(self, event: Event) -> None:
        """Send the settings at the start, then the values of every `report.every`-th step."""
        if isinstance(event, TrainingStarted):
            tables = self.profile.model_dump(by_alias=True)
            settings = {f"{table}.{key}": str(value) for table, keys in tables.items() for key, value in keys.items()}
            self.accelerator.init_trackers("crepa", config=settings)
        elif isinstance(event, StepDone) and event.step % self.profile.report.every == 0:
            values = {name: value for name, value in asdict(event).items() if value is not None}
            self.accelerator.log(values, step=event.step)
