"""Images beside videos: clips of one frame, upright, in plain RGB, at any size."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OpenTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crepa_cli.data.buckets import Bucket
from crepa_cli.data.clips import ClipError
from crepa_cli.data.images import image_pixels, is_image, probe_image
from crepa_cli.data.index import Index
from crepa_cli.data.scan import ClipForm, PreparedClip, clip_pixels, scan
from crepa_cli.data.video import write_video
from crepa_cli.doctor.clips import describe_buckets
from crepa_cli.doctor.findings import BucketCount
from crepa_cli.errors import UserError
from crepa_cli.events import ClipSkipped, Event, Notice, drained
from crepa_cli.profile import DataSettings

ORIENTATION = 0x0112
FORM = ClipForm(96, 64, 9, 16)
QUARTERS = np.kron(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]), np.ones((20, 30, 1)))
UPRIGHT = {
    1: QUARTERS,
    2: QUARTERS[:, ::-1],
    3: QUARTERS[::-1, ::-1],
    4: QUARTERS[::-1],
    5: QUARTERS.transpose(1, 0, 2),
    6: np.rot90(QUARTERS, -1),
    7: np.rot90(QUARTERS, 2).transpose(1, 0, 2),
    8: np.rot90(QUARTERS),
}
"""The stored picture as it is shown, by its orientation (Exif 2.32, table 6)."""


def picture_of(pixels: torch.Tensor) -> np.ndarray:
    return pixels[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_images_are_turned_as_their_exif_data_say(tmp_path: Path, suffix: str) -> None:
    stored = Image.fromarray(QUARTERS.astype(np.uint8))
    for orientation, expected in UPRIGHT.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        stored.save(path, exif=exif, quality=100)
        info = probe_image(path)
        height, width = expected.shape[:2]
        assert (info.frames, info.width, info.height, info.image) == (1, width, height, True)
        found = picture_of(image_pixels(path, width, height))
        near = [slice(height // 8, None, height // 4), slice(width // 8, None, width // 4)]
        np.testing.assert_allclose(found[*near], expected[*near], atol=6)


def test_transparent_parts_are_white_and_palettes_and_deep_grays_keep_their_colors(tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    np.testing.assert_allclose(picture_of(image_pixels(tmp_path / "deep.png", 96, 64))[..., 1], shades / 257, atol=0.51)

    alpha = np.linspace(0, 255, 64 * 96).reshape(64, 96, 1).astype(np.uint8)
    color = np.broadcast_to(np.array([200, 30, 90], np.uint8), (64, 96, 3))
    over_white = (color * (alpha / 255) + 255 * (1 - alpha / 255)).round()
    Image.fromarray(np.concatenate([color, alpha], 2)).save(tmp_path / "clear.png")
    np.testing.assert_allclose(picture_of(image_pixels(tmp_path / "clear.png", 96, 64)), over_white, atol=1)
    Image.fromarray(np.concatenate([color[..., :1], alpha], 2)).save(tmp_path / "gray.webp", lossless=True)
    np.testing.assert_allclose(
        picture_of(image_pixels(tmp_path / "gray.webp", 96, 64))[..., 0], over_white[..., 0], atol=1
    )

    paletted = Image.new("P", (96, 64), 1)
    paletted.putpalette([10, 20, 30, 40, 200, 60])
    paletted.paste(0, (0, 0, 48, 64))
    paletted.save(tmp_path / "palette.png")
    paletted.save(tmp_path / "hole.png", transparency=0)
    for name, left in (("palette.png", (10, 20, 30)), ("hole.png", (255, 255, 255))):
        found = picture_of(image_pixels(tmp_path / name, 96, 64))
        assert (tuple(found[5, 5]), tuple(found[5, 90])) == (left, (40, 200, 60))


def test_what_is_no_usable_image_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(QUARTERS.astype(np.uint8)).save(tmp_path / "whole.png")
    Image.new("RGB", (400, 20)).save(tmp_path / "strip.png")
    Image.new("RGB", (96, 64)).save(tmp_path / "page.bmp")
    (tmp_path / "page.bmp").rename(tmp_path / "page.png")
    (tmp_path / "text.jpg").write_text("no picture")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, reason in (
        ("strip.png", "sides of 400 and 20 pixels"),
        ("page.png", "not an image that can be read here"),
        ("text.jpg", "not an image that can be read here"),
        ("cut.png", "damaged or cut off"),
        ("gone.png", "cannot be read: No such file"),
    ):
        for read in (probe_image, lambda path: image_pixels(path, 32, 32)):
            with pytest.raises(ClipError, match=reason):
                read(tmp_path / name)
    monkeypatch.setattr("crepa_cli.data.images.MAX_PIXELS", 60 * 40 - 1)
    with pytest.raises(ClipError, match="has more than"):
        probe_image(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 // 2 + 1)
    with pytest.raises(ClipError, match="has more than"):
        probe_image(tmp_path / "whole.png")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data(), suffix=st.sampled_from(["png", "jpg", "webp"]))
def test_whatever_a_damaged_image_holds_it_is_read_or_refused(
    data: st.DataObject, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    Image.fromarray(QUARTERS.astype(np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(ClipError):
        assert probe_image(path).frames == 1
        assert image_pixels(path, 32, 16).shape == (1, 3, 16, 32)


def test_an_animated_webp_is_a_video_and_another_one_an_image(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (96, 64), (shade, 0, 0)) for shade in range(0, 250, 25)]
    pictures[0].save(tmp_path / "still.webp")
    pictures[0].convert("RGBA").save(tmp_path / "clear.WEBP", exif=Image.Exif())
    pictures[0].save(tmp_path / "moving.webp", save_all=True, append_images=pictures[1:], duration=50)
    found = {path.name: is_image(path) for path in tmp_path.iterdir()}
    assert found == {"still.webp": True, "clear.WEBP": True, "moving.webp": False}
    assert not is_image(tmp_path / "gone.webp")


def scanned(
    open_tiny: OpenTiny, folder: Path, task: str, index: Index | None = None
) -> tuple[list[PreparedClip], list[Event]]:
    events: list[Event] = []
    return drained(scan(open_tiny("wan", task), folder, FORM, index), events.append), events


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with a video, a wide, a high and a broken image."""
    folder = tmp_path / "mixed"
    write_video(folder / "clip.mp4", torch.zeros(12, 3, 64, 96, dtype=torch.uint8), 16)
    Image.new("RGB", (960, 640), "red").save(folder / "wide.png")
    Image.new("RGB", (100, 200), "blue").save(folder / "high.jpg")
    (folder / "broken.webp").write_bytes(b"RIFF")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"a {path.stem} clip")
    return folder


def test_an_image_is_a_clip_of_one_frame_in_a_bucket_of_its_shape(
    mixed: Path, open_tiny: OpenTiny, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    index = Index(tmp_path / "cache")
    clips, events = scanned(open_tiny, mixed, "t2v", index)
    assert {clip.clip.path.name: clip.bucket for clip in clips} == {
        "clip.mp4": Bucket(9, 64, 96),
        "high.jpg": Bucket(1, 112, 64),
        "wide.png": Bucket(1, 64, 96),
    }
    assert [event.name for event in events if isinstance(event, ClipSkipped)] == ["broken.webp"]
    (long,) = [event.message for event in events if isinstance(event, Notice) and "longer" in event.message]
    assert "1 of 1 clip" in long
    assert "75% of all seconds" in long, "an image has no seconds"
    for clip in clips:
        bucket = clip.bucket
        assert clip_pixels(clip).shape == (bucket.frames, 3, bucket.height, bucket.width)
    assert scanned(open_tiny, mixed, "t2v", index)[0] == clips


def test_image_to_video_leaves_images_out_with_one_message(mixed: Path, open_tiny: OpenTiny) -> None:
    clips, events = scanned(open_tiny, mixed, "i2v")
    assert [clip.clip.path.name for clip in clips] == ["clip.mp4"]
    messages = [event.message for event in events if isinstance(event, Notice) and "left out" in event.message]
    assert messages == ["2 images left out, because wan i2v cannot be trained on a single frame: high.jpg, wide.png"]
    (mixed / "clip.mp4").unlink()
    with pytest.raises(UserError, match="no usable clips"):
        scanned(open_tiny, mixed, "i2v")


def test_doctor_counts_single_frames(open_tiny: OpenTiny) -> None:
    data = DataSettings(width=96, height=64, frames=9, fps=16)
    text = describe_buckets([BucketCount(1, 64, 96, 3), BucketCount(9, 64, 96, 2)], data, open_tiny("wan", "t2v"))
    assert text.splitlines() == ["5 usable clips, by size:", "96x64, single frames: 3", "96x64, 9 frames: 2"]
