"""The demo: a tiny checkpoint of the chosen family, a tiny teacher and generated clips, in one folder."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from safetensors import SafetensorError

from crepa_cli.data.images import write_frame
from crepa_cli.data.video import decode
from crepa_cli.demo.clips import FPS, SIZES, write_demo_clips
from crepa_cli.demo.teacher import write_tiny_dinov2
from crepa_cli.demo.tiny import write_once
from crepa_cli.errors import UserError
from crepa_cli.profile import Profile

FOLDER = Path("crepa-demo")
TEACHER = FOLDER / "dinov2"
CLIPS = FOLDER / "clips"
FIRST_FRAME = FOLDER / "first-frame.png"


def demo_settings(family: str, task: str) -> dict[str, dict[str, object]]:
    """Settings of the demo: its files, and a run of a minute that shows warmup, decay and rising similarity."""
    validation: dict[str, object] = {"every": 30, "prompts": ["a red disc drifts over blue stripes"], "steps": 6}
    if task == "i2v":
        validation["images"] = [str(FIRST_FRAME)]
    return {
        "model": {"checkpoint": str(FOLDER / f"{family}-{task}"), "dtype": "float32"},
        "adapter": {"rank": 8},
        "data": {"path": str(CLIPS), "width": 96, "height": 64, "frames": 17, "fps": float(FPS)},
        "train": {"steps": 60, "batch_size": 2, "learning_rate": 2e-3, "lr_warmup_steps": 0},
        "crepa": {"encoder": str(TEACHER), "encoder_image_size": 56, "warmup_steps": 10},
        "validation": validation,
        "checkpoints": {"every": 20},
        "report": {"every": 5},
    }


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
    try:
        write_once(FOLDER / f"{family}-{task}", lambda folder: write_tiny(family, folder, task))
        write_once(TEACHER, write_tiny_dinov2)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"the files of the demo cannot be written to {FOLDER.absolute()}: {reason}. Run the command in a new "
            "folder of your own, such as after mkdir ~/crepa-demo and cd ~/crepa-demo"
        ) from error
    write_demo_clips(CLIPS)
    if task == "i2v":
        _write_first_frame()


def _write_first_frame() -> None:
    """An image to sample from: the first frame of the first clip."""
    frame = decode(min(CLIPS.glob("*.mp4")), frames=1, fps=FPS, width=SIZES[0].width, height=SIZES[0].height)[0]
    write_frame(FIRST_FRAME, frame)
