"""Cache entries that are damaged when a run reads them: they are made again, or their clip is left out by name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import OpenTiny
from safetensors.torch import load_file

from crepa_cli import api
from crepa_cli.demo.clips import write_demo_clips
from crepa_cli.events import ClipSkipped, Event, Notice, StepDone
from crepa_cli.profile import Profile
from crepa_cli.runs.folder import RunFolder

WEIGHTS = "weights/pytorch_lora_weights.safetensors"


@pytest.fixture
def profile(open_tiny: OpenTiny, tiny_dinov2: Path, tmp_path: Path) -> Profile:
    """A run of four steps on six clips of three shapes, with dropout, whose random numbers must stay as they are."""
    write_demo_clips(tmp_path / "clips", count=6)
    for path in (tmp_path / "clips").iterdir():
        os.utime(path, (0, 0))
    settings: dict[str, object] = {
        "model.family": "wan",
        "model.checkpoint": open_tiny("wan", "t2v").base.name,
        "model.dtype": "float32",
        "data.path": str(tmp_path / "clips"),
        "data.width": 96,
        "data.height": 64,
        "data.frames": 5,
        "data.fps": 16,
        "crepa.encoder": str(tiny_dinov2),
        "crepa.encoder_image_size": 56,
        "adapter.rank": 4,
        "adapter.dropout": 0.2,
        "train.steps": 4,
        "train.batch_size": 2,
        "validation.every": 0,
    }
    return api.resolve("t2v", settings).profile


def train(profile: Profile, output: Path) -> tuple[RunFolder, list[Event]]:
    events: list[Event] = []
    return api.train(profile, output=output, listeners=[events.append]), events


def damage(paths: Iterable[Path]) -> None:
    """Flip a bit of each file and keep its size and time, so that only reading it shows the damage."""
    for path in paths:
        stat = path.stat()
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_damaged_entries_are_made_again_in_the_run_and_it_ends_with_the_same_weights(
    profile: Profile, tmp_path: Path
) -> None:
    whole, _ = train(profile, tmp_path / "whole")
    cache = tmp_path / "clips/.crepa-cache"
    entries = {path: path.read_bytes() for path in cache.rglob("*.safetensors")}
    damage(entries)
    healed, events = train(profile, tmp_path / "healed")
    said = " ".join(event.message for event in events if isinstance(event, Notice))
    for kind in ("latents", "prompts", "features"):
        assert f"its {kind} in the cache were damaged (its content does not match its checksum)" in said
    first, second = (load_file(run.path / WEIGHTS) for run in (whole, healed))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert sum(path.read_bytes() == content for path, content in entries.items()) >= 3


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_clip_whose_entry_cannot_be_made_again_is_left_out_by_name(profile: Profile, tmp_path: Path) -> None:
    api.fill_cache(profile)
    damage((tmp_path / "clips/.crepa-cache/features").rglob("*.safetensors"))
    lost = sorted((tmp_path / "clips").glob("*.mp4"))[:3]
    for path in lost:
        path.write_bytes(b"x" * path.stat().st_size)
        os.utime(path, (0, 0))
    run, events = train(profile, tmp_path / "run")
    skipped = {event.name: event.reason for event in events if isinstance(event, ClipSkipped)}
    assert skipped.keys() <= {path.name for path in lost}
    assert skipped
    for reason in skipped.values():
        assert "its file has changed since the start of the run" in reason
        assert reason.endswith("is trained on in its place")
    assert sum(isinstance(event, StepDone) for event in events) == 4
    assert (run.path / WEIGHTS).is_file()
