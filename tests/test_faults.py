"""Faults of rented machines: non-finite numbers, damaged files, full disks, errors in the middle of a run."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import CREPA, RunCrepa
from safetensors.torch import load_file

from crepa_cli.data.cache import Cache
from crepa_cli.events import StepDone, TrainingStarted
from crepa_cli.report.metrics import MetricsFile, read_metrics
from crepa_cli.training.checkpoints import checkpoints_in, newest_checkpoint
from crepa_cli.training.skipped import SkippedSteps

DEMO = ["train", "--profile", "t2v", "--model", "wan", "--demo", "--plain", "--set", "validation.every=0"]
DEMO += ["--set", "train.batch_size=1"]
WEIGHTS = "weights/pytorch_lora_weights.safetensors"


@pytest.fixture(name="in_demo")
def _in_demo(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)


@pytest.fixture
def stopped_run(demo: Path, tmp_path: Path) -> Path:
    """A run with checkpoints after 20 and 40 of 60 steps."""
    run = shutil.copytree(demo / "runs/wan-t2v-1", tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step-000060")
    return run


def finite(path: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def spoil_at_start(
    monkeypatch: pytest.MonkeyPatch, cache: Path, kind: str, name: str, value: float, *, entries: int
) -> None:
    """Spoil cached tensors once the preparation has checked them."""
    write = MetricsFile.__call__

    def spoil_first(self: MetricsFile, event: Any) -> None:
        write(self, event)
        if isinstance(event, TrainingStarted):
            spoil(cache, kind, name, value, entries=entries)

    monkeypatch.setattr(MetricsFile, "__call__", spoil_first)


def spoil(cache: Path, kind: str, name: str, value: float, *, entries: int) -> None:
    """Put a value into the tensor `name` of the first entries of a kind, with a correct checksum."""
    store = Cache(cache)
    for path in sorted((cache / kind).rglob("*.safetensors"))[:entries]:
        tensors = {key: tensor.clone() for key, tensor in store.read(kind, path.stem).items()}
        tensors[name].view(-1)[0] = value
        store.write(kind, path.stem, tensors)


SPOILED = {
    "the diffusion loss of": ("latents", "latents", math.nan),
    "the crepa loss of": ("features", "features", math.inf),
}


@pytest.mark.slow
@pytest.mark.usefixtures("in_demo")
@pytest.mark.parametrize("term", SPOILED)
def test_a_step_that_is_not_finite_is_skipped_and_names_term_and_clip(
    term: str, tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of eight clips are corrupt; no non-finite number reaches weights, averages or schedule."""
    # A cache of its own: that of the demo also holds what other tests have put there.
    cache = tmp_path / "cache"
    kind, name, value = SPOILED[term]
    spoil_at_start(monkeypatch, cache, kind, name, value, entries=2)
    run = tmp_path / "run"
    flags = ["--steps", 10, "--set", f"data.cache={cache}", "--set", "train.ema=0.9", "--set", "checkpoints.every=1"]
    flags += ["--set", "checkpoints.keep=10", "--set", "crepa.similarity_threshold=0.9", "--output", run]
    flags += ["--set", "train.batch_size=2"]
    assert run_crepa(*DEMO, *flags) == 0
    lines = read_metrics(run / "metrics.jsonl")
    skipped = [line for line in lines if line["skipped"]]
    assert 0 < len(skipped) < len(lines) == 10
    for line in skipped:
        assert line["skipped"].startswith(f"{term} clip-")
        assert line["loss"] is line["grad_norm"] is None
        before, after = (run / "checkpoints" / f"step-{line['step'] + more:06d}" for more in (0, 1))
        if before.exists():
            states = [load_file(checkpoint / "model.safetensors") for checkpoint in (before, after)]
            assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for checkpoint in checkpoints_in(run / "checkpoints"):
        assert all(finite(checkpoint / f"{part}.safetensors") for part in ("model", "optimizer", "average"))
        average = json.loads((checkpoint / "state.json").read_text())["progress"]["schedule"]["similarity_ema"]
        assert average is None or math.isfinite(average)
    assert finite(run / WEIGHTS)


