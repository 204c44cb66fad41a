"""The demo: a tiny checkpoint of the chosen family, a tiny teacher and generated clips, in one folder."""

from __future__ import annotations

from pathlib import Path

from crepa_cli.data.demo import write_demo_clips
from crepa_cli.models import load_family
from crepa_cli.models.tiny import write_once
from crepa_cli.profile import Profile
from crepa_cli.teachers.dinov2 import write_tiny_dinov2

FOLDER = Path("crepa-demo")
TEACHER = FOLDER / "dinov2"
CLIPS = FOLDER / "clips"


def demo_settings(family: str, task: str) -> dict[str, dict[str, object]]:
    """What the demo sets: its files, and a run of a minute that shows warmup, decay and rising similarity."""
    return {
        "model": {"checkpoint": str(FOLDER / f"{family}-{task}"), "dtype": "float32"},
        "adapter": {"rank": 8},
        "data": {"path": str(CLIPS), "width": 96, "height": 64, "frames": 17},
        "train": {"steps": 60, "batch_size": 2, "learning_rate": 2e-3},
        "crepa": {"encoder": str(TEACHER), "encoder_image_size": 56, "warmup_steps": 10},
        "validation": {"every": 30, "prompts": ["a red disc drifts over blue stripes"], "steps": 8},
        "checkpoints": {"every": 20},
        "report": {"every": 5},
    }


def write_demo(profile: Profile) -> None:
    """Make the files that the demo's settings name, unless they are there."""
    family, task = profile.model.family, profile.model.task
    write_once(FOLDER / f"{family}-{task}", lambda folder: load_family(family).write_tiny(folder, task))
    write_once(TEACHER, write_tiny_dinov2)
    write_demo_clips(CLIPS)
