"""Runs started from Python."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import RunCrepa
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from crepa_cli import api
from crepa_cli.data.video import DECODING_VERSION, decode
from crepa_cli.errors import UserError
from crepa_cli.events import Event, Notice, RunOpened, StepDone, TrainingEnded, TrainingStarted, ValidationSampled
from crepa_cli.measures import measure
from crepa_cli.profile import Profile, dump_toml
from crepa_cli.report.card import without_folders
from crepa_cli.report.metrics import read_metrics, read_validations
from crepa_cli.runs.folder import RunFolder
from crepa_cli.training.trainer import Trainer

LORA = "pytorch_lora_weights.safetensors"
SETS = ["validation.every=0", "checkpoints.every=2", "train.batch_size=1", "train.steps=4"]


@pytest.fixture(name="in_demo")
def _in_demo(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_a_training_in_ten_lines(tmp_path: Path) -> None:
    profile = api.resolve("t2v", {"model.family": "wan"}, SETS, demo=True).profile
    events: list[Event] = []
    run = api.train(profile, output=tmp_path / "run", listeners=[events.append])
    assert (run.weights / LORA).is_file()
    assert run.card.is_file()
    assert [line["step"] for line in read_metrics(run.metrics)] == [0, 1, 2, 3]
    table = [line.split("|")[1].strip() for line in run.card.read_text().splitlines() if line.startswith("|")]
    assert table == ["step", "---", "0", "1", "2", "3"]
    assert isinstance(events[0], RunOpened)
    assert isinstance(events[-1], TrainingEnded)


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_should_stop_ends_the_run_within_a_micro_batch_and_changes_nothing(tmp_path: Path) -> None:
    """The second question of the third step comes after its first micro-batch: the step is left out whole."""
    sets = [*SETS, "train.gradient_accumulation=2"]
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    events: list[Event] = []
    asked_in_third_step: list[bool] = []

    def should_stop() -> bool:
        if any(isinstance(event, StepDone) and event.step == 1 for event in events):
            asked_in_third_step.append(True)
        return len(asked_in_third_step) == 2

    run = api.train(profile, output=tmp_path / "run", listeners=[events.append], should_stop=should_stop)
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-000002"]
    assert events[-1] == TrainingEnded(2, None)
    assert not list(run.weights.glob("*.safetensors"))
    whole = api.train(profile, output=tmp_path / "whole")
    resumed = api.train(profile, output=run.path, resume=True)
    _assert_same(resumed.weights / LORA, whole.weights / LORA)


class Reads(TorchFunctionMode):
    """Counts the reads of values out of tensors; on a GPU, the CPU waits for each of them."""

    READING = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.cpu, Tensor.numpy}

    def __init__(self, on_cpu: set[int]) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.READING and id(args[0]) not in self.on_cpu
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_a_step_waits_for_the_gpu_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step, counts = Trainer._step, []

    def counted(trainer: Trainer, *arguments: Any) -> Any:
        # AdamW counts its steps on the CPU.
        own = {id(state["step"]) for state in trainer.experts[""].learner.optimizer.state.values()}
        with Reads(own) as reads:
            done = take_step(trainer, *arguments)
        counts.append(reads.count)
        return done

    monkeypatch.setattr(Trainer, "_step", counted)
    profile = api.resolve("t2v", {"model.family": "wan"}, [*SETS, "train.ema=0.9"], demo=True).profile
    api.train(profile, output=tmp_path / "run")
    assert counts[1:] == [1, 1, 1]  # in the first step AdamW makes its state


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_an_error_of_a_listener_names_the_checkpoint_that_was_saved_first(tmp_path: Path) -> None:
    profile = api.resolve("t2v", {"model.family": "wan"}, [*SETS, "checkpoints.every=0"], demo=True).profile

    def fail(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            raise ValueError("listener")

    with pytest.raises(ValueError, match="listener") as caught:
        api.train(profile, output=tmp_path / "run", listeners=[fail])
    path = tmp_path / "run/checkpoints/step-000003"
    assert path.is_dir()
    assert caught.value.__notes__ == [f"A checkpoint was saved first: {path}"]


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_a_variable_of_accelerate_does_not_divide_the_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [*SETS, "train.steps=1", "train.gradient_accumulation=3"]
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    expected = read_metrics(api.train(profile, output=tmp_path / "plain").metrics)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    found = read_metrics(api.train(profile, output=tmp_path / "with").metrics)
    assert found[0]["grad_norm"] == expected[0]["grad_norm"] > 0


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_resumed_at_the_step_where_alignment_ends(tmp_path: Path) -> None:
    """The checkpoint still holds the projector, and the next step drops it."""
    sets = [*SETS, "crepa.cutoff_step=2", "checkpoints.keep=5"]
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    whole = api.train(profile, output=tmp_path / "whole")
    cut = shutil.copytree(whole.path, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints/step-000004")
    shutil.rmtree(cut / "weights")
    events: list[Event] = []
    resumed = api.train(profile, output=cut, resume=True, listeners=[events.append])
    assert next(event.step for event in events if isinstance(event, TrainingStarted)) == 2
    assert not any("read in another way" in event.message for event in events if isinstance(event, Notice))
    _assert_same(resumed.weights / LORA, whole.weights / LORA)
    assert read_metrics(resumed.metrics)[2:] != []
    for name in ("model", "optimizer"):
        _assert_same(*(run / f"checkpoints/step-000004/{name}.safetensors" for run in (cut, whole.path)))


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_a_resumed_run_takes_a_new_learning_rate_and_weight_decay_and_names_another_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [*SETS, "train.lr_scheduler=cosine"]
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    run = api.train(profile, output=tmp_path / "run", should_stop=_after(tmp_path / "run/checkpoints/step-000002"))
    slower = api.resolve(
        "t2v", {"model.family": "wan"}, [*sets, "train.learning_rate=2.5e-3", "train.weight_decay=0.5"], demo=True
    ).profile
    events: list[Event] = []
    with monkeypatch.context() as patch:
        patch.setattr(api, "DECODING_VERSION", DECODING_VERSION + 1)
        api.train(slower, output=run.path, resume=True, listeners=[events.append])
    assert any("read in another way" in event.message for event in events if isinstance(event, Notice))
    rates = [line["learning_rate"] for line in read_metrics(run.metrics)]
    fresh = api.train(slower, output=tmp_path / "fresh")
    assert rates[:2] == [2 * line["learning_rate"] for line in read_metrics(fresh.metrics)[:2]]
    assert rates[2:] == [line["learning_rate"] for line in read_metrics(fresh.metrics)[2:]]
    groups = json.loads((run.checkpoints / "step-000004/state.json").read_text())["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5}


def _after(path: Path) -> Callable[[], bool]:
    return path.exists


def _assert_same(ours: Path, theirs: Path) -> None:
    first, second = load_file(ours), load_file(theirs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_8_bit_adamw_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Full tuning, because state of tensors below 4,096 numbers stays in 32 bits."""
    sets = [*SETS, "train.optimizer=adamw8bit", "adapter.kind=full", "checkpoints.keep=5"]
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    whole = api.train(profile, output=tmp_path / "whole")
    saved = load_file(whole.checkpoints / "step-000002/optimizer.safetensors")
    assert torch.uint8 in {tensor.dtype for tensor in saved.values()}
    cut = shutil.copytree(whole.path, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints/step-000004")
    api.train(profile, output=cut, resume=True)
    for name in ("model", "optimizer"):
        _assert_same(*(run / f"checkpoints/step-000004/{name}.safetensors" for run in (cut, whole.path)))


def test_a_resume_names_the_settings_that_it_cannot_change(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    run = "runs/wan-t2v-1"
    saved = str(demo / run / "profile.toml")
    for changed, old in {
        "adapter.rank=4": "16",
        "adapter.kind=full": "'lora'",
        "train.optimizer=adamw8bit": "'adamw'",
        "train.ema=0.9": "0",
        "crepa.enabled=false": "True",
        "crepa.objective=relation": "'cosine'",
        "crepa.projector=conv": "'linear'",
    }.items():
        profile = api.resolve(saved, {"train.output": run}, [changed]).profile
        with pytest.raises(UserError, match=re.escape(changed.partition("=")[0])) as caught:
            api.check(profile, resume=True)
        assert f"the run was started with {old}" in str(caught.value)
    allowed = [
        "train.learning_rate=1e-5",
        "train.steps=99",
        "checkpoints.every=1",
        "validation.every=0",
        "report.every=2",
    ]
    api.check(api.resolve(saved, {"train.output": run}, allowed).profile, resume=True)


def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them look for a free folder before any of them makes one."""
    monkeypatch.chdir(tmp_path)
    profile = api.resolve("t2v", {"model.family": "wan"}).profile
    barrier, find = threading.Barrier(4), RunFolder.next

    def find_together(wanted: Profile) -> RunFolder:
        found = find(wanted)
        if found.path.name == "wan-t2v-1":
            barrier.wait()
        return found

    monkeypatch.setattr(RunFolder, "next", find_together)
    with ThreadPoolExecutor(4) as executor:
        runs = list(executor.map(lambda _: RunFolder.claim(profile), range(4)))
    assert {run.path.name for run in runs} == {f"wan-t2v-{number}" for number in (1, 2, 3, 4)}
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder.claim(api.resolve("t2v", {"model.family": "wan", "train.output": str(runs[0].path)}).profile)


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_a_lambda_that_stays_0_costs_nothing(tmp_path: Path) -> None:
    """No features are computed, no projector is trained."""
    sets = [*SETS, "train.steps=1", "crepa.lambda=0", "crepa.lambda_end=0", f"data.cache={tmp_path / 'cache'}"]
    run = api.train(api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile, output=tmp_path / "run")
    assert not (tmp_path / "cache/features").exists()
    (line,) = read_metrics(run.metrics)
    assert line["crepa_loss"] is line["projector_grad_norm"] is None
    assert line["crepa_cutoff"]


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_a_validation_is_stopped_within_one_step_of_its_sampler(tmp_path: Path) -> None:
    sets = [*SETS, "train.gradient_accumulation=2", "validation.every=1", "validation.steps=20"]
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    events: list[Event] = []
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.extend([True] * any(isinstance(event, StepDone) for event in events))
        return len(asked) > 3

    run = api.train(profile, output=tmp_path / "run", listeners=[events.append], should_stop=should_stop)
    base, sampled = (event for event in events if isinstance(event, ValidationSampled))
    assert (len(base.paths), sampled.paths, sampled.measures) == (1, (), {})
    form = profile.data
    read = decode(base.paths[0], frames=form.frames, fps=form.fps, width=form.width, height=form.height)
    written = measure(read.float() / 255).values
    assert base.measures == {**{name: pytest.approx(value, abs=0.02) for name, value in written.items()}, "still": 0}
    assert read_validations(run.metrics) == [ValidationSampled(0, (), base.measures)]
    assert len(asked) < 10
    assert events[-1] == TrainingEnded(1, None)
    assert (run.checkpoints / "step-000001").is_dir()


@pytest.mark.usefixtures("in_demo", "fresh_accelerate")
def test_gradients_of_adapter_and_projector_are_clipped_separately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, clipped = Accelerator.clip_grad_norm_, []

    def watch(self: Accelerator, parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        norm: torch.Tensor = clip(self, parameters, max_norm)
        clipped.append(torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None]).item())
        return norm

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", watch)
    sets = [*SETS, "train.steps=2", "train.max_grad_norm=1e-3"]
    run = api.train(api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile, output=tmp_path / "run")
    # Step 0 has the coefficient 0, and with it no gradient of the projector.
    assert clipped == pytest.approx([1e-3, 0.0, 1e-3, 1e-3], rel=0.01)
    assert [line["projector_grad_norm"] > 1e-3 for line in read_metrics(run.metrics)] == [False, True]


@pytest.mark.usefixtures("in_demo")
def test_a_resumed_demo_keeps_its_own_settings(tmp_path: Path, run_crepa: RunCrepa) -> None:
    run = tmp_path / "run"
    flags = ["--profile", "t2v", "--model", "wan", "--demo", "--plain", "--set", "validation.every=0"]
    assert run_crepa("train", *flags, "--steps", 3, "--set", "checkpoints.every=1", "--output", run) == 0
    before = (run / "profile.toml").read_text()
    shutil.rmtree(run / "checkpoints/step-000003")
    assert run_crepa("train", "--resume", *flags[:-2], "--output", run) == 0
    assert (run / "profile.toml").read_text() == before
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [0, 1, 2]


def test_a_card_names_folders_without_the_way_to_them(tmp_path: Path) -> None:
    """An encoder in a folder too, whose name alone would be refused in settings."""
    encoder, clips = tmp_path / "encoder", tmp_path / "clips"
    encoder.mkdir()
    flags = {"model.family": "wan", "crepa.encoder": str(encoder), "data.path": str(clips)}
    profile = without_folders(api.resolve("t2v", flags).profile)
    assert (profile.crepa.encoder, profile.data.path) == ("encoder", "clips")
    assert str(tmp_path) not in dump_toml(profile)
