"""Tiny checkpoints in the published layout and small clips, created once per session."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from hub_stub import HubStub, running_stub
from torch import Tensor

from crepa_cli.cli import main
from crepa_cli.data.video import write_video
from crepa_cli.demo import write_tiny
from crepa_cli.demo.teacher import write_tiny_dinov2
from crepa_cli.demo.tiny import write_once
from crepa_cli.hub import question, transfer
from crepa_cli.hub.question import ask_anew
from crepa_cli.models import FAMILIES, load_family
from crepa_cli.models.family import Family

# Tensors of tiny models are faster on one thread than shared out, here and in the commands that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

CREPA = [sys.executable, "-m", "crepa_cli"]


@pytest.fixture(scope="session", autouse=True)
def _no_predictions_of_earlier_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Predictions of memory are kept in a folder of this test run."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("user-cache"))


@pytest.fixture(autouse=True)
def _no_answers_of_the_hub() -> None:
    """Every test stands for a process, which remembers what the Hub has said."""
    ask_anew()


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """A Hub that this process asks, with an empty cache."""
    with running_stub() as server:
        template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(question, "TIMEOUTS", (0.3, 0.6))
        monkeypatch.setattr(transfer, "PAUSES", (0.01,) * 5)
        monkeypatch.setattr(transfer, "LONGEST_PAUSE", 0.01)
        ask_anew()
        yield server
        ask_anew()


QUICK_FAMILIES = {"wan", "ltxvideo", "cogvideox"}
"""Those of the default tier in tests that run for each family: the oldest, packed latents, and v-prediction."""

WITH_IMAGES = [name for name in FAMILIES if "i2v" in load_family(name).pipelines]
"""Those that generate from an image too."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the other families of tests that run for each family to the slow tier."""
    others = FAMILIES.keys() - QUICK_FAMILIES
    for item in items:
        case = getattr(item, "callspec", None)
        if case is not None and others & set(case.id.split("-")):
            item.add_marker(pytest.mark.slow)


OpenTiny = Callable[[str, str], Family]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for tiny checkpoints."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def open_tiny(checkpoints: Path) -> OpenTiny:
    """Opens the tiny checkpoint of a family for a task."""

    def open_family(name: str, task: str) -> Family:
        family = load_family(name)
        folder = write_once(checkpoints / f"{name}-{task}", lambda path: write_tiny(name, path, task))
        opened = family(str(folder), task)
        # Captions of a thousand tokens are too many for a step in a moment.
        if name == "ltx2":
            vars(opened)["caption_tokens"] = 128  # the fewest that it takes
        if name == "hunyuanvideo15":
            vars(opened)["caption_lengths"] = 64, 8
        return opened

    return open_family


@pytest.fixture(scope="session")
def tiny_dinov2(checkpoints: Path) -> Path:
    """A tiny teacher."""
    return write_once(checkpoints / "dinov2", write_tiny_dinov2)


@pytest.fixture(scope="session")
def short_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of nine frames of 32 x 32, with captions."""
    folder = tmp_path_factory.mktemp("waves")
    frames = ((moving_pattern(13, 32, 32) + 1) * 127.5).byte().permute(1, 0, 2, 3)
    for index in range(3):
        write_video(folder / f"{index}.mp4", frames[2 * index : 2 * index + 9], 8)
        (folder / f"{index}.txt").write_text(f"wave {index}")
    return folder


def moving_pattern(frames: int, height: int, width: int) -> Tensor:
    """A video of drifting colored waves, `[3, F, H, W]` in [-1, 1]."""
    time = torch.arange(frames).view(1, -1, 1, 1) / 8
    rows = torch.arange(height).view(1, 1, -1, 1) / height
    columns = torch.arange(width).view(1, 1, 1, -1) / width
    color = torch.arange(3).view(-1, 1, 1, 1)
    return torch.sin(2 * math.pi * (2 * columns + (1 + color) * rows + 0.3 * color) + time * (1 + color))


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate allows one precision per process; each run of a test stands for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """Ctrl-C as in a terminal. A shell script starts its background jobs, and so their tests, with SIGINT ignored."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


RunCrepa = Callable[..., int]


@pytest.fixture
def run_crepa(monkeypatch: pytest.MonkeyPatch) -> RunCrepa:
    """Runs the command line in this process and returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["crepa", *map(str, arguments)])
        # Accelerate allows one precision per process; each run of a test stands for a process.
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            with pytest.raises(SystemExit) as exit_:
                main()
        finally:
            logging.captureWarnings(False)
        return int(exit_.value.code or 0)

    return run


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder in which `crepa train --profile t2v --model wan --demo` has run once, as a user would run it.

    The workers of a test run share it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "demo"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            command = [*CREPA, "train", "--profile", "t2v", "--model", "wan", "--demo", "--plain"]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder
