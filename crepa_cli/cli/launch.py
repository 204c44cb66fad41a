"""Runs one command in several processes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

from crepa_cli.errors import UserError
from crepa_cli.signals import handled

GRACE_SECONDS = 60.0
"""How long the others may continue after one process has failed: long enough to report what they know."""


def launched() -> bool:
    """Whether a launcher started this process: `launch`, torchrun or accelerate."""
    return "WORLD_SIZE" in os.environ


def check_processes(processes: int) -> None:
    """Check that this machine can train in several processes: each needs a GPU, and all of them NCCL.

    Raises:
        UserError: if it cannot.
    """
    import torch

    devices = torch.cuda.device_count()
    if processes == 1 or not devices:
        return
    if devices < processes:
        raise UserError(f"--processes {processes}: this machine has {devices} GPUs, and each process needs its own")
    if not torch.distributed.is_nccl_available():
        raise UserError(
            f"--processes {processes}: this torch has no NCCL, which GPUs train together with; there is none for "
            "Windows. Train in one process (leave --processes out), or run crepa in WSL2"
        )


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
    # On Windows only the leader of a process group can be sent Ctrl-Break; the console sends it no Ctrl-C then.
    group: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    started = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, creationflags=group)
        for rank in range(processes)
    ]
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        if sys.platform == "win32":
            # Any other signal kills at once, which is what a second Ctrl-C asks for.
            request = signal.SIGTERM if number == signal.SIGINT in received else signal.CTRL_BREAK_EVENT
        elif number == signal.SIGINT:
            return  # The terminal has sent it to all of them.
        else:
            request = number
        received.append(number)
        for process in started:
            process.send_signal(request)

    with handled(forward):
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
