"""Several sources of clips: their forms, captions and shares, datasets of the Hub, and a run on all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import OpenTiny
from hub_stub import HubStub
from PIL import Image
from safetensors.torch import load_file
from test_families import TASKS

from crepa_cli import api
from crepa_cli.data.buckets import Bucket
from crepa_cli.data.cache import cache_folder
from crepa_cli.data.scan import PreparedClip
from crepa_cli.data.sources import clips_here, dataset_needs, scan_sources
from crepa_cli.data.video import write_video
from crepa_cli.doctor.clips import describe_sources
from crepa_cli.errors import UserError
from crepa_cli.events import Event, Notice, StepDone, drained
from crepa_cli.hub import question
from crepa_cli.hub.download import download
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.profile import DataSettings, Profile
from crepa_cli.runs.checks import family_mistakes
from crepa_cli.runs.sources import commits, keep_commits
from crepa_cli.settings import resolve

WEIGHTS = "weights/pytorch_lora_weights.safetensors"
FPS = 16


def write_clips(folder: Path, *lengths: int) -> None:
    """Videos of some numbers of frames and an image for each length of 1, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, frames in enumerate(lengths):
        shades = (torch.arange(frames) * 9 + 40 * index).byte().view(-1, 1, 1, 1).expand(-1, 3, 64, 96)
        path = folder / f"{index}-{frames}.{'mp4' if frames > 1 else 'png'}"
        if frames > 1:
            write_video(path, shades, FPS)
        else:
            Image.fromarray(shades[0].permute(1, 2, 0).numpy()).save(path)
        path.with_suffix(".txt").write_text(f"clip {index} of {frames}")


def settings(**keys: object) -> DataSettings:
    return DataSettings.model_validate({"width": 96, "height": 64, "frames": 9, "fps": float(FPS), **keys})


def found(data: DataSettings, open_tiny: OpenTiny) -> list[PreparedClip]:
    return drained(scan_sources(open_tiny("wan", "t2v"), data), lambda _: None)


def test_each_source_has_its_form_and_its_captions(tmp_path: Path, open_tiny: OpenTiny) -> None:
    write_clips(tmp_path / "a", 12)
    write_clips(tmp_path / "b", 12, 1)
    data = settings(
        sources=[
            {"path": str(tmp_path / "a")},
            {"path": str(tmp_path / "b"), "caption_prefix": "ohwx,", "width": 48, "height": 32, "frames": 5},
        ]
    )
    clips = found(data, open_tiny)
    assert [(clip.source, clip.bucket, clip.clip.caption) for clip in clips] == [
        (0, Bucket(9, 64, 96), "clip 0 of 12"),
        (1, Bucket(5, 32, 48), "ohwx, clip 0 of 12"),
        (1, Bucket(1, 32, 48), "ohwx, clip 1 of 1"),
    ]
    assert [clip.caption for clip in clips_here(data)] == [clip.clip.caption for clip in clips]
    assert cache_folder(data) == tmp_path / "a/.crepa-cache"
    sources = [one.model_copy(update={"weight": weight}) for one, weight in zip(data.sources, (3, 1), strict=True)]
    weighted = data.model_copy(update={"sources": tuple(sources)})
    assert describe_sources(clips, weighted).splitlines() == [
        f"{tmp_path / 'a'}: 1 clip, 75.0% of those drawn",
        f"{tmp_path / 'b'}: 2 clips, 25.0% of those drawn",
    ]
    assert "33.3%" in describe_sources(clips, data)


def test_a_single_folder_is_the_only_source(tmp_path: Path, open_tiny: OpenTiny) -> None:
    write_clips(tmp_path, 12)
    source = {"path": str(tmp_path)}
    assert found(settings(**source), open_tiny) == found(settings(sources=[source]), open_tiny)
    with pytest.raises(UserError, match="no clips: give their folder"):
        found(settings(), open_tiny)


def profile_of(open_tiny: OpenTiny, tiny_dinov2: Path, **more: object) -> Profile:
    values: dict[str, object] = {
        "model.family": "wan",
        "model.checkpoint": open_tiny("wan", "t2v").base.name,
        "model.dtype": "float32",
        "data.width": 96,
        "data.height": 64,
        "data.frames": 9,
        "data.fps": FPS,
        "crepa.encoder": str(tiny_dinov2),
        "crepa.encoder_image_size": 56,
        "adapter.rank": 4,
        "train.batch_size": 2,
        "validation.every": 0,
    }
    return api.resolve("t2v", values | more).profile


def test_the_demo_has_clips_of_its_own_beside_sources_in_a_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crepa.toml").write_text('[[data.sources]]\npath = "mine"\n')
    monkeypatch.chdir(tmp_path)
    (source,) = resolve("t2v", {"model.family": "wan"}, demo=True).profile.data.all_sources
    assert source.name != "mine"


