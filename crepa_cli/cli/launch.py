"""Runs one command in several processes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

GRACE_SECONDS = 60.0
"""How long the other processes may continue after one has failed: long enough to report their own errors."""


def launched() -> bool:
    """Whether a launcher started this process: `launch`, torchrun or accelerate."""
    return "WORLD_SIZE" in os.environ


def launch(processes: int) -> int:
    """Run the current command in several processes and return the first nonzero exit code.

    The processes find each other as torchrun's do. Torchrun's agent is not used because it hides exit codes, and kills
    processes that take more than half a minute to save a checkpoint.
    """
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    # By default, every process would use all cores.
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "crepa_cli", *sys.argv[1:]]
    started = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]

    def forward(number: int, _frame: object) -> None:
        for process in started:
            process.send_signal(number)

    # A terminal sends Ctrl-C to all processes itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, forward)
    return _wait(started)


def _wait(started: list[subprocess.Popen[bytes]]) -> int:
    deadline = None
    while any(process.poll() is None for process in started):
        codes = [process.returncode for process in started]
        if deadline is None and any(codes):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.1)
    # The exit code of a process killed because another failed does not show the reason.
    codes = [process.returncode for process in started]
    failed = [code for code in codes if code > 0] or [128 - code for code in codes if code < 0]
    return failed[0] if failed else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
