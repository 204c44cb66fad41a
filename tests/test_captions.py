"""Clips with several captions: all are encoded, and one is drawn whenever the clip is trained on."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import OpenTiny

from crepa_cli import api
from crepa_cli.data.buckets import Bucket
from crepa_cli.data.cache import Cache, DamagedEntryError
from crepa_cli.data.clips import Clip
from crepa_cli.data.dataset import ClipDataset
from crepa_cli.data.healing import Healing
from crepa_cli.data.prepare import prepare
from crepa_cli.data.scan import ClipForm, PreparedClip, scan
from crepa_cli.data.video import VideoInfo
from crepa_cli.demo import demo_settings
from crepa_cli.demo.clips import write_demo_clips
from crepa_cli.events import ClipSkipped, Event, drained
from crepa_cli.models.family import Family
from crepa_cli.profile import CrepaSettings, Profile
from crepa_cli.training.batches import Batches
from crepa_cli.training.flow import seeded_generator

CPU = torch.device("cpu")
EMPTY, CAPTIONS, CLIPS, STEPS, DROPOUT = 0, 3, 8, 400, 0.1


@pytest.fixture
def dataset(tmp_path: Path) -> ClipDataset:
    """Clips of three captions each but the first, which has one. The tensors of each caption are its number."""
    cache, info = Cache(tmp_path), VideoInfo(9, 32, 32, 8, 1, 0, "", False)
    cache.write("latents", "one", {"latents": torch.zeros(1, 1, 1, 1), "fps": torch.tensor(8.0)})
    for number in range(CAPTIONS + 1):
        cache.write("prompts", str(number), {"prompt_embeds": torch.full((1, 1), number)})
    clips = []
    for index in range(CLIPS):
        keys = tuple(str(number) for number in range(1, 2 if index == 0 else CAPTIONS + 1))
        clip = Clip(Path(f"{index}.mp4"), keys)
        clips.append(PreparedClip(clip, info, Bucket(9, 32, 32), "", 8, prompt_keys=keys, latents_key="one"))
    return ClipDataset(clips, cache, str(EMPTY), torch.float32)


@pytest.fixture
def profile() -> Profile:
    settings = demo_settings("wan", "t2v")
    settings["model"] |= {"family": "wan"}
    settings["data"] |= {"caption_dropout": DROPOUT}
    settings["train"] |= {"batch_size": CLIPS, "seed": 7}
    flat = {f"{table}.{key}": value for table, values in settings.items() for key, value in values.items()}
    return api.resolve("t2v", flat).profile


def drawn(batches: Batches, start: int, steps: int) -> list[list[tuple[str, int]]]:
    """The clips of each step with the numbers of their captions."""
    found = islice(batches.starting_at(start), steps)
    return [list(zip(one.clips, one.tensors["prompt_embeds"].flatten().tolist(), strict=True)) for one in found]


@pytest.mark.usefixtures("fresh_accelerate")
def test_captions_are_drawn_equally_often_by_seed_and_step_and_dropped_as_before(
    dataset: ClipDataset, profile: Profile, open_tiny: OpenTiny
) -> None:
    batches = Batches(dataset, open_tiny("wan", "t2v"), profile, Accelerator(cpu=True), with_features=False)
    steps = drawn(batches, 0, STEPS)
    assert drawn(batches, 90, 10) == steps[90:100]
    several = Counter(number for step in steps for clip, number in step if clip != "0.mp4")
    total = several.total()
    assert total == STEPS * (CLIPS - 1)
    for number in range(CAPTIONS + 1):
        share = DROPOUT if number == EMPTY else (1 - DROPOUT) / CAPTIONS
        assert several[number] / total == pytest.approx(share, abs=0.02)
    for index, step in enumerate(steps):
        dropped = torch.rand(CLIPS, generator=seeded_generator(7, "captions", index)) < DROPOUT
        assert [number == EMPTY for _, number in step] == dropped.tolist()
    assert {number for step in steps for clip, number in step if clip == "0.mp4"} == {EMPTY, 1}


def prepared(family: Family, folder: Path, cache: Cache, events: list[Event]) -> list[PreparedClip]:
    form = ClipForm(96, 64, 5, 16)
    found = scan(family, folder, form, caption_lines=True)
    work = prepare(family, folder, form, None, [""], cache, CPU, torch.float32, scanned=found)
    return drained(work, events.append)


def test_every_line_is_encoded_and_a_damaged_one_is_made_again(
    open_tiny: OpenTiny, tiny_dinov2: Path, tmp_path: Path
) -> None:
    family, cache, events = open_tiny("wan", "t2v"), Cache(tmp_path / "cache"), list[Event]()
    write_demo_clips(tmp_path / "clips", count=1)
    caption = tmp_path / "clips/clip-00.txt"
    caption.write_text("a disc\r\n\na disc turns\n")
    (clip,) = prepared(family, tmp_path / "clips", cache, events)
    assert clip.clip.captions == ("a disc", "a disc turns")
    assert not any(isinstance(event, ClipSkipped) for event in events)
    pipeline = family.load_text_pipeline(torch.float32)
    with torch.no_grad():
        expected = [family.encode_prompt(pipeline, text)["prompt_embeds"] for text in clip.clip.captions]
    for key, embeds in zip(clip.prompt_keys, expected, strict=True):
        assert cache.read("prompts", key)["prompt_embeds"].equal(embeds)
    key = clip.prompt_keys[1]
    path = cache.path("prompts", key)
    path.write_bytes(path.read_bytes()[:-1])
    crepa = CrepaSettings(block_index=1, encoder=str(tiny_dinov2))
    Healing(family, crepa, cache, torch.float32, "float16").heal(DamagedEntryError(path, "prompts", key, "cut"), clip)
    assert cache.read("prompts", key)["prompt_embeds"].equal(expected[1])
