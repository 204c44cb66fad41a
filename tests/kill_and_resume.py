"""Kill a run at random moments and resume it each time: its result must equal that of an uninterrupted run.

    python tests/kill_and_resume.py --count 30
    python tests/kill_and_resume.py --count 3 --at "alignment turned off" --set checkpoints.every=1
    python tests/kill_and_resume.py --count 10 --set train.optimizer=adamw8bit --set adapter.rank=128
    python tests/kill_and_resume.py --count 10 --set model.variant=both --set model.checkpoint=/tiny/wan2.2

The demo's run is killed (with SIGKILL, which a process cannot catch) after a random time: during preparation, a step, a
checkpoint, a validation or the export. With `--at` it is killed as soon as it prints a line with these words. It is
started again with `--resume` until it ends. Then its weights, optimizer state, weight average and metrics are compared
bit for bit with those of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from crepa_cli.report.metrics import read_metrics

RUN = Path("runs/killed")
TRAIN = [sys.executable, "-u", "-m", "crepa_cli", "train", "--plain"]
SETTINGS = [
    *("--profile", "t2v", "--model", "wan", "--demo", "--steps", "12"),
    *("--set", "train.batch_size=1"),
    *("--set", "checkpoints.every=2", "--set", "validation.every=6", "--set", "validation.steps=2"),
    *("--set", "train.ema=0.9", "--set", "adapter.dropout=0.1"),
    *("--set", "crepa.similarity_threshold=0.08", "--set", "crepa.similarity_ema_decay=0.9"),
]
EXACT = ("step", "loss", "crepa_similarity_ema", "crepa_coefficient", "crepa_cutoff", "learning_rate", "grad_norm")
MOST_SESSIONS = 40


def command(settings: list[str]) -> list[str]:
    """The command that a user types: start the run, or resume it."""
    if (RUN / "profile.toml").exists():
        return [*TRAIN, "--resume", "--output", str(RUN)]
    return whole_run(RUN, settings)


def whole_run(output: Path, settings: list[str]) -> list[str]:
    """The command that starts a run."""
    sets = [word for setting in settings for word in ("--set", setting)]
    return [*TRAIN, *SETTINGS, *sets, "--output", str(output)]


def session(settings: list[str], kill_after: float | None, kill_at: str | None) -> tuple[bool, str]:
    """Run a command and kill it after some seconds, or at a line with some words.

    Returns:
        Whether it finished by itself, and its output.
    """
    process = subprocess.Popen(command(settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output = read_until(process, kill_at) if kill_at else process.communicate(timeout=kill_after)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return False, process.communicate()[0]
    if process.returncode == -signal.SIGKILL:
        return False, output
    if process.returncode:
        raise SystemExit(f"a resumed run failed with exit code {process.returncode}:\n{output}")
    return True, output


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """The output of a process, which is killed at the first line with these words."""
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        if words in line:
            process.kill()
    process.wait()
    return "".join(lines)


def last_event(output: str) -> str:
    """The last line that the run printed."""
    lines = output.strip().splitlines()
    return lines[-1] if lines else "nothing yet"


def differences(ours: Path, theirs: Path) -> list[str]:
    """The files of two runs that are not bitwise equal."""
    patterns = ("weights/*pytorch_lora_weights.safetensors", "checkpoints/step-000012/**/*.safetensors")
    names = [str(path.relative_to(theirs)) for pattern in patterns for path in sorted(theirs.glob(pattern))]
    found = [name for name in names if not (ours / name).exists() or not same_tensors(ours / name, theirs / name)]
    if metrics(ours) != metrics(theirs):
        found.append("metrics.jsonl")
    return found


def same_tensors(ours: Path, theirs: Path) -> bool:
    """Whether two files contain the same tensors."""
    first, second = load_file(ours), load_file(theirs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(run: Path) -> list[list[Any]]:
    """The values of each step that do not depend on the machine's speed."""
    return [[line[key] for key in EXACT] for line in read_metrics(run / "metrics.jsonl")]


def kill_and_resume(count: int, seed: int, settings: list[str], kill_at: str | None) -> None:
    """Kill runs of the demo in the current folder `count` times in all.

    Args:
        count: kills.
        seed: of the times.
        settings: "table.key=value", on top of those of every run.
        kill_at: words of the line at which each run is killed once; None for random times.

    Raises:
        SystemExit: if a run cannot be resumed, or its result differs from that of the uninterrupted run.
    """
    randomness = random.Random(seed)
    whole = Path("runs/whole")
    started = time.monotonic()
    subprocess.run(whole_run(whole, settings), check=True, stdout=subprocess.DEVNULL)
    longest = time.monotonic() - started
    killed = 0
    while killed < count:
        shutil.rmtree(RUN, ignore_errors=True)
        if randomness.random() < 0.5:
            # The next run may be killed during its preparation too.
            shutil.rmtree("crepa-demo/scenes/.crepa-cache", ignore_errors=True)
        for number in range(MOST_SESSIONS):
            after = randomness.uniform(0.1, longest) if killed < count and not kill_at else None
            ended, output = session(settings, after, kill_at if number == 0 else None)
            if ended and kill_at and number == 0:
                raise SystemExit(f"the run never printed {kill_at!r}:\n{output}")
            if ended:
                break
            killed += 1
            print(f"{killed}: killed; last output: {last_event(output)}", flush=True)
        else:
            raise SystemExit(f"the run did not finish in {MOST_SESSIONS} sessions")
        if found := differences(RUN, whole):
            raise SystemExit(f"these files differ from the uninterrupted run: {', '.join(found)}")
        print(f"the result equals that of the uninterrupted run; {killed} of {count} kills so far", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30, help="total number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    parser.add_argument("--at", help="words of the line at which to kill, in place of random times")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="a setting, as table.key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        kill_and_resume(arguments.count, arguments.seed, arguments.settings, arguments.at)
