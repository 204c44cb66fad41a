"""How the start of a run grows: `python tests/benchmarks/start.py [--captions COUNT ...] [--clips COUNT ...]`.

`--captions`: seconds of the part of the preparation that looks up that many captions, all of which are in the cache.

`--clips`: a second run on that many clips, from the end of its imports to its first step: seconds, the highest memory
and the time of the later steps, in one process and with `--processes 2` in two. The clips are links to one file, each
with a digest of its own in the index, and the entries of the cache are those of one clip, each under a key of its own.
Model and entries are tiny: it shows what each clip costs, however large it is.
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
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from crepa_cli import api
from crepa_cli.data import prepare as preparation
from crepa_cli.data import prompts as captions
from crepa_cli.data.cache import Cache, _checksum
from crepa_cli.data.compact import stored_features
from crepa_cli.data.encoder import load_encoding_vae, load_teacher
from crepa_cli.data.index import FileState, Index, Known
from crepa_cli.data.measured import Measured, _written
from crepa_cli.data.prepare import clip_latents
from crepa_cli.data.prompts import Prompt, encode_prompts, prompt_key
from crepa_cli.data.scan import ClipForm, clip_pixels
from crepa_cli.data.video import probe, write_video
from crepa_cli.demo import demo_settings, write_tiny
from crepa_cli.demo.teacher import write_tiny_dinov2
from crepa_cli.events import Event, StepDone, drained
from crepa_cli.models import load_family
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile

CPU, DTYPE = torch.device("cpu"), torch.float32
STEPS = 10
CLIP = 17, 3, 64, 96
"""Frames, colors, height and width of the one clip."""
LINKS = 50_000
"""A file has 65,000 names at most in ext4."""


def write_entries(cache: Cache, kind: str, keys: Collection[str], tensors: dict[str, Tensor]) -> None:
    """Write the same tensors under each key, without waiting for the disk."""
    checksum = _checksum(tensors)
    for key in keys:
        path = cache.path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(tensors, {"key": key, "crc32": checksum}))


def start_with_captions(checkpoint: Path, count: int) -> str:
    """The seconds for a number of captions of a checkpoint that has not been looked at yet."""
    prompts = [Prompt(f"caption {index}") for index in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        family, cache = load_family("wan")(str(checkpoint), "t2v"), Cache(Path(folder))
        keys = [prompt_key(family, prompt.text, DTYPE) for prompt in prompts]
        write_entries(cache, "prompts", keys, {"prompt_embeds": torch.ones(8, 32, dtype=DTYPE)})
        times = []
        for _ in range(2):
            family = load_family("wan")(str(checkpoint), "t2v")
            started, of_cpu = time.perf_counter(), time.process_time()
            encoded: list[Event] = list(encode_prompts(family, prompts, cache, CPU, DTYPE, trusted=prompts))
            assert not encoded, "all of them are in the cache"
            times.append(f"{time.perf_counter() - started:.2f} s, of the CPU {time.process_time() - of_cpu:.2f} s")
    return f"{count:>7,} captions: first start {times[0]}; second {times[1]}"


def simulate_clips(folder: Path, profile: Profile, count: int) -> None:
    """Make a folder of clips, and a cache that has everything of them."""
    clips, cache = folder / "clips", Cache(folder / "clips/.crepa-cache")
    cache.root.mkdir(parents=True)
    source = folder / "one.mp4"
    write_video(source, torch.randint(0, 255, CLIP, dtype=torch.uint8), 16)
    info, rows = probe(source), []
    for number in range(count):
        clip, text = clips / f"{number // 1000:03}" / f"{number:06}.mp4", f"clip {number}, of something that moves"
        clip.parent.mkdir(exist_ok=True)
        if number % LINKS == LINKS - 1:
            source = Path(shutil.copy(source, folder / f"{number}.mp4"))
        clip.hardlink_to(source)
        clip.with_suffix(".txt").write_text(text)
        for path, content in ((clip, _written(Measured(info, f"{number:064x}"))), (clip.with_suffix(".txt"), text)):
            rows.append((str(path), Known(FileState.of(path.stat()), content)))
    Index(cache.root).put(rows)
    fill_cache(profile, cache)


def finished(result: Any) -> Generator[Event, None, Any]:
    """A generator of no events."""
    yield from ()
    return result


def fill_cache(profile: Profile, cache: Cache) -> None:
    """Fill the cache as the preparation would, with the entries of the first clip for all."""
    family, form = load_family("wan")(str(profile.model.checkpoint), "t2v"), ClipForm.of(profile.data)

    def prompts(family: Family, keys: dict[Prompt, str], *_: Any) -> Generator[Event, None, Any]:
        write_entries(cache, "prompts", keys.values(), family.encode_prompt(family.load_text_pipeline(DTYPE), "text"))
        return finished({})

    def latents(family: Family, clips: list[Any], *_: Any) -> Generator[Event, None, Any]:
        tensors = clip_latents(family, load_encoding_vae(family, CPU), clips[0], clip_pixels(clips[0]))
        write_entries(cache, "latents", [clip.latents_key for clip in clips], tensors)
        return finished(clips)

    def features(crepa: Any, dtype: Any, clips: list[Any], inputs: Any, *_: Any) -> Generator[Event, None, Any]:
        frames, size = inputs[clips[0].bucket]
        tensors = stored_features(load_teacher(crepa, CPU).features(clip_pixels(clips[0])[frames], size), dtype)
        write_entries(cache, "features", [clip.features_key for clip in clips], tensors)
        return finished(clips)

    captions._encode_missing = prompts  # type: ignore[assignment]
    preparation._encode_latents, preparation._encode_features = latents, features  # type: ignore[assignment]
    folder = Path(str(profile.data.path))
    with torch.no_grad():
        drained(preparation.prepare(family, folder, form, profile.crepa, [""], cache, CPU, DTYPE), lambda _: None)


def measured_profile(folder: Path) -> Profile:
    """The settings of the measured run."""
    settings = demo_settings("wan", "t2v")
    settings["model"] |= {"family": "wan", "checkpoint": str(folder / "wan")}
    settings["data"] |= {"path": str(folder / "clips")}
    settings["crepa"] |= {"encoder": str(folder / "dinov2"), "encoder_image_size": 56}
    settings["train"] |= {"steps": STEPS, "output": str(folder / "run"), "batch_size": 2}
    settings["validation"] = {"every": 0}
    flat = {f"{table}.{key}": value for table, values in settings.items() for key, value in values.items()}
    return api.resolve("t2v", flat).profile


def measure(folder: Path) -> None:
    """Run, and print the figures of this process as JSON."""
    import resource

    ends: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            ends.append(time.perf_counter())

    profile = measured_profile(folder)
    started, of_cpu = time.perf_counter(), time.process_time()
    api.train(profile, listeners=[listen])
    spent = time.process_time() - of_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    later = (ends[-1] - ends[1]) / (len(ends) - 2)
    rank = os.environ.get("RANK", "0")
    print(json.dumps({"rank": rank, "first": ends[0] - started, "cpu": spent, "peak": peak, "step": later}))


def start_with_clips(count: int, processes: int) -> Iterator[str]:
    """The figures of each process of a run on a number of clips."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny("wan", folder / "wan", "t2v")
        write_tiny_dinov2(folder / "dinov2")
        simulate_clips(folder, measured_profile(folder), count)
        for world in range(1, processes + 1):
            for row in run_processes(folder, world):
                yield (
                    f"{count:>7,} clips, process {row['rank']} of {world}: first step after {row['first']:.1f} s "
                    f"(the whole run: {row['cpu']:.1f} s of the CPU), {row['peak']:.0f} MB at most, "
                    f"{row['step']:.3f} s a step"
                )
            shutil.rmtree(folder / "run")


def run_processes(folder: Path, world: int) -> list[dict[str, Any]]:
    """What each process of a run prints."""
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "WORLD_SIZE": str(world)}
    command = [sys.executable, __file__, "--measure", str(folder)]
    started = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate()[0] for process in started]
    return [json.loads(lines.splitlines()[-1]) for lines in said]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, nargs="+", default=[], metavar="COUNT")
    parser.add_argument("--clips", type=int, nargs="+", default=[], metavar="COUNT")
    parser.add_argument("--processes", type=int, default=1, help="measure in 1 to so many processes")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "wan"
        write_tiny("wan", checkpoint, "t2v")
        for count in arguments.captions:
            print(start_with_captions(checkpoint, count))
    for count in arguments.clips:
        for line in start_with_clips(count, arguments.processes):
            print(line, flush=True)


if __name__ == "__main__":
    main()
