"""The commands under the rules of Windows, which `windows_rules` enforces, with output in its cp1252."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import windows_rules

from crepa_cli.demo import demo_files
from crepa_cli.report.metrics import read_metrics

pytestmark = pytest.mark.skipif(not windows_rules.NEEDS.exists(), reason="the rules are enforced on Linux alone")
CREPA = [sys.executable, windows_rules.__file__]
FEW_STEPS = ["--steps", "2", "--output", "run", "--set", "validation.every=2", "--set", "validation.steps=2"]
FEW_STEPS += ["--set", "validation.frames=9", "--set", "train.batch_size=1"]
KEEP_ONE = ["--set", "checkpoints.every=1", "--set", "checkpoints.keep=1"]


def run(folder: Path, *arguments: str) -> str:
    """What a command prints that has to end well."""
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    command = [*CREPA, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="cp1252", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_and_resume(folder: Path, family: str) -> None:
    """With a clip that cannot be read, whose name cp1252 lacks."""
    unreadable = folder / demo_files(family, "t2v").clips / "клип.mp4"
    unreadable.parent.mkdir(parents=True)
    unreadable.touch()
    told = run(folder, "train", "--profile", "t2v", "--model", family, "--demo", "--plain", *FEW_STEPS, *KEEP_ONE)
    assert r"skipped \u043a\u043b\u0438\u043f.mp4: " in told
    run(folder, "train", "--resume", "--output", "run", "--plain", "--steps", "3")
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["step-000003"]
    assert [line["step"] for line in read_metrics(folder / "run/metrics.jsonl")] == [0, 1, 2]
    assert all(line["peak_memory_bytes"] > 2**27 for line in read_metrics(folder / "run/metrics.jsonl"))
    assert (folder / "run/weights/pytorch_lora_weights.safetensors").is_file()
    assert not [path for path in folder.rglob("*") if path.suffix in (".partial", ".tmp")]


@pytest.mark.slow
def test_wan_trains_and_resumes(tmp_path: Path) -> None:
    train_and_resume(tmp_path, "wan")


@pytest.mark.slow
def test_doctor_says_that_training_would_start(demo: Path) -> None:
    """With the lightest settings: each that could be lighter is one more step to predict."""
    light = ["model.dtype=bfloat16", "adapter.rank=4", "train.batch_size=1", "crepa.spatial_align=false"]
    sets = [word for setting in [*light, "data.frames=5", "validation.every=0"] for word in ("--set", setting)]
    assert "Training would start." in run(demo, "doctor", "--profile", "t2v", "--model", "wan", "--demo", *sets)


@pytest.mark.slow
def test_blocks_are_measured(demo: Path) -> None:
    assert "recommended" in run(demo, "probe-blocks", "wan", "--demo")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ltxvideo", "sanavideo"])
def test_another_family_trains_and_resumes(family: str, tmp_path: Path) -> None:
    train_and_resume(tmp_path, family)
