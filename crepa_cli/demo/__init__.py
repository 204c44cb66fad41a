"""The demo: a small checkpoint of the chosen family, a small teacher and generated clips, in one folder.

Text to video with Wan starts from a trained model and teacher, and its clips show what that model has not seen yet. All
else starts from random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from safetensors import SafetensorError

from crepa_cli.data.images import write_frame
from crepa_cli.data.video import decode
from crepa_cli.demo.clips import FPS, SIZES, write_demo_clips
from crepa_cli.demo.scenes import write_scenes
from crepa_cli.demo.teacher import write_tiny_dinov2
from crepa_cli.demo.tiny import write_once
from crepa_cli.demo.trained import TRAINED, TRAINED_SETTINGS, write_trained_dinov2, write_trained_wan
from crepa_cli.errors import UserError
from crepa_cli.profile import Profile

FOLDER = Path("crepa-demo")
FIRST_FRAME = FOLDER / "first-frame.png"


@dataclass(frozen=True)
class DemoFiles:
    """Folders of a demo.

    Attributes:
        checkpoint: what is fine-tuned.
        teacher: the encoder.
        clips: to train on, with their captions.
    """

    checkpoint: Path
    teacher: Path
    clips: Path


def demo_files(family: str, task: str) -> DemoFiles:
    """The folders of the demo of a family and task."""
    if (family, task) == TRAINED:
        return DemoFiles(FOLDER / "wan-trained", FOLDER / "dinov2-trained", FOLDER / "scenes")
    return DemoFiles(FOLDER / f"{family}-{task}", FOLDER / "dinov2", FOLDER / "clips")


def demo_settings(family: str, task: str) -> dict[str, dict[str, object]]:
    """Settings of the demo: its files, and a run of a minute that shows warmup, decay and rising similarity."""
    files = demo_files(family, task)
    settings: dict[str, dict[str, object]] = {
        "model": {"checkpoint": str(files.checkpoint), "dtype": "float32"},
        "adapter": {"rank": 8},
        "data": {"path": str(files.clips), "sources": [], "width": 96, "height": 64, "frames": 17, "fps": float(FPS)},
        "train": {"steps": 60, "batch_size": 2, "learning_rate": 2e-3, "lr_warmup_steps": 0},
        "crepa": {"encoder": str(files.teacher), "encoder_image_size": 56, "warmup_steps": 10},
        "validation": {"every": 30, "prompts": ["a red disc drifts over blue stripes"], "steps": 6},
        "checkpoints": {"every": 20},
        "report": {"every": 5},
    }
    if (family, task) == TRAINED:
        for table, values in TRAINED_SETTINGS.items():
            settings[table] |= values
    if task == "i2v":
        settings["validation"]["images"] = [str(FIRST_FRAME)]
    return settings


def write_tiny(family: str, folder: Path, task: str) -> None:
    """Write a tiny checkpoint of a family for a task: random weights in the published layout.

    Each family's is written by `write_tiny(folder, task)` in the module of its name in this package.
    """
    import_module(f"crepa_cli.demo.{family}").write_tiny(folder, task)


def write_demo(profile: Profile) -> None:
    """Write the files that the demo's settings name, unless they exist.

    Raises:
        UserError: if they cannot be written.
    """
    family, task = profile.model.family, profile.model.task
    files, trained = demo_files(family, task), (family, task) == TRAINED
    try:
        if trained:
            write_once(files.checkpoint, write_trained_wan)
            write_once(files.teacher, write_trained_dinov2)
        else:
            write_once(files.checkpoint, lambda folder: write_tiny(family, folder, task))
            write_once(files.teacher, write_tiny_dinov2)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"the files of the demo cannot be written to {FOLDER.absolute()}: {reason}. Run the command in a new "
            "folder of your own, such as after mkdir ~/crepa-demo and cd ~/crepa-demo"
        ) from error
    (write_scenes if trained else write_demo_clips)(files.clips)
    if task == "i2v":
        _write_first_frame(files.clips)


def _write_first_frame(clips: Path) -> None:
    """An image to sample from: the first frame of the first clip."""
    frame = decode(min(clips.glob("*.mp4")), frames=1, fps=FPS, width=SIZES[0].width, height=SIZES[0].height)[0]
    write_frame(FIRST_FRAME, frame)
