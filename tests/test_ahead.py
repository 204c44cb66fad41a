"""Threads around the models of the preparation: what they make, in which order, and whose mistakes they report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import OpenTiny

from crepa_cli.data import ahead, prepare
from crepa_cli.data.ahead import Models, made_ahead, read_ahead
from crepa_cli.data.cache import Cache
from crepa_cli.data.clips import ClipError
from crepa_cli.data.encoder import load_encoding_vae, load_teacher, teacher_input
from crepa_cli.data.scan import ClipForm, PreparedClip, clip_pixels
from crepa_cli.data.stages import Later, each_later
from crepa_cli.data.video import decode
from crepa_cli.errors import UserError
from crepa_cli.events import ClipSkipped, Event, Progress, drained
from crepa_cli.models.family import Family
from crepa_cli.profile import CrepaSettings

CPU = torch.device("cpu")


def test_items_are_read_in_order_within_the_bound_and_an_error_comes_at_its_item() -> None:
    started: list[int] = []

    def read(item: int) -> int:
        started.append(item)
        if item == 3:
            raise ClipError("broken")
        return item * item

    items, third = list(range(6)), ahead.AHEAD_BYTES // 3
    with read_ahead(items, read, lambda _: third) as following:
        found = []
        for item in items:
            try:
                found.append(following())
            except ClipError:
                found.append(-1)
            assert max(started) <= item + 3
    assert found == [0, 1, 4, -1, 16, 25]


@pytest.mark.parametrize("small", [True, False])
def test_copies_of_a_small_model_make_the_same_in_the_same_order(*, small: bool) -> None:
    copies = [torch.nn.Linear(2, 2) for _ in range(2 if small else 1)]
    for copy in copies:
        torch.nn.init.constant_(copy.weight, 1)
        torch.nn.init.zeros_(copy.bias)

    def make(model: torch.nn.Linear, item: int, read: torch.Tensor) -> tuple[int, torch.Tensor]:
        return item, model(read)

    items = list(range(40))
    with made_ahead(
        Models(copies, small), items, lambda item: torch.full((1, 2), float(item)), make, lambda _: 8
    ) as one:
        for item in items:
            of, made = one(item)
            assert of == item
            assert made.tolist() == [[2 * item, 2 * item]]
    assert torch.get_num_threads() == 1


def test_what_ends_later_is_reported_for_its_own_item_and_a_users_mistake_stops_the_stage() -> None:
    def work(item: int) -> Later[int]:
        def finish() -> int:
            if item == 1:
                raise ClipError("not finite")
            if item == 4:
                raise UserError("the disk is full")
            return 10 * item

        if item == 2:
            raise ClipError("cut off")
        return Later(finish)

    events: list[Event] = []
    assert drained(each_later("latents", range(4), work, name=str), events.append) == [0, 30]
    assert [event.name for event in events if isinstance(event, ClipSkipped)] == ["1", "2"]
    assert Progress("latents", 4, 4) in events
    events.clear()
    with pytest.raises(UserError, match="the disk is full"):
        drained(each_later("latents", range(9), work, name=str), events.append)
    assert max(event.done for event in events if isinstance(event, Progress)) <= 5


class Spy:
    """Counts the clips that are decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded: list[Path] = []

        def counting(path: Path, **form: float) -> torch.Tensor:
            self.decoded.append(path)
            return decode(path, **form)  # type: ignore[arg-type]

        monkeypatch.setattr("crepa_cli.data.scan.decode", counting)


def prepared(
    family: Family, crepa: CrepaSettings, clips: Path, cache: Cache, events: list[Event] | None = None
) -> list[PreparedClip]:
    work = prepare.prepare(family, clips, ClipForm(32, 32, 9, 8), crepa, [""], cache, CPU, torch.float32)
    return drained(work, (events if events is not None else []).append)


@pytest.mark.parametrize(("small", "kept", "times"), [(True, True, 1), (False, True, 1), (True, False, 2)])
def test_each_clip_is_decoded_once_if_there_is_room_and_encoded_as_if_it_were_alone(
    small: bool,
    kept: bool,
    times: int,
    open_tiny: OpenTiny,
    tiny_dinov2: Path,
    short_clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, cache, spy = open_tiny("wan", "t2v"), Cache(tmp_path), Spy(monkeypatch)
    crepa = CrepaSettings(block_index=1, encoder=str(tiny_dinov2), encoder_image_size=28)
    if not small:
        monkeypatch.setattr(ahead, "SMALL", 0)
    if not kept:
        monkeypatch.setattr(ahead, "KEPT_BYTES", 0)
    clips = prepared(family, crepa, short_clips, cache)
    assert sorted(spy.decoded) == sorted([clip.clip.path for clip in clips] * times)
    pipeline, teacher = load_encoding_vae(family, CPU), load_teacher(crepa, CPU)
    for clip in clips:
        pixels = clip_pixels(clip)
        with torch.no_grad():
            latents = prepare.clip_latents(family, pipeline, clip, pixels)["latents"]
        assert cache.read("latents", clip.latents_key)["latents"].equal(latents)
        frames, size = teacher_input(family, crepa, clip.bucket, latents)
        assert cache.read("features", str(clip.features_key))["features"].equal(teacher.features(pixels[frames], size))


def test_a_stopped_preparation_goes_on_at_the_clip_where_it_stopped(
    open_tiny: OpenTiny, tiny_dinov2: Path, short_clips: Path, tmp_path: Path
) -> None:
    family, cache = open_tiny("wan", "t2v"), Cache(tmp_path)
    crepa = CrepaSettings(block_index=1, encoder=str(tiny_dinov2), encoder_image_size=28)
    work = prepare.prepare(family, short_clips, ClipForm(32, 32, 9, 8), crepa, [""], cache, CPU, torch.float32)
    for event in work:
        if isinstance(event, Progress) and (event.stage, event.done) == ("latents", 2):
            break
    work.close()
    assert len(list((tmp_path / "latents").rglob("*.safetensors"))) == 2
    events: list[Event] = []
    assert len(prepared(family, crepa, short_clips, cache, events)) == 3
    ends = {event.stage: event.total for event in events if isinstance(event, Progress)}
    assert (ends["latents"], ends["features"]) == (1, 3)
