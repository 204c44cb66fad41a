"""Predicted memory of a validation compared with that of a real one, measured by torch's profiler."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import OpenTiny
from diffusers import AutoencoderKLWan
from PIL import Image
from rich.console import Console
from test_memory import CPU, GPU, changes, filled, settings, shallow
from test_wan import two_experts
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from crepa_cli.data.buckets import Bucket
from crepa_cli.data.scan import ClipForm
from crepa_cli.doctor.findings import BucketCount, Plan, memory_table
from crepa_cli.doctor.fit import Target, check_memory
from crepa_cli.memory.prediction import predict, validation_memory
from crepa_cli.memory.savings import with_setting
from crepa_cli.memory.shapes import clips_of, validation_bucket
from crepa_cli.memory.validation import predict_validation
from crepa_cli.models import FAMILIES
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.models.wan import Wan
from crepa_cli.processes import PRECISION
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import configured
from crepa_cli.runs.folder import RunFolder
from crepa_cli.runs.prompts import Prompts
from crepa_cli.training.build import trainable
from crepa_cli.training.experts import build_experts
from crepa_cli.training.validator import Validator

LONG = pytest.mark.slow
STEPS = 2
CONVOLUTIONS = {"aten::mkldnn_convolution", "aten::slow_conv3d_forward"}
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def validated(family: Family, folder: Path, **tables: dict[str, object]) -> Profile:
    """A run in bfloat16 that samples a short video in every validation."""
    validation: dict[str, object] = {
        "every": 1,
        "prompts": ["a wave"],
        "steps": STEPS,
        "frames": 1 + family.frame_multiple,
        "guidance_scale": 5.0,
    }
    if family.task == "i2v":
        Image.new("RGB", (96, 96)).save(folder / "first.png")
        validation["images"] = [str(folder / "first.png")]
    tables["model"] = {"dtype": "bfloat16", "task": family.task} | tables.get("model", {})
    crepa = {"use_backbone_features": True, "teacher_block_index": 2} | tables.pop("crepa", {})
    return settings(family, crepa=crepa, validation=validation | tables.pop("validation", {}), **tables)


def prediction(family: Family, profile: Profile) -> dict[str, int]:
    return predict_validation(profile, family, clips_of(profile, family, validation_bucket(profile, family)), CPU)


class Measured:
    """A real training after its first step, of which the most bytes held during some work are measured."""

    def __init__(self, family: Family, profile: Profile, folder: Path) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        self.family, self.profile = family, profile
        self.accelerator = Accelerator(cpu=True, mixed_precision=PRECISION[profile.model.dtype])
        self.experts = build_experts(profile, family, family.hidden_size, self.accelerator, None)
        for expert in self.experts.values():
            for parameter in trainable(expert.learner.aligned):
                parameter.grad = torch.zeros_like(parameter)
            expert.learner.update(None)
        with torch.device("meta"):
            prompt = family.longest_prompt(torch_dtype(profile.model.dtype))
        self.prompt = {name: filled(tensor) for name, tensor in prompt.items()}
        prompts, form = Prompts([self.prompt], self.prompt), ClipForm.of(profile.data)
        self.validator = Validator(profile, family, prompts, form, RunFolder(folder / "run"), self.accelerator)

    def bytes_of(self, work: Callable[[], object]) -> int:
        held = [*self.prompt.values()]
        for _, learner in self.experts.values():
            held += [*learner.aligned.parameters(), *learner.aligned.buffers()]
            held += [value for state in learner.optimizer.state.values() for value in state.values()]
            held += learner.average.shadow_params if learner.average else []
        with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            work()
        return sum(tensor.nbytes for tensor in held) + highest_level_between(profiled, CONVOLUTIONS)

    def validation(self) -> int:
        return self.bytes_of(lambda: self.validator.sample(self.experts, 1, lambda: False))

    def sampling(self) -> int:
        """Without the decoding."""
        for transformer in self.experts.transformers.values():
            transformer.eval()
        pipeline = self.validator.sampler.load_pipeline(self.experts.transformers)
        arguments = self.family.form_arguments(**self.validator.sampler.form._asdict())
        arguments |= self.family.sampling_arguments(self.prompt, self.prompt)
        arguments |= self.family.guide(pipeline, self.profile.validation.guidance_scale)
        arguments["num_inference_steps"] = STEPS
        vae = sum(tensor.nbytes for tensor in [*pipeline.vae.parameters(), *pipeline.vae.buffers()])
        with self.accelerator.autocast():
            return vae + self.bytes_of(lambda: pipeline(**arguments, output_type="latent"))


def highest_level_between(profiled: Any, left_out: set[str]) -> int:
    """The peak of allocated minus freed bytes at the times when none of some operations is running.

    What a convolution takes for itself while it runs depends on the processor.
    """
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda one: one.start_ns())
    running = [(one.start_ns(), one.start_ns() + one.duration_ns()) for one in events if one.name() in left_out]
    starts = [start for start, _ in running]
    level = highest = 0
    for time, change in changes(profiled):
        before = bisect_right(starts, time) - 1
        outside = before < 0 or time > running[before][1]
        highest = max(highest, level) if outside else highest
        level += change
        highest = max(highest, level) if outside else highest
    return highest


@pytest.mark.parametrize(
    ("name", "task", "tables"),
    [
        ("ltxvideo", "t2v", {}),
        ("wan", "t2v", {}),
        pytest.param("sanavideo", "t2v", {}, marks=LONG),
        pytest.param("kandinsky5_video", "t2v", {}, marks=LONG),
        pytest.param("wan", "i2v", {}, marks=LONG),
        pytest.param("wan", "t2v", {"model": {"dtype": "float32"}}, marks=LONG),
        pytest.param("wan", "t2v", {"adapter": {"kind": "full"}, "train": {"ema": 0.9}}, marks=LONG),
    ],
)
def test_a_validation_takes_what_is_predicted(
    name: str, task: str, tables: dict[str, dict[str, object]], open_tiny: OpenTiny, tmp_path: Path
) -> None:
    family = open_tiny(name, task)
    profile = validated(family, tmp_path, **tables)
    measured = Measured(family, profile, tmp_path)
    batch_sizes: list[int] = []
    measured.experts.transformers["transformer"].register_forward_pre_hook(
        lambda _, given, named: batch_sizes.append(len(named.get("hidden_states", *given))), with_kwargs=True
    )
    assert max(prediction(family, profile).values()) == pytest.approx(measured.validation(), rel=0.1)
    assert batch_sizes == STEPS * ([2] if family.guides_in_one_batch else [1, 1])


@pytest.mark.slow
def test_a_validation_in_tiles_takes_what_is_predicted(
    open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 64 pixels, as those of 256 would take long on the CPU."""
    monkeypatch.setattr(
        AutoencoderKLWan, "enable_tiling", partialmethod(AutoencoderKLWan.enable_tiling, 64, 64, 48, 48)
    )
    family = open_tiny("wan", "t2v")
    whole = validated(family, tmp_path)
    profile = with_setting(whole, "model", "vae_tiling", True)
    tiled = configured(family, profile)
    predicted = max(prediction(tiled, profile).values())
    assert predicted < 0.9 * max(prediction(family, whole).values())
    assert predicted == pytest.approx(Measured(tiled, profile, tmp_path).validation(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_sampler_takes_what_is_predicted(name: str, scale: float, open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny(name, "t2v")
    profile = validated(family, tmp_path, validation={"guidance_scale": scale})
    measured = Measured(family, profile, tmp_path).sampling()
    assert prediction(family, profile)["sampling"] == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
def test_the_other_expert_is_there_during_a_validation(open_tiny: OpenTiny, checkpoints: Path, tmp_path: Path) -> None:
    family = Wan(two_experts(open_tiny, checkpoints, "t2v"), "t2v", variant="low")
    profile = validated(family, tmp_path, adapter={"kind": "full"})
    predicted = max(prediction(family, profile).values())
    assert predicted == pytest.approx(Measured(family, profile, tmp_path).validation(), rel=0.1)


@pytest.mark.slow
def test_doctor_says_that_a_validation_does_not_fit(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = shallow(open_tiny("ltxvideo", "t2v"))
    tables: dict[str, dict[str, object]]
    tables = {"adapter": {"rank": 4}, "train": {"batch_size": 1}, "data": {"frames": 9}}
    profile = validated(family, tmp_path, validation={"frames": 17}, crepa={"spatial_align": False}, **tables)
    bucket = Bucket(9, 96, 96)
    predicted = predict(profile, family, bucket, GPU)
    assert predicted.peak == predicted.validation > predicted.without_validation
    limit = (predicted.validation + predicted.without_validation) // 2
    plan = Plan(buckets=[BucketCount(9, 96, 96, clips=2)])
    check_memory(plan, family, profile, Target(GPU, limit), lambda _: None)
    (check,) = plan.checks
    assert check.status == "failure"
    assert "for validation videos" in check.message
    assert "--set validation.every=0 turns off the validation" in check.advice
    assert "in training" not in check.advice
    assert plan.memory is not None
    assert plan.memory.validation == predicted.validation
    assert plan.memory.fitting is not None
    fitting = plan.memory.fitting.validation_frames
    assert fitting is not None
    assert f"--set validation.frames={fitting} fits" in check.advice
    needed = [
        validation_memory(with_setting(profile, "validation", "frames", one), family, GPU)
        for one in (fitting, fitting + 8)
    ]
    assert needed[0] <= limit < needed[1]
    console = Console(record=True)
    console.print(memory_table(plan.memory))
    assert "validation" in console.export_text()

    off = with_setting(profile, "validation", "every", 0)
    assert predict(off, family, bucket, GPU).peak == predicted.without_validation


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("memory", "offload_activations", True),
        ("memory", "finer_recompute", True),
        ("memory", "keep", "attention"),
        ("train", "activation_checkpointing", False),
    ],
)
def test_settings_of_the_backward_do_not_change_the_memory_of_a_validation(
    table: str, key: str, value: object, open_tiny: OpenTiny, tmp_path: Path
) -> None:
    """A stored prediction is used again whatever they are."""
    family = open_tiny("ltxvideo", "t2v")
    profile = validated(shallow(family), tmp_path)
    changed = with_setting(profile, table, key, value)
    assert prediction(shallow(family), changed) == prediction(shallow(family), profile)
