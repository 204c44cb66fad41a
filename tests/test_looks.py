"""`crepa doctor` on the clips themselves: which look alike, are black or frozen, have bars, share a caption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import OpenTiny, RunCrepa, moving_pattern
from torch import Tensor

from crepa_cli.data.images import write_frame
from crepa_cli.data.index import Index
from crepa_cli.data.pictures import Bars, Look, alike, look_at_all
from crepa_cli.data.scan import ClipForm, PreparedClip, clip_pixels, scan
from crepa_cli.data.sheet import LARGEST
from crepa_cli.data.video import write_video
from crepa_cli.data.windows import HEAD, Sampling
from crepa_cli.doctor.contact_sheet import add_contact_sheet, tile
from crepa_cli.doctor.findings import ClipFindings, Plan
from crepa_cli.doctor.looks import check_looks, spread
from crepa_cli.events import drained
from crepa_cli.profile import DataSettings
from crepa_cli.settings import resolve

FPS = 16
FORM = ClipForm(96, 64, 17, FPS)


def waves(shift: int = 0, frames: int = 34, height: int = 64, width: int = 96) -> Tensor:
    """A moving clip, uint8 [F, 3, H, W]; another shift begins at another time."""
    pattern = moving_pattern(frames + shift, height, width)[:, shift:]
    return ((pattern + 1) * 127.5).byte().permute(1, 0, 2, 3)


def boxed(frames: Tensor, rows: int, columns: int = 0) -> Tensor:
    """Black bars over the rows and columns at the edges."""
    clip = torch.zeros_like(frames)
    inside = slice(rows, frames.shape[2] - rows), slice(columns, frames.shape[3] - columns)
    clip[:, :, *inside] = frames[:, :, *inside]
    return clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with all kinds of mistakes."""
    folder = tmp_path_factory.mktemp("looks")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 12, (34, 3, 64, 96), dtype=torch.uint8, generator=generator)
    still = waves(40)[:1].flip(3).expand(34, -1, -1, -1)
    clips = {
        "first": waves(),
        "larger copy": waves().repeat_interleave(2, 2).repeat_interleave(2, 3),
        "second": waves(12).flip(2),
        "dark": noise,
        "still": still,
        "wide": boxed(waves(20), 8),
        "high": boxed(waves(28), 0, 20),
        "long": waves(3, 68).flip(1),
    }
    for name, frames in clips.items():
        write_video(folder / f"{name}.mp4", frames, FPS)
        (folder / f"{name}.txt").write_text("a wave" if name in {"second", "long"} else f"a clip, {name}")
    write_video(folder / "fast.mp4", waves(7, 130, 32, 48).flip(0)[:, [1, 0, 2]], 120)
    (folder / "fast.txt").write_text("fast")
    write_frame(folder / "picture.png", waves()[0])
    (folder / "picture.txt").write_text("a picture")
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSettings:
    return resolve(None, {"model.family": "wan", "data.path": str(folder)}).profile.data


def scanned(open_tiny: OpenTiny, folder: Path, sampling: Sampling = HEAD) -> list[PreparedClip]:
    return drained(scan(open_tiny("wan", "t2v"), folder, FORM, sampling=sampling), lambda _: None)


@pytest.fixture(scope="module")
def clips(open_tiny: OpenTiny, folder: Path) -> list[PreparedClip]:
    return scanned(open_tiny, folder)


def checked(clips: list[PreparedClip], data: DataSettings) -> tuple[ClipFindings, Plan]:
    plan = Plan()
    check_looks(plan, clips, data, lambda _: None)
    assert plan.findings
    return plan.findings, plan


def test_each_mistake_is_found_and_nothing_else(clips: list[PreparedClip], data: DataSettings) -> None:
    found, plan = checked(clips, data)
    assert found.near_identical == [("first.mp4", "larger copy.mp4")]
    assert found.black == ["dark.mp4"]
    assert found.frozen == ["still.mp4"]
    assert found.bars.keys() == {"high.mp4", "wide.mp4"}
    # Compression blurs the edges by a pixel.
    assert found.bars["high.mp4"] == pytest.approx({"left": 20, "top": 0, "right": 20, "bottom": 0}, abs=1)
    assert found.bars["wide.mp4"] == pytest.approx({"left": 0, "top": 8, "right": 0, "bottom": 8}, abs=1)
    assert found.frame_rates == pytest.approx({"fast.mp4": 120})
    assert found.same_caption == {"a wave": ["long.mp4", "second.mp4"]}
    warnings = [check for check in plan.checks if check.status == "warning"]
    assert len(warnings) == 6
    assert all(check.advice for check in warnings)
    assert "wide.mp4 (top " in " ".join(check.message for check in warnings)
    assert not [check for check in plan.checks if check.status == "failure"]


