"""Seconds that the start of a run takes for captions in the cache: `python tests/benchmarks/start.py [COUNT ...]`.

The part of the preparation that looks every caption up and verifies its entry, for a tiny Wan whose entries are small:
it shows what each caption costs, however large its tensors are. Reading and verifying them adds the time of the disk.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save

from crepa_cli.data.cache import Cache, _checksum
from crepa_cli.data.prepare import Prompt, encode_prompts, prompt_key
from crepa_cli.demo import write_tiny
from crepa_cli.events import Event
from crepa_cli.models import load_family
from crepa_cli.models.family import Family

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
COUNTS = 10, 10_000


def filled_cache(family: Family, prompts: list[Prompt], folder: Path) -> Cache:
    """A cache with an entry for each caption, written without waiting for the disk."""
    cache = Cache(folder)
    tensors = {"prompt_embeds": torch.ones(8, 32, dtype=DTYPE)}
    checksum = _checksum(tensors)
    for prompt in prompts:
        key = prompt_key(family, prompt.text, DTYPE)
        path = cache.path("prompts", key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(tensors, {"key": key, "crc32": checksum}))
    return cache


def seconds(checkpoint: Path, count: int) -> tuple[float, float]:
    """Seconds, and those of the CPU, for a number of captions of a checkpoint that has not been looked at yet."""
    prompts = [Prompt(f"caption {index}") for index in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        cache = filled_cache(load_family("wan")(str(checkpoint), "t2v"), prompts, Path(folder))
        family = load_family("wan")(str(checkpoint), "t2v")
        started, of_cpu = time.perf_counter(), time.process_time()
        encoded: list[Event] = list(encode_prompts(family, prompts, cache, CPU, DTYPE))
        assert not encoded, "all of them are in the cache"
        return time.perf_counter() - started, time.process_time() - of_cpu


def main() -> None:
    """Measure and print."""
    counts = [int(one) for one in sys.argv[1:]] or COUNTS
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "wan"
        write_tiny("wan", checkpoint, "t2v")
        for count in counts:
            whole, of_cpu = seconds(checkpoint, count)
            print(f"{count:>7,} captions: {whole:.2f} s, of the CPU {of_cpu:.2f} s")


if __name__ == "__main__":
    main()