def test_sizes_of_sources_are_checked_and_the_largest_is_predicted(open_tiny: OpenTiny, tiny_dinov2: Path) -> None:
    sources = [{"path": "a", "width": 100, "frames": 6}, {"path": "b", "height": 128}]
    profile = profile_of(open_tiny, tiny_dinov2, **{"data.sources": sources})
    family = open_tiny("wan", "t2v")
    mistakes = family_mistakes(family, profile)
    assert len(mistakes) == 2
    assert mistakes[0].startswith("data.sources: the width of a = 100: wan takes multiples of 16")
    assert mistakes[1].startswith("data.sources: the frames of a = 6: wan takes one frame more than a multiple of 4")
    assert form_bucket(profile, family) == Bucket(9, 128, 96)


def test_a_dataset_of_the_hub_brings_clips_and_captions_and_nothing_else(
    stub: HubStub, tmp_path: Path, open_tiny: OpenTiny, tiny_dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clips(tmp_path / "local/train", 12, 1)
    (tmp_path / "local/train/0-12.txt").unlink()
    line = {"file_name": "0-12.mp4", "text": "from the metadata"}
    (tmp_path / "local/train/metadata.jsonl").write_text(json.dumps(line))
    decoys = dict.fromkeys(("load.py", "data.pkl", "train/model.bin", "data.parquet"), b"nobody runs this")
    published = stub.add("datasets/owner/clips", tmp_path / "local", decoys=decoys)
    data = settings(sources=[{"hub": "owner/clips", "caption_prefix": "ohwx"}])
    events: list[Event] = []
    drained(download(dataset_needs(data)), events.append)
    clips = found(data, open_tiny)
    assert [clip.clip.caption for clip in clips] == ["ohwx from the metadata", "ohwx clip 1 of 1"]
    here = {path.name for path in (tmp_path / "hub").rglob("*") if path.is_symlink()}
    assert here == {"0-12.mp4", "1-1.png", "1-1.txt", "metadata.jsonl"}
    assert cache_folder(data) == Path(".crepa-cache")

    profile = profile_of(open_tiny, tiny_dinov2, **{"data.sources": [{"hub": "owner/clips"}]})
    pinned = commits(profile)["data.sources"]
    assert isinstance(pinned, tuple)
    assert [source.revision for source in pinned] == [published.head]
    published.commits.append({})
    question.ask_anew()
    saved = profile.model_copy(update={"data": profile.data.model_copy(update={"sources": pinned})})
    assert keep_commits(saved, profile).data.sources == pinned, "a resumed run stays at its commit"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    question.ask_anew()
    assert not drained(download(dataset_needs(saved.data)), events.append)
    with pytest.raises(UserError, match="owner/gone is not on this machine"):
        drained(download(dataset_needs(settings(sources=[{"hub": "owner/gone"}]))), events.append)


def test_a_dataset_that_does_not_exist_or_holds_no_clips_is_named(stub: HubStub, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local/data.parquet").write_bytes(b"x")
    stub.add("datasets/owner/table", tmp_path / "local")
    reasons = {
        "owner/gone": "the Hub has no dataset owner/gone",
        "owner/table": "has no file that ends in",
        "no id": "not the Hub id",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            drained(download(dataset_needs(settings(sources=[{"hub": name}]))), lambda _: None)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_a_run_on_videos_of_all_lengths_images_and_two_sources_resumes_bit_by_bit(
    name: str, task: str, tmp_path: Path, open_tiny: OpenTiny, tiny_dinov2: Path
) -> None:
    family = open_tiny(name, task)
    shorter, longer = family.frame_multiple + 1, 2 * family.frame_multiple + 1
    write_clips(tmp_path / "a", shorter, longer, longer + 3, 2 * longer, 1)
    write_clips(tmp_path / "b", 1, 1, shorter)
    (tmp_path / "b/0-1.txt").write_text("one caption\nanother one")
    sources = [
        {"path": str(tmp_path / "a"), "weight": 3.0},
        {"path": str(tmp_path / "b"), "weight": 1.0, "caption_prefix": "ohwx", "frames": shorter},
    ]
    flags: dict[str, object] = {
        "model.family": name,
        "model.task": task,
        "model.checkpoint": family.base.name,
        "data.sources": sources,
        "data.sampling": "uniform",
        "data.caption_lines": True,
        "data.width": 2 * family.size_multiple,
        "data.height": 2 * family.size_multiple,
        "data.frames": longer,
        "train.steps": 6,
        "checkpoints.every": 3,
        "crepa.block_index": 0,
    }
    profile = profile_of(open_tiny, tiny_dinov2, **flags)
    losses: list[float] = []
    notices: list[str] = []

    def listen(event: Event) -> None:
        losses.extend([event.loss] if isinstance(event, StepDone) else [])
        notices.extend([event.message] if isinstance(event, Notice) else [])

    whole = api.train(profile, output=tmp_path / "whole", listeners=[listen])
    expected, losses[:] = list(losses), []
    assert any("left out, because" in notice for notice in notices) == (task == "i2v")
    api.train(profile, output=tmp_path / "half", listeners=[listen], should_stop=lambda: len(losses) >= 3)
    stopped = len(losses)
    resumed = api.train(profile, output=tmp_path / "half", listeners=[listen], resume=True)
    assert 3 <= stopped < 6
    assert losses == expected
    first, second = (load_file(run.path / WEIGHTS) for run in (whole, resumed))
    assert all(first[name].equal(second[name]) for name in first)
