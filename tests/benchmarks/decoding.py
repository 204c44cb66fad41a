"""Measures the CPU time of reading a clip: `python tests/benchmarks/decoding.py [clip]`.

81 frames at 832x480, from a generated clip of 1920x1080 or the one given. Held against the least that PyAV and swscale
can do, and against ffmpeg's command line if there is one. The rounds of all readers are taken in turn, and the least of
each counts, so that the ratios hold on a busy machine. Children's time counts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import torch
from rich.console import Console
from rich.table import Table

from crepa_cli.data.video import decode, write_video

FRAMES, WIDTH, HEIGHT, ROUNDS = 81, 832, 480, 5
COVERING = (853, 480)


def ours(path: Path) -> None:
    """What preparation does."""
    decode(path, frames=FRAMES, fps=24, width=WIDTH, height=HEIGHT)


def bare(path: Path) -> None:
    """PyAV's frames, resized by swscale with its defaults, and nothing else."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(container.decode(video=0)):
            if index == FRAMES:
                return
            frame.reformat(*COVERING, "rgb24").to_ndarray()


def ffmpeg(path: Path) -> None:
    """The command line of ffmpeg, with the same size and crop."""
    scaling = f"scale={COVERING[0]}:{COVERING[1]},crop={WIDTH}:{HEIGHT}"
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-frames:v", str(FRAMES), "-vf", scaling]
    subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-y", os.devnull], check=True)


def cpu_seconds(read: Callable[[Path], None], path: Path) -> float:
    """CPU time of this process and its children while `read` reads a clip."""
    before = os.times()
    read(path)
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


def textured(count: int, width: int, height: int) -> torch.Tensor:
    """A moving texture, so that the decoder has something to do: uint8 [F, 3, H, W]."""
    noise = torch.rand(1, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
    texture = (torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic") * 255).clamp(0, 255).byte()
    return torch.cat([texture.roll(3 * index, dims=3) for index in range(count)])


def main() -> None:
    """Print the CPU time of each reader and its ratio to ours."""
    torch.set_num_threads(1)
    readers = {"decode": ours, "PyAV and swscale": bare}
    if shutil.which("ffmpeg"):
        readers["ffmpeg"] = ffmpeg
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder, "clip.mp4")
        if len(sys.argv) < 2:
            write_video(path, textured(FRAMES + 3, 1920, 1080), 24)
        rounds = [{name: cpu_seconds(read, path) for name, read in readers.items()} for _ in range(ROUNDS)]
    least = {name: min(times[name] for times in rounds) for name in readers}
    table = Table("reader", "CPU seconds", "decode is ... times this", title=f"{FRAMES} frames at {WIDTH}x{HEIGHT}")
    for name, seconds in least.items():
        table.add_row(name, f"{seconds:.2f}", f"{least['decode'] / seconds:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
