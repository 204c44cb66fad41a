"""The trained Wan and the trained teacher of the demo. tests/benchmarks/pretrain.py has made them."""

from __future__ import annotations

import shutil
from pathlib import Path

from crepa_cli.demo.scenes import PROMPT

TRAINED = ("wan", "t2v")
"""Family and task of the trained model."""
TRAINED_SETTINGS: dict[str, dict[str, object]] = {
    # Strong enough for a new shape to be seen after sixty steps.
    "adapter": {"rank": 16},
    "train": {"batch_size": 4, "learning_rate": 5e-3},
    "crepa": {"lambda": 0.2, "encoder_image_size": 64},
    # The long negative prompt of the published models means nothing to a model that knows thirty words.
    "validation": {"prompts": [PROMPT], "steps": 8, "negative_prompt": "", "guidance_scale": 4.0},
}
"""Settings of its demo that differ from those of random weights."""
WEIGHTS = Path(__file__).parent / "weights"


def write_trained_wan(folder: Path) -> None:
    """Write the trained checkpoint of Wan 2.1, which generates scenes, in the published layout."""
    _copy("wan", folder)


def write_trained_dinov2(folder: Path) -> None:
    """Write the trained DINOv2, which knows the scenes from single frames, in the published layout."""
    _copy("dinov2", folder)


def _copy(part: str, folder: Path) -> None:
    # Contents alone: where the package is read-only, its files' permissions would be, too.
    shutil.copytree(WEIGHTS / part, folder, copy_function=shutil.copyfile)