def test_the_share_of_each_video_that_is_used(
    open_tiny: OpenTiny, clips: list[PreparedClip], folder: Path, data: DataSettings
) -> None:
    found, plan = checked(clips, data)
    assert "picture.png" not in found.used
    assert found.used["first.mp4"] == pytest.approx(17 / 34)
    assert found.used["long.mp4"] == pytest.approx(17 / 68)
    assert "1 of 9 videos: long.mp4 25%" in plan.checks[-1].message
    windows = [
        clip
        for clip in scanned(open_tiny, folder, Sampling("windows", overlap=0.5))
        if clip.clip.path.name in {"long.mp4", "still.mp4"}
    ]
    found, plan = checked(windows, data)
    assert found.used["long.mp4"] == pytest.approx(1, abs=0.06)
    # Windows of one file may look the same, and have its caption.
    assert len(found.frozen) > 1
    assert not found.near_identical
    assert not found.same_caption


def test_clips_that_the_index_knows_are_not_opened(
    clips: list[PreparedClip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = drained(look_at_all(clips, Index(tmp_path)), lambda _: None)

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened again")

    monkeypatch.setattr("crepa_cli.data.pictures.decode", opened)
    monkeypatch.setattr("crepa_cli.data.pictures.image_pixels", opened)
    assert drained(look_at_all(clips, Index(tmp_path)), lambda _: None) == before
    with pytest.raises(AssertionError, match="opened again"):
        drained(look_at_all([replace(clips[0], start=0.5)], Index(tmp_path)), lambda _: None)


def test_pairs_are_the_same_in_any_order(clips: list[PreparedClip]) -> None:
    def look(level: int) -> Look:
        return Look(False, False, Bars(0, 0, 0, 0), f"{level:02x}" * 960)

    looked = [(replace(clips[0], clip=replace(clips[0].clip, path=Path(f"{n}"))), look(n * 12)) for n in range(20)]
    # Neighbors differ by 12 levels, others by 24 or more.
    for order in (looked, looked[::-1]):
        pairs = {frozenset({one.clip.path.name, other.clip.path.name}) for one, other in alike(order)}
        assert pairs == {frozenset({str(n), str(n + 1)}) for n in range(19)}


def test_a_sample_is_spread_from_the_first_to_the_last(clips: list[PreparedClip]) -> None:
    many = [replace(clips[0], source=number) for number in range(1000)]
    chosen = [clip.source for clip in spread(many, 10)]
    assert chosen == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert spread(clips, len(clips)) == clips


def test_a_tile_is_the_middle_frame_as_it_is_trained_on(clips: list[PreparedClip]) -> None:
    for clip in clips:
        pixels = clip_pixels(clip)[clip.bucket.frames // 2]
        left, bottom = (LARGEST[0] - clip.bucket.width) // 2, LARGEST[1]
        shown = tile(clip).crop((left, bottom - clip.bucket.height, left + clip.bucket.width, bottom))
        assert shown.tobytes() == pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
        assert tile(clip).crop((0, LARGEST[1], *tile(clip).size)).getbbox()


def test_a_sheet_is_not_written_among_the_clips(clips: list[PreparedClip], data: DataSettings, folder: Path) -> None:
    plan = Plan()
    add_contact_sheet(plan, folder / "picture.png", clips, data, lambda _: None)
    assert [check.status for check in plan.checks] == ["failure"]
    assert "name another folder" in plan.checks[0].message


def test_a_sheet_needs_settings_and_the_ending_of_a_png(
    tmp_path: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_crepa("doctor", "--contact-sheet", "sheet.png") == 2
    assert "no clips to show" in capsys.readouterr().err
    assert run_crepa("doctor", "--model", "wan", "--contact-sheet", "sheet.jpg") == 2
    assert "ending .png" in capsys.readouterr().err
