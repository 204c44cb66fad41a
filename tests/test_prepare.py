"""The preparation: what it refuses to store, and what it says while it works."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from conftest import OpenTiny

from crepa_cli.data.cache import Cache
from crepa_cli.data.prepare import ClipForm, PreparedClip, prepare, scan
from crepa_cli.data.video import DECODING_VERSION
from crepa_cli.demo.clips import write_demo_clips
from crepa_cli.errors import UserError
from crepa_cli.events import ClipSkipped, Event, Notice, drained
from crepa_cli.models.family import Family
from crepa_cli.profile import CrepaSettings
from crepa_cli.teachers.dinov2 import Dinov2Teacher

Prepare = Callable[..., tuple[list[PreparedClip], list[Event]]]
VALIDATION = "a red disc, slowly turning"


@pytest.fixture
def family(open_tiny: OpenTiny) -> Family:
    return open_tiny("wan", "t2v")


@pytest.fixture(name="prepared")
def _prepared(family: Family, tiny_dinov2: Path, tmp_path: Path) -> Prepare:
    """Prepares three clips, with a validation prompt, in one cache."""
    write_demo_clips(tmp_path / "clips", count=3)
    crepa = CrepaSettings(block_index=8, encoder=str(tiny_dinov2), encoder_image_size="grid")

    def run(cache: Cache | None = None) -> tuple[list[PreparedClip], list[Event]]:
        events: list[Event] = []
        work = prepare(
            family,
            tmp_path / "clips",
            ClipForm(96, 64, 5, 16),
            crepa,
            [VALIDATION, ""],
            cache or Cache(tmp_path / "cache"),
            torch.device("cpu"),
            torch.float32,
        )
        return drained(work, events.append), events

    return run


def spoiled(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, call: Callable[..., bool]) -> None:
    """Let a model give a NaN in the first tensor of the calls for which `call` is true."""
    original = getattr(owner, method)

    def give_nan(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if call(*arguments):
            tensor = next(iter(result.values())) if isinstance(result, dict) else result
            tensor.view(-1)[-1] = math.nan
        return result

    monkeypatch.setattr(owner, method, give_nan)


def second() -> Callable[..., bool]:
    calls: list[int] = []

    def is_second(*_: Any) -> bool:
        calls.append(0)
        return len(calls) == 2

    return is_second


@pytest.mark.parametrize("kind", ["latents", "features"])
def test_a_clip_whose_tensors_are_not_finite_is_skipped_by_name_and_not_stored(
    kind: str, prepared: Prepare, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, method = (type(family), "encode_clip") if kind == "latents" else (Dinov2Teacher, "features")
    with monkeypatch.context() as patch:
        spoiled(patch, owner, method, second())
        clips, events = prepared()
    skipped = [event for event in events if isinstance(event, ClipSkipped)]
    assert [event.name for event in skipped] == ["clip-01.mp4"]
    assert f"{kind}: computed, and not finite" in skipped[0].reason
    assert [clip.clip.path.name for clip in clips] == ["clip-00.mp4", "clip-02.mp4"]
    assert len(list((tmp_path / "cache" / kind).rglob("*.safetensors"))) == 2
    assert len(prepared()[0]) == 3


def test_a_clip_whose_caption_is_not_finite_is_skipped_by_name(
    prepared: Prepare, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption = (tmp_path / "clips/clip-02.txt").read_text().strip()
    spoiled(monkeypatch, type(family), "encode_prompt", lambda _, text: text == caption)
    clips, events = prepared()
    skipped = [event for event in events if isinstance(event, ClipSkipped)]
    assert [event.name for event in skipped] == ["clip-02.mp4"]
    assert skipped[0].reason.startswith("its caption: prompt_embeds: computed, and not finite")
    assert [clip.clip.path.name for clip in clips] == ["clip-00.mp4", "clip-01.mp4"]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [(VALIDATION, f"the validation prompt '{VALIDATION}'"), ("", "the empty prompt")],
)
def test_a_prompt_that_every_run_needs_is_named(
    prompt: str, named: str, prepared: Prepare, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, type(family), "encode_prompt", lambda _, text: text == prompt)
    with pytest.raises(UserError, match=f"{named} cannot be used: prompt_embeds: computed, and not finite"):
        prepared()


@pytest.mark.parametrize("kind", ["prompts", "latents", "features"])
def test_an_entry_of_an_old_cache_that_is_not_finite_is_made_again(
    kind: str, prepared: Prepare, tmp_path: Path
) -> None:
    prepared()
    cache, damaged = Cache(tmp_path / "cache"), []
    path = next((cache.root / kind).rglob("*.safetensors"))
    good = cache.read(kind, path.stem)
    bad = {name: tensor.clone() for name, tensor in good.items()}
    name = next(name for name in bad if bad[name].ndim and bad[name].is_floating_point())
    bad[name].view(-1)[0] = math.inf
    cache.write(kind, path.stem, bad)
    prepared(Cache(cache.root, on_damage=lambda *damage: damaged.append(damage)))
    assert damaged == [(path, f"{name}: not finite")]
    assert torch.equal(cache.read(kind, path.stem)[name], good[name])


def test_what_changes_in_clips_and_what_is_left_out_is_named_once(family: Family, tmp_path: Path) -> None:
    for name, width, transfer in (("wide.mp4", 256, 1), ("fits.mp4", 96, 1), ("phone.mp4", 96, 18)):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=16)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.color_trc = width, 64, transfer
            for _ in range(5):
                container.mux(stream.encode(av.VideoFrame(width, 64, "yuv420p")))
            container.mux(stream.encode())
        tmp_path.joinpath(name).with_suffix(".txt").write_text("a clip")
    tmp_path.joinpath("photo.heic").touch()
    events: list[Event] = []
    clips = drained(scan(family, tmp_path, ClipForm(96, 64, 5, 16)), events.append)
    wide = next(clip for clip in clips if clip.clip.path.name == "wide.mp4")
    across, down = wide.bucket.width / 256, wide.bucket.height / 64
    assert wide.fit == pytest.approx((down, 1 - across / down))
    assert [event.message for event in events if isinstance(event, Notice)] == [
        "1 file left out, of no kind of video: photo.heic",
        "1 clip in HDR, tone-mapped to BT.709: phone.mp4 (HLG)",
        f"1 clip cropped by more than a tenth: wide.mp4 loses {wide.fit.cropped:.0%} (256x64 scaled by {down:.2f} for "
        f"{wide.bucket.width}x{wide.bucket.height})",
    ]


def test_pixels_of_another_decoding_have_other_entries(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = prepared()
    monkeypatch.setattr("crepa_cli.data.prepare.DECODING_VERSION", DECODING_VERSION + 1)
    after, _ = prepared()
    for one, other in zip(before, after, strict=True):
        assert one.prompt_key == other.prompt_key
        assert not {one.latents_key, one.features_key} & {other.latents_key, other.features_key}
