"""Scenes of known motion, and the checker that reads a video."""

from __future__ import annotations

from pathlib import Path

import torch
from small_video.checker import check, color_of, direction_of, path_of

from crepa_cli.data.clips import find_clips
from crepa_cli.data.video import decode
from crepa_cli.demo.clips import FPS
from crepa_cli.demo.scenes import FRAMES, SCENE_SHAPES, SIZE, UNSEEN_SHAPE, Scene, all_scenes, write_scenes


def test_the_checker_reads_color_way_and_direction_off_every_kind_of_scene() -> None:
    for seed, scene in enumerate(all_scenes((*SCENE_SHAPES, UNSEEN_SHAPE))[::6]):
        video = scene.render(seed)
        assert video.shape == (FRAMES, 3, SIZE.height, SIZE.width)
        assert check(video, scene) == (True, True), scene
        # Part of a shape may be outside, and a triangle's centroid is not the center that it turns about.
        assert (path_of(video) - scene.path(seed)).abs().max() < 0.12, scene


def test_the_checker_tells_other_colors_and_directions_apart() -> None:
    scene = Scene("plain", "red", "disc", "left", "gray")
    video = scene.render(0)
    torch.testing.assert_close(path_of(video), scene.path(0), rtol=0, atol=0.01)
    assert check(video.flip(0), scene) == (True, False)
    assert check(video.flip(1), scene) == (False, True)
    assert check(video[:1].expand(FRAMES, -1, -1, -1), scene) == (True, False)
    still = torch.full_like(video, 128)
    assert (color_of(still), direction_of(still)) == (None, None)
    assert path_of(torch.cat([video[:3], still[:2]])).isnan().any(1).tolist() == [False, False, False, True, True]


def test_scenes_are_written_with_their_captions_and_kept(tmp_path: Path) -> None:
    write_scenes(tmp_path, count=3)
    clips = find_clips(tmp_path).clips
    scenes = all_scenes((UNSEEN_SHAPE,))
    assert [clip.caption for clip in clips] == [scene.caption for scene in scenes[:3]]
    for index, clip in enumerate(clips):
        video = decode(clip.path, frames=FRAMES, fps=FPS, width=SIZE.width, height=SIZE.height)
        assert check(video, scenes[index]) == (True, True)
    before = clips[0].path.stat().st_mtime_ns
    write_scenes(tmp_path, count=3)
    assert clips[0].path.stat().st_mtime_ns == before
