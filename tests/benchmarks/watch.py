"""What `crepa watch` costs the run it shows: `python tests/benchmarks/watch.py [--blocks COUNT] [--seconds SECONDS]`.

A demo is trained, and a watcher of it in a pseudo-terminal is stopped and continued in turn (SIGSTOP, SIGCONT). Printed
are the median step times of each pair of blocks and their ratio, and the processor's share of the watcher. Then:
seconds of reading a run of 1,000 and of 100,000 steps, and of drawing it once. It needs Linux.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import pty
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from crepa_cli.cli.watch import _Clock, _update
from crepa_cli.events import RunOpened, StepDone, TrainingStarted
from crepa_cli.report.dashboard import Dashboard
from crepa_cli.report.events_file import EventsFile
from crepa_cli.report.metrics import MetricsFile
from crepa_cli.report.watch import WatchedRun
from crepa_cli.runs.folder import RunFolder
from crepa_cli.settings import resolve
from crepa_cli.training.build import coefficient_schedule

CREPA = [sys.executable, "-m", "crepa_cli"]
DEMO = ["--profile", "t2v", "--model", "wan", "--demo", "--set", "validation.every=0", "--set", "checkpoints.every=0"]
TRAIN = [*CREPA, "train", *DEMO, "--plain", "--steps", "100000", "--output", "run"]
SIZE = 120, 40
FIRST_STEPS = 10
"""Steps until the run is even."""
DRAWINGS = 20


def step_seconds(run: RunFolder) -> list[float]:
    """The time of each step so far."""
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else []
    return [json.loads(line)["step_seconds"] for line in lines if line.endswith("}")]


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class Screen:
    """A pseudo-terminal whose output is read and counted."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", SIZE[1], SIZE[0], 0, 0))
        self.written = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while chunk := os.read(self.master, 1 << 16):
            self.written += len(chunk)


def watched_steps(folder: Path, blocks: int, seconds: float) -> None:
    """Print the step times of a run with and without a watcher."""
    run, screen = RunFolder(folder / "run"), Screen()
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"TERM": "xterm-256color"}
    with ExitStack() as stack:
        training = subprocess.Popen(TRAIN, cwd=folder, stdout=subprocess.DEVNULL)
        stack.callback(training.wait)
        stack.callback(training.kill)
        while len(step_seconds(run)) < FIRST_STEPS:
            time.sleep(1)
        watcher = subprocess.Popen(
            [*CREPA, "watch", "run"],
            cwd=folder,
            env=environment,
            stdin=screen.slave,
            stdout=screen.slave,
            stderr=screen.slave,
            start_new_session=True,
        )
        stack.callback(watcher.wait)
        stack.callback(watcher.kill)
        # The first drawing.
        while screen.written < SIZE[0] * SIZE[1]:
            time.sleep(1)
        ratios, shares = [], []
        for block in range(blocks):
            times = {}
            for watches in (True, False) if block % 2 else (False, True):
                watcher.send_signal(signal.SIGCONT if watches else signal.SIGSTOP)
                # What a watcher has to read after its stop, and the step that the change falls into.
                time.sleep(2)
                before, spent, start = len(step_seconds(run)), processor_seconds(watcher), time.monotonic()
                time.sleep(seconds)
                if watches:
                    shares.append((processor_seconds(watcher) - spent) / (time.monotonic() - start))
                times[watches] = statistics.median(step_seconds(run)[before:])
            ratios.append(times[True] / times[False])
            print(f"{times[True]:.4f} s watched, {times[False]:.4f} s not: ratio {ratios[-1]:.4f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.4f}; share of one core {statistics.mean(shares):.4f}", flush=True)


def long_run(folder: Path, steps: int) -> str:
    """The seconds of reading and of drawing a run of so many steps, as a line."""
    profile = resolve("t2v", {"model.family": "wan"}, [f"train.steps={2 * steps}"], demo=True).profile
    run = RunFolder(folder)
    EventsFile(run.events)(RunOpened(run.path, 0, "", "tiny, t2v", "1 x CPU"))
    EventsFile(run.events)(TrainingStarted(run.path, 0, 2 * steps, 8, 2, 100))
    metrics = MetricsFile(run.metrics)
    metrics(
        StepDone(
            step=0,
            loss=1.0,
            diffusion_loss=1.0,
            crepa_loss=-0.5,
            crepa_similarity=0.5,
            crepa_similarity_ema=0.5,
            crepa_coefficient=0.2,
            crepa_cutoff=False,
            layersync_loss=None,
            learning_rate=1e-4,
            grad_norm=0.1,
            projector_grad_norm=0.1,
            step_seconds=0.3,
            samples_per_second=3.0,
            peak_memory_bytes=10**9,
        )
    )
    line = json.loads(run.metrics.read_text(encoding="utf-8"))
    lines = (json.dumps(line | {"step": step}) for step in range(steps))
    run.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    clock, console = _Clock(), Console(file=io.StringIO(), width=SIZE[0], height=SIZE[1], force_terminal=True)
    dashboard, watched = Dashboard(console, coefficient_schedule(profile), clock=clock), WatchedRun(run, profile)
    start = time.process_time()
    _update([watched], dashboard, clock)
    read = time.process_time()
    for _ in range(DRAWINGS):
        clock.moment = None
        _update([watched], dashboard, clock)
        console.print(dashboard)
    drawn = (time.process_time() - read) / DRAWINGS
    return f"{steps:,} steps: {read - start:.3f} s to read once, {drawn:.4f} s for each drawing"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=15)
    arguments = parser.parse_args()
    for steps in (1000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            print(long_run(Path(folder), steps), flush=True)
    if arguments.blocks:
        with tempfile.TemporaryDirectory() as folder:
            watched_steps(Path(folder), arguments.blocks, arguments.seconds)


if __name__ == "__main__":
    main()