@pytest.mark.usefixtures("in_demo")
def test_a_gradient_that_overflows_is_not_taken(
    tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the third step is fine, and one number of its gradient is not."""
    clip, steps = Accelerator.clip_grad_norm_, []

    def overflow(self: Accelerator, parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        steps.append(parameters)
        # The projector's gradient is clipped after the adapter's in each step.
        if len(steps) == 5:
            gradient = parameters[0].grad
            assert gradient is not None
            gradient.view(-1)[0] = math.inf
        return clip(self, parameters, max_norm)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", overflow)
    run = tmp_path / "run"
    assert run_crepa(*DEMO, "--steps", 4, "--output", run) == 0
    skipped = [line["skipped"] for line in read_metrics(run / "metrics.jsonl")]
    assert skipped[2].startswith("the gradient of clip-")
    assert skipped[:2] == [None, None]
    assert finite(run / WEIGHTS)


@pytest.mark.usefixtures("in_demo")
def test_too_many_steps_that_are_not_finite_end_the_run(
    tmp_path: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree("crepa-demo/scenes/.crepa-cache", tmp_path / "cache")
    spoil_at_start(monkeypatch, cache, "latents", "latents", math.nan, entries=1000)
    flags = ["--set", f"data.cache={cache}", "--set", "train.max_skipped_steps=2", "--output", tmp_path / "run"]
    assert run_crepa(*DEMO, *flags) == 1
    message = capsys.readouterr().err
    assert "step 2: the diffusion loss of clip-" in message
    assert "3 consecutive steps were skipped" in message
    checkpoint, damaged = newest_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint == tmp_path / "run/checkpoints/step-000003"
    assert finite(checkpoint / "model.safetensors")
    assert not damaged


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Any] = {
    "a flipped bit of the weights": ("model.safetensors", flip_a_bit),
    "a shorter optimizer": ("optimizer.safetensors", truncate),
    "a missing file": ("optimizer.safetensors", Path.unlink),
    "a flipped bit of the manifest": ("manifest.json", flip_a_bit),
    "a missing manifest": ("manifest.json", Path.unlink),
    "another progress": ("state.json", flip_a_bit),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage: str, stopped_run: Path) -> None:
    name, spoil_file = DAMAGES[damage]
    folder = stopped_run / "checkpoints"
    spoil_file(folder / "step-000040" / name)
    found, messages = newest_checkpoint(folder)
    assert found == folder / "step-000020"
    (message,) = messages
    assert "step-000040 is damaged" in message
    assert checkpoints_in(folder) == [found]
    assert (folder / "step-000040.damaged").is_dir()


@pytest.mark.usefixtures("in_demo")
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(
    stopped_run: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_bit(stopped_run / "checkpoints/step-000040/model.safetensors")
    (stopped_run / "checkpoints/step-000050.partial").mkdir()
    flags = ["--steps", 22, "--set", "validation.every=0", "--set", "crepa.decay_steps=50", "--plain"]
    assert run_crepa("train", "--resume", "--output", stopped_run, *flags) == 0
    told = capsys.readouterr().out
    assert "step-000040 is damaged (model.safetensors not as written)" in told
    assert "training from step 20" in told
    assert not list((stopped_run / "checkpoints").glob("*.partial"))


@pytest.mark.usefixtures("in_demo")
def test_a_run_without_a_whole_checkpoint_starts_over(
    stopped_run: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(stopped_run / "checkpoints")
    flags = ["--steps", 1, "--set", "validation.every=0", "--plain"]
    assert run_crepa("train", "--resume", "--output", stopped_run, *flags) == 0
    assert "no complete checkpoint: it starts from step 0" in capsys.readouterr().out
    assert len(read_metrics(stopped_run / "metrics.jsonl")) == 1


@pytest.mark.usefixtures("in_demo")
def test_an_error_saves_a_checkpoint_first(
    tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = MetricsFile.__call__

    def fail_at_step_3(self: MetricsFile, event: Any) -> None:
        write(self, event)
        if isinstance(event, StepDone) and event.step == 3:
            raise OSError("the disk is gone")

    monkeypatch.setattr(MetricsFile, "__call__", fail_at_step_3)
    with pytest.raises(OSError, match="the disk is gone"):
        run_crepa(*DEMO, "--output", tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run/checkpoints") == (tmp_path / "run/checkpoints/step-000004", [])


@pytest.mark.usefixtures("in_demo")
def test_entries_that_vanish_during_a_run_cost_no_step(
    tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cache = shutil.copytree("crepa-demo/scenes/.crepa-cache", tmp_path / "cache")
    write = MetricsFile.__call__

    def delete_after_step_2(self: MetricsFile, event: Any) -> None:
        write(self, event)
        if isinstance(event, StepDone) and event.step == 2:
            shutil.rmtree(cache / "latents")

    monkeypatch.setattr(MetricsFile, "__call__", delete_after_step_2)
    assert run_crepa(*DEMO, "--output", tmp_path / "run", "--set", f"data.cache={cache}") == 2
    message = capsys.readouterr().err
    assert "missing entries are computed again" in message
    checkpoint, _ = newest_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint is not None
    assert f"A checkpoint was saved first: {checkpoint}" in " ".join(message.split())
    steps = json.loads((checkpoint / "state.json").read_text())["progress"]["step"]
    assert steps == len(read_metrics(tmp_path / "run/metrics.jsonl"))


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_before_it(demo: Path, stopped_run: Path) -> None:
    """A file size limit simulates a full disk; only the optimizer's state exceeds it, not the weights."""
    resource = pytest.importorskip("resource")
    limit = (stopped_run / "checkpoints/step-000040/model.safetensors").stat().st_size + 1000

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    before = {path: path.read_bytes() for path in (stopped_run / "checkpoints").rglob("*.*")}
    command = [sys.executable, "-m", "crepa_cli", "train", "--resume", "--output", str(stopped_run), "--steps", "41"]
    command += ["--set", "crepa.decay_steps=50", "--plain"]
    done = subprocess.run(command, cwd=demo, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert done.returncode == 2, done.stderr
    message = " ".join(done.stderr.split())
    assert "step-000041 cannot be written: File too large. It needs " in message
    assert "Make room there" in message
    assert "Traceback" not in message
    assert {path: path.read_bytes() for path in (stopped_run / "checkpoints").rglob("*.*")} == before


@pytest.mark.slow
@pytest.mark.usefixtures("in_demo")
def test_out_of_memory_says_what_is_held_and_what_would_lower_it(
    tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the third step, the CPU allocator is asked for more memory than any machine has."""
    attend, calls = F.scaled_dot_product_attention, []

    def hungry(*arguments: Any, **settings: Any) -> torch.Tensor:
        calls.append(arguments)
        torch.empty(2**48 if len(calls) == 100 else 0)
        return attend(*arguments, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", hungry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    # Each setting that could be lighter takes seconds to predict.
    lighter = ["train.activation_checkpointing=false", "adapter.rank=4", "crepa.spatial_align=false"]
    lighter = [word for setting in lighter for word in ("--set", setting)]
    assert run_crepa(*DEMO, "--output", tmp_path / "run", *lighter) == 1
    message = capsys.readouterr().err
    held = [
        size
        for part in ("weights", "adapter", "gradients", "optimizer", "activations", "alignment")
        for size in re.findall(rf"{part}: ([\d.]+ [kM]?B|\d+ bytes)", message)
    ]
    assert len(held) == 6, message
    advice = [float(saved) for saved in re.findall(r"--set \S+ saves ([\d.]+) [kM]B", message)]
    assert "--set train.activation_checkpointing=true saves" in message
    assert len(advice) >= 3
    assert "cost the least time: --set train.activation_checkpointing=true" in " ".join(message.split())
    checkpoint, _ = newest_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint is not None
    assert f"A checkpoint was saved first: {checkpoint}" in message


@pytest.mark.slow
def test_two_runs_fill_one_cache_at_once(demo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crepa_cli", *DEMO, "--cache-only", "--set", f"data.cache={tmp_path / 'cache'}"]
    both = [subprocess.Popen(command, cwd=demo, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    store = Cache(tmp_path / "cache", on_damage=lambda path, reason: pytest.fail(f"{path}: {reason}"))
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        assert store.has(path.parts[-3], path.stem)
    assert not list((tmp_path / "cache").rglob(".*.tmp"))


KILLS = {
    "at random moments": ["--count", "2"],
    "at the cutoff, with 8-bit AdamW and one checkpoint kept": [
        *("--count", "1", "--at", "alignment turned off"),
        *("--set", "checkpoints.every=1", "--set", "checkpoints.keep=1"),
        *("--set", "train.optimizer=adamw8bit", "--set", "adapter.rank=128"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
def test_killed_runs_end_as_if_they_had_not_been(kills: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, script, *KILLS[kills]], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_bad_clip_ends_the_run_although_no_two_bad_steps_follow_each_other() -> None:
    skipped = SkippedSteps(allowed=2)
    for _ in range(3):
        assert skipped.excess() is None
        skipped.good(["a.mp4", "b.mp4"])
        skipped.bad(["bad.mp4", "a.mp4"])
    assert skipped.excess() == "the last 3 steps with bad.mp4 were skipped"
    assert SkippedSteps(2, skipped.state_dict()).excess() == skipped.excess()


def test_a_damaged_checkpoint_does_not_make_new_ones_disappear(
    stopped_run: Path, run_crepa: RunCrepa, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damaged one has the highest number, and one checkpoint is kept."""
    monkeypatch.chdir(demo)
    flip_a_bit(stopped_run / "checkpoints/step-000040/model.safetensors")
    flags = ["--steps", 22, "--set", "validation.every=0", "--set", "checkpoints.keep=1", "--plain"]
    assert run_crepa("train", "--resume", "--output", stopped_run, *flags) == 0
    assert [path.name for path in checkpoints_in(stopped_run / "checkpoints")] == ["step-000022"]


@pytest.mark.slow
def test_an_error_that_nobody_expects_ends_with_the_name_of_the_checkpoint(demo: Path, tmp_path: Path) -> None:
    """The metrics file becomes a folder in the middle of a run."""
    run = tmp_path / "run"
    flags = ["--steps", "1000", "--set", "report.every=1", "--output", str(run)]
    with subprocess.Popen(
        [*CREPA, *DEMO, *flags], cwd=demo, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("step 2 ") for line in process.stdout)
        process.send_signal(signal.SIGSTOP)
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").mkdir()
        process.send_signal(signal.SIGCONT)
        printed = process.stdout.read()
    (checkpoint,) = checkpoints_in(run / "checkpoints")
    assert process.returncode == 1
    assert printed.splitlines()[-1] == f"A checkpoint was saved first: {checkpoint}"
