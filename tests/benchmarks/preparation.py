"""How fast clips are prepared: `python tests/benchmarks/preparation.py [--clips N] [--against TREE] [--rounds N]`.

Clips of the demo, 96x64 with 17 frames, from nothing to a full cache, on the CPU. `--against` names another checkout of
this repository; the two take turns, and the least time of each counts. On a busy machine the seconds of the CPU say
more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from crepa_cli import api
from crepa_cli.data.video import write_video
from crepa_cli.demo import demo_settings, write_demo
from crepa_cli.demo.clips import FPS
from crepa_cli.demo.scenes import all_scenes
from crepa_cli.events import Event, Progress
from crepa_cli.profile import Profile

HERE = Path(__file__).resolve().parents[2]


def demo_profile() -> Profile:
    """The settings of the demo in the current folder, with the clips in `clips` and a cache in `cache`."""
    settings = demo_settings("wan", "t2v")
    settings["model"] |= {"family": "wan"}
    settings["data"] |= {"path": "clips", "cache": "cache"}
    flat = {f"{table}.{key}": value for table, values in settings.items() for key, value in values.items()}
    return api.resolve("t2v", flat).profile


def write_clips(count: int) -> None:
    """Write the demo, and `count` clips with their captions, in the current folder."""
    write_demo(demo_profile())
    scenes = all_scenes()
    for index in range(count):
        scene, video = scenes[index % len(scenes)], Path(f"clips/{index:04}.mp4")
        write_video(video, scene.render(index), FPS)
        video.with_suffix(".txt").write_text(scene.caption)


def measure() -> None:
    """Fill the cache in the current folder, and print the seconds of each stage and of the CPU as JSON."""
    profile, starts = demo_profile(), list[tuple[str, float]]()

    def listen(event: Event) -> None:
        if isinstance(event, Progress) and (not starts or starts[-1][0] != event.stage):
            starts.append((event.stage, time.perf_counter()))

    of_cpu = time.process_time()
    api.fill_cache(profile, listeners=[listen])
    of_cpu = time.process_time() - of_cpu
    ends = [start for _, start in starts[1:]] + [time.perf_counter()]
    seconds = dict.fromkeys((stage for stage, _ in starts), 0.0)
    for (stage, start), end in zip(starts, ends, strict=True):
        seconds[stage] += end - start
    print(json.dumps({"stages": seconds, "cpu": of_cpu}))


def measured(tree: Path, folder: Path) -> tuple[dict[str, float], float]:
    """The seconds of each stage, and of the CPU, with the code of a checkout."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    printed = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
    found = json.loads(printed.splitlines()[-1])
    return found["stages"], found["cpu"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
        return
    trees = {"this": HERE} | ({"other": arguments.against.resolve()} if arguments.against else {})
    times: dict[str, list[float]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_clips(arguments.clips)
        for _ in range(arguments.rounds):
            for name, tree in trees.items():
                stages, of_cpu = measured(tree, Path(folder))
                times[name].append(sum(stages.values()))
                parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in stages.items())
                speed = arguments.clips / times[name][-1]
                print(f"{name}: {speed:.1f} clips per second ({parts} s; {of_cpu:.1f} s of the CPU)", flush=True)
        os.chdir(HERE)
    least = {name: min(found) for name, found in times.items()}
    if arguments.against:
        print(f"this is {least['other'] / least['this']:.2f} times as fast as the other")


if __name__ == "__main__":
    main()
