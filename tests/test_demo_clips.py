"""The demo's clips are real video files that match their captions."""

from pathlib import Path

import torch

from crepa_cli.data.clips import file_digest, find_clips
from crepa_cli.data.video import decode, frames_available, probe
from crepa_cli.demo.clips import COLORS, write_demo_clips


def test_demo_clips_are_usable_varied_and_moving(tmp_path: Path) -> None:
    write_demo_clips(tmp_path, count=5)
    scan = find_clips(tmp_path)
    assert len(scan.clips) == 5
    assert scan.skipped == []
    assert len({clip.caption for clip in scan.clips}) == 5
    infos = [probe(clip.path) for clip in scan.clips]
    assert {(info.width, info.height) for info in infos} == {(192, 144), (144, 144), (144, 192)}
    for clip, info in zip(scan.clips, infos, strict=True):
        assert frames_available(info, 16) == 24
        frames = decode(clip.path, frames=24, fps=16, width=info.width, height=info.height).float()
        assert (frames[1:] - frames[:-1]).abs().mean((1, 2, 3)).min() > 1
        assert frames.std() > 20


def test_the_caption_names_the_color_in_the_middle(tmp_path: Path) -> None:
    write_demo_clips(tmp_path, count=1)
    (clip,) = find_clips(tmp_path).clips
    middle = decode(clip.path, frames=13, fps=16, width=96, height=72)[12, :, 26:46, 38:58].float().mean((1, 2))
    colors = {name: torch.tensor(color) for name, color in COLORS.items()}
    nearest = max(colors, key=lambda name: float(torch.cosine_similarity(middle, colors[name], dim=0)))
    assert clip.caption.split()[1] == nearest


def test_the_same_seed_gives_the_same_files_and_what_is_there_is_kept(tmp_path: Path) -> None:
    write_demo_clips(tmp_path / "a", count=2, seed=3)
    write_demo_clips(tmp_path / "b", count=2, seed=3)
    write_demo_clips(tmp_path / "c", count=2, seed=4)
    digests = [[file_digest(path) for path in sorted((tmp_path / name).iterdir())] for name in "abc"]
    assert digests[0] == digests[1]
    assert set(digests[0]).isdisjoint(digests[2])

    kept = tmp_path / "a" / "clip-00.mp4"
    before = kept.stat().st_mtime_ns
    (tmp_path / "a" / "clip-01.txt").unlink()
    write_demo_clips(tmp_path / "a", count=3, seed=3)
    assert kept.stat().st_mtime_ns == before
    assert len(list((tmp_path / "a").iterdir())) == 6
