"""A controlled experiment on alignment, with a small video transformer: `python tests/benchmarks/controlled.py`.

Arms differ in their alignment alone: equal first weights, clips, order, noise and steps. They train through
`crepa_cli.api.train`, from scratch and as a LoRA of the demo's Wan on a shape that it has not seen, and are measured on
held-out scenes, whose motion is known. `results.json`, `table.md` and `figure.svg` appear in the folder of `--output`.

A run that is in `results.json` is not run again. Several processes may share a folder: each takes runs that no other
has taken. `--quick` takes few steps of few arms with one seed, to test this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from small_video.arms import ARMS, BASE, DEFAULT, Tables
from small_video.experiment import Lab, Start, starts
from small_video.outcome import as_markdown, as_svg

from crepa_cli.demo.tiny import write_once
from crepa_cli.demo.trained import write_trained_dinov2, write_trained_wan
from crepa_cli.files import write_whole
from crepa_cli.libraries import silence_libraries

QUICK_ARMS = (BASE, DEFAULT)
QUICK_STEPS = 3


def main() -> None:
    """Run what is missing, and write what came out after every run."""
    options = _options()
    silence_libraries()
    torch.set_num_threads(options.threads)
    folder: Path = options.output
    with FileLock(folder / "models.lock"):
        models = write_once(folder / "wan", write_trained_wan), write_once(folder / "dinov2", write_trained_dinov2)
    lab = Lab(folder, *models)
    chosen = {name: start for name, start in starts().items() if name in options.starts}
    if options.quick:
        chosen = {name: _shortened(start) for name, start in chosen.items()}
    overrides: Tables = {"train": {"steps": options.steps}} if options.steps else {}
    for name, start in chosen.items():
        with FileLock(folder / "prepared.lock"):  # the first process prepares the clips, the others find them
            lab.prepare(name, start)
            if name not in _results(folder)["references"]:
                _add(folder, references={name: lab.references(name, start)})
    for seed, arm, name in itertools.product(options.seeds, options.arms, chosen):
        key = f"{name}/{arm}/{seed}"
        with _taken(folder / "taken" / key.replace("/", "-")) as taken:
            if taken and key not in _results(folder)["runs"]:
                run = lab.run(chosen[name], name, arm, seed, overrides)
                _add(folder, runs={key: run})
                print(f"{key}: {run['seconds']:.0f} s in {run['steps']} steps", flush=True)


def _shortened(start: Start) -> Start:
    """The same with few clips and prompts."""
    return start._replace(trained=start.trained[:4], held_out=start.held_out[:2])


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    results: dict[str, Any] = {"references": {}, "runs": {}}
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else results


def _add(folder: Path, **parts: Mapping[str, Any]) -> None:
    """Add references or runs to the results, and write table and figure of all."""
    with FileLock(folder / "results.lock"):
        results = _results(folder)
        for part, entries in parts.items():
            results[part].update(entries)
        write_whole(folder / "results.json", f"{json.dumps(results, indent=1)}\n".encode())
        if results["runs"]:
            write_whole(folder / "table.md", as_markdown(**results).encode())
            write_whole(folder / "figure.svg", as_svg(results["runs"], list(results["references"])))


@contextmanager
def _taken(path: Path) -> Iterator[bool]:
    """Whether this process has taken a run, which it then keeps within this context."""
    path.parent.mkdir(exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("controlled"), help="folder for everything")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all")
    parser.add_argument("--starts", nargs="+", choices=tuple(starts()), default=tuple(starts()))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2")
    parser.add_argument("--steps", type=int, help="of every run; default: those of its start")
    parser.add_argument("--threads", type=int, default=1, help="of this process")
    parser.add_argument("--quick", action="store_true", help="few steps, arms, clips and prompts, and one seed")
    options = parser.parse_args()
    if options.quick:
        options.arms, options.seeds, options.steps = options.arms or QUICK_ARMS, options.seeds or (0,), QUICK_STEPS
    options.arms, options.seeds = options.arms or tuple(ARMS), options.seeds or (0, 1, 2)
    options.output.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
