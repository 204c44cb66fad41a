"""The preparation: what it refuses to store, and what it says while it works."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from conftest import OpenTiny

from crepa_cli.data.cache import Cache, DamagedEntryError
from crepa_cli.data.index import Index
from crepa_cli.data.online import OnlineTeacher
from crepa_cli.data.prepare import prepare
from crepa_cli.data.prompts import prompt_key
from crepa_cli.data.scan import ClipForm, PreparedClip, clip_pixels, scan
from crepa_cli.data.video import DECODING_VERSION, write_video
from crepa_cli.demo.clips import write_demo_clips
from crepa_cli.errors import UserError
from crepa_cli.events import ClipSkipped, Event, Notice, Progress, drained
from crepa_cli.models.family import Family
from crepa_cli.models.wan import Wan
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

    def run(cache: Cache | None = None, **changes: object) -> tuple[list[PreparedClip], list[Event]]:
        events: list[Event] = []
        work = prepare(
            family,
            tmp_path / "clips",
            ClipForm(96, 64, 5, 16),
            crepa.model_copy(update=changes),
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


def with_a_square(*arguments: Any) -> bool:
    """Whether the second clip is among the arguments, the only square one."""
    return any(isinstance(one, torch.Tensor) and one.shape[-1] == one.shape[-2] for one in arguments)


@pytest.mark.parametrize("kind", ["latents", "features"])
def test_a_clip_whose_tensors_are_not_finite_is_skipped_by_name_and_not_stored(
    kind: str, prepared: Prepare, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, method = (type(family), "encode_clip") if kind == "latents" else (Dinov2Teacher, "features")
    with monkeypatch.context() as patch:
        spoiled(patch, owner, method, with_a_square)
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


def change_unnoticed(path: Path, content: bytes) -> None:
    """Give a file another content of the same size and time."""
    stat = path.stat()
    path.write_bytes(content[: stat.st_size].ljust(stat.st_size, b"x"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


LOSSES: dict[str, Callable[[Path], object]] = {
    "kept": lambda _: None,
    "deleted": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "foreign": lambda path: path.write_text("of another program"),
}


def test_a_second_scan_opens_no_clip_and_an_index_that_is_lost_is_made_again(family: Family, tmp_path: Path) -> None:
    events: list[Event] = []
    clips, cache, form = tmp_path / "clips", tmp_path / "cache", ClipForm(96, 64, 5, 16)
    write_demo_clips(clips, count=3)
    cache.mkdir()

    def scanned() -> list[PreparedClip]:
        events.clear()
        return drained(scan(family, clips, form, Index(cache)), events.append)

    # What was changed a moment ago is read again: its file system may count in seconds, and show no second change.
    for path in clips.iterdir():
        os.utime(path)
    first = scanned()
    assert scanned() == first
    assert Progress("scanning", 3, 3) in events
    for path in clips.iterdir():
        os.utime(path, (0, 0))
    for lose in LOSSES.values():
        scanned()
        lose(cache / "index.sqlite")
        assert scanned() == first
        assert (Progress("scanning", 3, 3) in events) == (lose is not LOSSES["kept"])
    for path in clips.iterdir():
        change_unnoticed(path, b"no video and no caption")
    assert scanned() == first
    os.utime(clips / "clip-01.mp4", (1, 1))
    assert [clip.clip.path.name for clip in scanned()] == ["clip-00.mp4", "clip-02.mp4"]
    assert [event.name for event in events if isinstance(event, ClipSkipped)] == ["clip-01.mp4"]


def test_entries_are_verified_ahead_if_asked_and_otherwise_when_they_are_read(
    prepared: Prepare, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache")
    (_, one, _), _ = prepared(cache)
    entries = {"prompts": one.prompt_keys[0], "latents": one.latents_key, "features": str(one.features_key)}
    good = {kind: cache.read(kind, key) for kind, key in entries.items()}
    for kind, key in entries.items():
        content = cache.path(kind, key).read_bytes()
        change_unnoticed(cache.path(kind, key), content[:-1] + bytes([content[-1] ^ 1]))
    damaged: list[Path] = []
    prepared(Cache(cache.root, on_damage=lambda path, _: damaged.append(path)))
    assert damaged == [cache.path("latents", one.latents_key)], "the first latents of a shape are read at every start"
    for kind in ("prompts", "features"):
        with pytest.raises(DamagedEntryError, match="does not match its checksum"):
            cache.read(kind, entries[kind])
    damaged.clear()
    prepared(Cache(cache.root, on_damage=lambda path, _: damaged.append(path), verify=True))
    assert damaged == [cache.path(kind, entries[kind]) for kind in ("prompts", "features")]
    for kind, key in entries.items():
        torch.testing.assert_close(cache.read(kind, key), good[kind], rtol=0, atol=0)


def written_clip(folder: Path, fps: float) -> None:
    """A clip of 30 frames, each unlike the one before, with its caption."""
    shades = torch.arange(30).mul(8).byte().view(-1, 1, 1, 1).expand(-1, 3, 64, 96)
    write_video(folder / f"{fps:g}.mp4", shades, fps)
    (folder / f"{fps:g}.txt").write_text("it grows lighter")


@pytest.mark.parametrize(("name", "own"), [("wan", False), ("ltxvideo", True)])
def test_a_clip_that_is_too_slow_is_named_or_trained_at_its_own_rate(
    name: str, own: bool, open_tiny: OpenTiny, tmp_path: Path
) -> None:
    for fps in (6.5, 10, 15.84, 16, 24):
        written_clip(tmp_path, fps)
    events: list[Event] = []
    clips = drained(scan(open_tiny(name, "t2v"), tmp_path, ClipForm(96, 64, 17, 16)), events.append)
    rates, repeats = {}, {}
    for clip in clips:
        pixels = clip_pixels(clip)
        assert len(pixels) == clip.bucket.frames
        rates[clip.clip.path.stem] = clip.fps
        shades = pixels.float().mean((1, 2, 3))
        if repeated := int((shades.diff().abs() < 2).sum()):
            repeats[clip.clip.path.name] = repeated
    notices = [event.message for event in events if isinstance(event, Notice) and "slower" in event.message]
    if own:
        assert rates == pytest.approx({"6.5": 6.5, "10": 10, "15.84": 15.84, "16": 16, "24": 16})
        assert not repeats
        assert not notices
    else:
        assert rates == pytest.approx({"6.5": 16, "10": 16, "15.84": 15.84, "16": 16, "24": 16})
        assert repeats.keys() == {"6.5.mp4", "10.mp4"}
        assert sorted(notices) == [
            f"{clip} is slower than data.fps = 16: {count} of its 17 frames repeat the one before"
            for clip, count in sorted(repeats.items())
        ]


def test_the_rate_that_a_clip_is_trained_at_is_stored_with_it(open_tiny: OpenTiny, tmp_path: Path) -> None:
    written_clip(tmp_path, 10)
    cache = Cache(tmp_path / "cache")
    form = ClipForm(96, 64, 9, 30)
    family, device = open_tiny("ltxvideo", "t2v"), torch.device("cpu")
    work = prepare(family, tmp_path, form, None, [""], cache, device, torch.float32)
    (clip,) = drained(work, lambda _: None)
    assert cache.read("latents", clip.latents_key)["fps"] == pytest.approx(10)
    assert len(cache.read("prompts", clip.prompt_keys[0])["prompt_embeds"]) == 256


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
        "1 file left out, neither video nor image: photo.heic",
        "1 clip in HDR, tone-mapped to BT.709: phone.mp4 (HLG)",
        f"1 clip cropped by more than a tenth: wide.mp4 loses {wide.fit.cropped:.0%} (256x64 scaled by {down:.2f} for "
        f"{wide.bucket.width}x{wide.bucket.height})",
    ]


def test_pixels_of_another_decoding_have_other_entries(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = prepared()
    monkeypatch.setattr("crepa_cli.data.scan.DECODING_VERSION", DECODING_VERSION + 1)
    after, _ = prepared()
    for one, other in zip(before, after, strict=True):
        assert one.prompt_keys == other.prompt_keys
        assert not {one.latents_key, one.features_key} & {other.latents_key, other.features_key}


def test_a_family_reads_its_encoders_files_once_and_the_next_one_sees_their_change(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    base = shutil.copytree(open_tiny("wan", "t2v").base.name, tmp_path / "checkpoint")

    def key(family: Family, caption: str) -> str:
        return prompt_key(family, caption, torch.float32)

    family = Wan(str(base), "t2v")
    first = key(family, "a cat")
    assert key(family, "a dog") != first
    (base / "text_encoder" / "config.json").write_text("{}")
    assert key(family, "a cat") == first
    assert key(Wan(str(base), "t2v"), "a cat") != first


def test_the_middle_frame_of_a_latent_can_teach_it(
    prepared: Prepare, family: Family, tiny_dinov2: Path, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache")
    teacher = Dinov2Teacher.load(tiny_dinov2, torch.device("cpu"))
    (last, *_), _ = prepared(cache)
    (middle, *_), _ = prepared(cache, teacher_frame="middle")
    assert (last.latents_key, last.prompt_keys) == (middle.latents_key, middle.prompt_keys)
    pixels = clip_pixels(last)
    for clip, frames in ((last, [0, 4]), (middle, [0, 2])):
        stored = cache.read("features", str(clip.features_key))["features"]
        rows, columns = stored.shape[1:3]
        size = rows * teacher.patch_size, columns * teacher.patch_size
        torch.testing.assert_close(stored, teacher.features(pixels[frames], size), rtol=0, atol=0)
    online = CrepaSettings(
        block_index=8, encoder=str(tiny_dinov2), encoder_image_size=56, teacher_frame="middle", teacher_cache=False
    )
    online_teacher = OnlineTeacher(family, online, torch.device("cpu"))
    latents = cache.read("latents", last.latents_key)["latents"]
    decoded = family.decode_latents(online_teacher.pipeline, latents)[:, [0, 2]].transpose(0, 1)
    expected = teacher.features(((decoded + 1) * 127.5).round().clamp(0, 255).byte(), (56, 56))
    found, _ = online_teacher.features(latents[None])
    torch.testing.assert_close(found[0], expected.flatten(1, 2), rtol=0, atol=0)
