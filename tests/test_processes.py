"""Several processes: they learn the same as one, switch at the same step, and split weights and work."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import RunCrepa
from safetensors.torch import load_file

from crepa_cli.report.metrics import read_held_out, read_metrics

CREPA = [sys.executable, "-m", "crepa_cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "crepa_cli"]
DEMO = ["train", "--profile", "t2v", "--model", "wan", "--demo", "--plain"]
DEMO += ["--set", "validation.every=0", "--set", "train.batch_size=1"]
LORA = "weights/pytorch_lora_weights.safetensors"
FULL = "weights/transformer/diffusion_pytorch_model.safetensors"


def crepa(folder: Path, *arguments: str | Path, launcher: list[str] = CREPA, **environment: str) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def held_out(run: Path) -> dict[int, float]:
    """The losses of held-out clips, by step."""
    return {one.step: one.loss for one in read_held_out(run / "metrics.jsonl")}


@pytest.fixture(scope="session", name="known")
def _known(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    """Copies of three of the demo's clips, which two processes cannot share out evenly."""
    folder = tmp_path_factory.mktemp("known")
    for path in (demo / "crepa-demo/scenes").glob("clip-0[036].*"):
        shutil.copy(path, folder)
    return folder


def largest_difference(ours: Path, theirs: Path) -> float:
    first, second = load_file(ours), load_file(theirs)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_go_on_after_the_cutoff(
    demo: Path, known: Path, tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process that accumulates two micro-batches has the same global batch; two processes fill the cache.

    The two keep frozen weights and hidden states on the host.
    """
    cutoff = ["crepa.similarity_threshold=0.12", "crepa.similarity_ema_decay=0.5", "crepa.warmup_steps=2"]
    validation = [f"data.validation_path={known}", "validation.every=99", "validation.steps=1", "validation.frames=5"]
    flags = [*DEMO, "--steps", "28", *(word for setting in cutoff + validation for word in ("--set", setting))]
    monkeypatch.chdir(demo)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_crepa(*flags, "--output", one, "--set", "train.gradient_accumulation=2") == 0
    cache = tmp_path / "cache"
    others = ["train.ema=0.9", "memory.stream_weights=true", "memory.offload_activations=true", f"data.cache={cache}"]
    others += ["memory.finer_recompute=true"]
    sets = [word for setting in others for word in ("--set", setting)]
    crepa(demo, *flags, "--output", two, "--processes", "2", *sets)

    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    # At the end, one of them keeps an average of the weights.
    assert held_out(two)[0] == pytest.approx(held_out(one)[0], abs=1e-5)
    assert list(held_out(two)) == [0, 28]
    first, second = (
        [line["crepa_similarity"] is None for line in read_metrics(run / "metrics.jsonl")] for run in (one, two)
    )
    assert first == second
    assert sum(second) >= 20, "steps after the cutoff"
    average = two / "checkpoints/step-000028/average.safetensors"
    assert all(tensor.isfinite().all() for tensor in load_file(average).values())
    by_one = demo / "crepa-demo/scenes/.crepa-cache"
    filled = [path.relative_to(cache) for path in cache.rglob("*.safetensors")]
    assert {path.parts[0] for path in filled} == {"prompts", "latents", "features"}
    assert all(largest_difference(cache / path, by_one / path) == 0 for path in filled)


@pytest.mark.slow
def test_sharded_processes_save_what_one_process_does(demo: Path, known: Path, tmp_path: Path) -> None:
    """With accumulation; a single process also resumes from their checkpoint, with the same result."""
    settings = ["adapter.kind=full", "train.learning_rate=1e-3", "checkpoints.every=2", "train.ema=0.9"]
    settings += ["adapter.export_dtype=float32", f"data.validation_path={known}"]
    settings += ["validation.every=3", "validation.steps=2"]
    sets = [word for setting in settings for word in ("--set", setting)]
    one, two = tmp_path / "one", tmp_path / "two"
    crepa(demo, *DEMO, "--steps", "4", *sets, "--set", "train.gradient_accumulation=4", "--output", one)
    sharding = ["--set", "train.sharding=true", "--set", "train.gradient_accumulation=2"]
    sharding += ["--set", "memory.offload_activations=true", "--set", "memory.finer_recompute=true"]
    told = crepa(demo, *DEMO, "--steps", "4", *sets, *sharding, "--output", two, launcher=TORCHRUN)

    here, total = (int(number.replace(",", "")) for number in _share(told))
    assert here == pytest.approx(total / 2, rel=0.02)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert held_out(two) == pytest.approx(held_out(one), abs=1e-5)
    assert list(held_out(two)) == [0, 3, 4]
    assert largest_difference(one / FULL, two / FULL) < 1e-5

    shutil.rmtree(two / "checkpoints/step-000004")
    alone = ["--set", "train.sharding=false", "--set", "train.gradient_accumulation=4"]
    alone += ["--set", "memory.offload_activations=false"]
    crepa(demo, "train", "--resume", "--plain", "--output", two, *alone)
    assert largest_difference(one / FULL, two / FULL) < 1e-5


def _share(told: str) -> tuple[str, str]:
    found = re.search(r"this process holds ([\d,]+) of ([\d,]+) weights", told)
    assert found, told
    return found[1], found[2]


def test_sharding_without_processes_is_a_mistake(
    demo: Path, tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    assert run_crepa(*DEMO, "--set", "train.sharding=true", "--output", tmp_path / "run") == 2
    assert "--processes" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_asks_for_other_sharding_is_refused(
    variable: str, demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    monkeypatch.setenv(variable, "true")
    assert run_crepa(*DEMO) == 2
    assert "train.sharding = true" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mistake_is_told_once(demo: Path) -> None:
    command = [*CREPA, *DEMO, "--processes", "2", "--set", "crepa.block_index=99"]
    done = subprocess.run(command, cwd=demo, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("99") == 1


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_of_all_processes(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*CREPA, *DEMO, "--processes", "2", "--output", str(run)]
    process = subprocess.Popen(command, cwd=demo, stdout=subprocess.DEVNULL)
    while len(read_metrics(run / "metrics.jsonl")) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{len(losses(run)):06d}"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(checkpoint / "model.safetensors").values())
