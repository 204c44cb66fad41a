"""Images that validation videos start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import RunCrepa
from PIL import Image

from crepa_cli.data.images import first_frame
from crepa_cli.profile import ValidationSettings
from crepa_cli.runs.checks import image_mistakes


def test_an_image_is_resized_to_cover_the_size_and_cropped_around_its_center(tmp_path: Path) -> None:
    pixels = np.zeros((60, 200, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:, 80:120] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    frame = first_frame(str(tmp_path / "wide.png"), 40, 30)
    assert (frame.mode, frame.size) == ("RGB", (40, 30))
    columns = np.asarray(frame).mean((0, 2)) > 128
    assert columns.tolist() == [False] * 10 + [True] * 20 + [False] * 10


def test_an_image_that_was_turned_by_the_camera_is_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 20))
    image.getexif()[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=image.getexif())
    assert first_frame(str(tmp_path / "turned.jpg"), 20, 60).size == (20, 60)


@pytest.mark.parametrize(
    ("task", "settings", "mistake"),
    [
        ("t2v", {"prompts": ("a",)}, None),
        ("t2v", {"prompts": ("a",), "images": ("a.png",)}, "starts from no image"),
        ("i2v", {"prompts": ("a",)}, "needs one image per prompt"),
        ("i2v", {"prompts": ("a",), "every": 0}, None),
        ("i2v", {}, None),
        ("i2v", {"prompts": ("a",), "images": ("missing.png",)}, "missing.png cannot be read as an image"),
    ],
)
def test_images_are_checked_before_training(task: str, settings: dict[str, object], mistake: str | None) -> None:
    mistakes = image_mistakes(ValidationSettings.model_validate({"guidance_scale": 5.0, **settings}), task)
    assert [mistake in found for found in mistakes] == ([True] if mistake else [])  # type: ignore[operator]


def test_image_to_video_without_images_ends_before_training(
    run_crepa: RunCrepa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("no image")
    images = ["--set", "validation.images=note.txt"]
    assert run_crepa("train", "--profile", "i2v", "--model", "wan", "--demo", "--plain", *images) == 2
    assert "note.txt cannot be read as an image" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()
