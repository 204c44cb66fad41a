"""Predicted memory compared with memory measured by torch's profiler, which is independent of fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import WITH_IMAGES, OpenTiny, moving_pattern
from diffusers import ModelMixin
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler
from torch.profiler._utils import traverse_dfs

from crepa_cli.alignment import TokenGrid
from crepa_cli.data.buckets import Bucket, Size
from crepa_cli.doctor import overview
from crepa_cli.doctor.findings import BucketCount, Check, FamilyMemory, Plan
from crepa_cli.doctor.fit import Target, check_memory, largest_bucket, training_target
from crepa_cli.kept import folder, kept
from crepa_cli.memory.live_bytes import LiveBytes
from crepa_cli.memory.prediction import predict, preparation_memory, training_memory
from crepa_cli.memory.preparation import online_teacher_weights
from crepa_cli.memory.savings import last_that_holds, lighter_settings, memory_advice, smaller_sizes, with_setting
from crepa_cli.memory.shapes import Clips, clips_of, encoded_clip, form_bucket
from crepa_cli.memory.step import PARTS, predict_training
from crepa_cli.models import FAMILIES, load_family
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.processes import PRECISION
from crepa_cli.profile import Profile
from crepa_cli.teachers.dinov2 import Dinov2Teacher
from crepa_cli.training.build import build_model, frozen_dtype, frozen_in_int8, make_optimizer, trainable
from crepa_cli.training.step import Teaching, step_losses

FEATURES = 24
TEACHER = TokenGrid(5, 8, 8)
LATENTS = dict.fromkeys(("ltxvideo", "ltx2"), (8, 5, 12, 12)) | {"hunyuanvideo15": (4, 5, 12, 12)}
# The attention kernel of the CPU takes 1 MiB of its own in the backward, where the peak of this family is.
LATENTS["hunyuanvideo"] = (4, 5, 40, 40)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
WAN_14B = "Wan-AI/Wan2.1-T2V-14B-Diffusers"


@pytest.fixture(autouse=True)
def _no_network_and_nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shallow(family: Family) -> Family:
    """The family with three blocks: a step with twelve tests nothing more and takes four times as long."""
    return family.with_blocks(*([3] if len(family.depths) == 1 else [2, 1]))


def settings(family: Family, **tables: dict[str, object]) -> Profile:
    """A LoRA on two clips at once in float32, except for the settings in `tables`."""
    base: dict[str, dict[str, object]] = {
        "model": {"family": family.name, "checkpoint": family.base.name, "dtype": "float32"},
        "memory": {},
        "adapter": {**family.settings["adapter"], "rank": 8, "alpha": 8.0},
        "data": {"width": 96, "height": 96, "frames": 33, "fps": 16.0},
        "train": {"batch_size": 2, "learning_rate": 1e-4},
        "crepa": {"block_index": 1},
        "validation": {"every": 0, "guidance_scale": 5.0},
    }
    return Profile.model_validate({table: values | tables.get(table, {}) for table, values in base.items()})


def small_clips(family: Family, profile: Profile) -> Clips:
    """Clips of five frames."""
    with torch.device("meta"):
        latents = torch.empty(LATENTS.get(family.name, (4, 5, 24, 24)))
        prompt = family.longest_prompt(torch_dtype(profile.model.dtype))
        return Clips({"latents": latents, "fps": torch.empty(())} | prompt, TEACHER, FEATURES)


def _empty(family: Family, profile: Profile) -> ModelMixin:
    return family.empty_transformer(frozen_dtype(profile), int8=frozen_in_int8(profile))


def measured_step(family: Family, profile: Profile, clips: Clips) -> int:
    """The peak bytes of a real step on the CPU: those held before it plus those that the profiler saw allocated."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=PRECISION[profile.model.dtype])
    model = build_model(profile, family, _empty(family, profile), clips.feature_size)
    assert model.crepa is not None
    groups = [trainable(model.transformer), trainable(model.crepa)]
    optimizer = make_optimizer(profile.train, groups, accelerator.device)
    batch = {name: torch.stack([filled(tensor)] * 2) for name, tensor in clips.tensors.items()}
    features = torch.ones(2, TEACHER.frames, TEACHER.tokens, clips.feature_size, dtype=torch.float16)

    def step() -> None:
        noise, sigmas = torch.randn_like(batch["latents"]), torch.full((2,), 0.5)
        with accelerator.autocast():
            losses = step_losses(model, family, profile, batch, noise, sigmas, Teaching(features, TEACHER, 1.0))
        accelerator.backward(losses.total)
        accelerator.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    before = [*model.parameters(), *model.buffers(), *batch.values(), features]
    states = [value for state in optimizer.state.values() for value in state.values()]
    before += [value for value in states if isinstance(value, Tensor)]
    with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    return sum(tensor.nbytes for tensor in before) + highest_level(profiled)


def filled(tensor: Tensor) -> Tensor:
    return torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor


def highest_level(profiled: Any) -> int:
    """The peak of allocated minus freed bytes."""
    return max(accumulate((change for _, change in changes(profiled)), initial=0))


def changes(profiled: Any) -> list[tuple[int, int]]:
    """The times in ns of allocations, in order, with their bytes, and of their releases, with negative bytes.

    Blocks from before are left out: the profiler reports the release of those that an earlier profile has seen, such as
    the garbage of another test, but not of others.
    """
    events = traverse_dfs(profiled.profiler.kineto_results.experimental_event_tree())
    memory = [event for event in events if event.tag == _EventType.Allocation]
    held: set[int] = set()
    found = []
    for event in sorted(memory, key=lambda one: one.start_time_ns):
        block, change = event.extra_fields.ptr, event.extra_fields.alloc_size
        if change > 0:
            held.add(block)
        elif block in held:
            held.remove(block)
        else:
            continue
        found.append((event.start_time_ns, change))
    return found


def test_garbage_of_earlier_profiles_is_not_measured() -> None:
    def profile_of(work: Callable[[], object]) -> Any:
        with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            work()
        return profiled

    earlier: dict[str, Tensor] = {}
    profile_of(lambda: earlier.update(tensor=torch.ones(1000)))
    assert highest_level(profile_of(lambda: (earlier.popitem(), torch.ones(100)))) == 400


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        *((name, {}) for name in FAMILIES),
        *((name, {"adapter": {"kind": "full"}, "train": {"activation_checkpointing": False}}) for name in FAMILIES),
        ("ltxvideo", {"train": {"activation_checkpointing": False}}),
        ("ltxvideo", {"adapter": {"kind": "full"}}),
        ("ltxvideo", {"adapter": {"kind": "full"}, "train": {"optimizer": "adafactor"}}),
        ("wan", {"model": {"dtype": "bfloat16"}}),
        ("sanavideo", {"model": {"dtype": "bfloat16"}}),
        ("ltxvideo", {"model": {"dtype": "bfloat16"}, "memory": {"quantize_base": "int8"}}),
        *(pytest.param(name, {"memory": {"quantize_base": "int8"}}, marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_predicted_and_measured_agree(name: str, tables: dict[str, dict[str, object]], open_tiny: OpenTiny) -> None:
    family = shallow(open_tiny(name, "t2v"))
    profile = settings(family, **tables)
    clips = small_clips(family, profile)
    predicted = predict_training(profile, family, clips, CPU)
    assert predicted.keys() == set(PARTS)
    assert sum(predicted.values()) == pytest.approx(measured_step(family, profile, clips), rel=0.05)


def test_what_needs_no_formula_is_exact(open_tiny: OpenTiny) -> None:
    family = shallow(open_tiny("ltxvideo", "t2v"))
    profile = settings(family)
    clips = small_clips(family, profile)
    parts = predict_training(profile, family, clips, GPU)
    model = build_model(profile, family, family.empty_transformer(torch.float32), FEATURES)
    adapter = sum(parameter.nbytes for parameter in trainable(model.transformer))
    assert parts["adapter"] == adapter
    assert parts["weights"] == sum(tensor.nbytes for tensor in tensors_of(model.transformer)) - adapter
    moments = 2 * sum(parameter.nbytes for parameter in trainable(model))
    assert parts["optimizer"] == pytest.approx(moments, rel=0.01)
    off = settings(family, crepa={"enabled": False})
    assert predict_training(off, family, clips_of(off, family, Bucket(17, 64, 64)), GPU)["alignment"] == 0


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_image_to_video_is_predicted_with_its_first_frame(name: str, open_tiny: OpenTiny) -> None:
    family = shallow(open_tiny(name, "i2v"))
    profile = settings(family, model={"task": "i2v"})
    clips = small_clips(family, profile)
    clips = replace(clips, tensors=clips.tensors | encoded_clip(family, Bucket(17, 96, 96)))
    predicted = sum(predict_training(profile, family, clips, CPU).values())
    assert predicted == pytest.approx(measured_step(family, profile, clips), rel=0.1)


@pytest.mark.parametrize(("name", "task"), [(name, task) for name in FAMILIES for task in load_family(name).pipelines])
def test_clips_without_content_have_the_tensors_of_encoded_ones(name: str, task: str, open_tiny: OpenTiny) -> None:
    family = open_tiny(name, task)
    tensors = family.encode_clip(family.load_vae_pipeline(), moving_pattern(17, 64, 96))
    encoded, empty = (
        {key: (one.shape, one.dtype) for key, one in clip.items()}
        for clip in (tensors, encoded_clip(family, Bucket(17, 64, 96)))
    )
    assert encoded == empty


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_transformer_without_weights_has_the_dtypes_of_a_loaded_one(
    name: str, dtype: torch.dtype, open_tiny: OpenTiny
) -> None:
    family = open_tiny(name, "t2v")
    loaded = family.load_transformer(dtype)
    with torch.device("meta"):
        empty = family.empty_transformer(dtype)
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        kinds = [{key: (one.dtype, one.shape) for key, one in tensors(model)} for model in (empty, loaded)]
        assert kinds[0] == kinds[1]


def test_a_model_of_14_billion_parameters_takes_no_memory() -> None:
    family = load_family("wan")(WAN_14B, "t2v")
    tables: dict[str, dict[str, object]]
    tables = {"model": {"dtype": "bfloat16"}, "adapter": {"target_modules": ["to_q"]}}
    profile = settings(family, **tables, train={"batch_size": 1, "activation_checkpointing": False})
    clips = clips_of(profile, family, Bucket(81, 720, 1280))
    before = psutil.Process().memory_info().rss
    parts = predict_training(profile, family, clips, GPU)
    assert psutil.Process().memory_info().rss - before < 10**9
    assert parts["weights"] > 28 * 10**9


def test_bytes_are_counted_by_part() -> None:
    with LiveBytes() as live:
        with live.belonging_to("one"):
            kept_ = torch.zeros(10, dtype=torch.uint8)
            dropped = torch.zeros(20, dtype=torch.uint8)
        with live.belonging_to("two"):
            both = [kept_.view(2, 5), torch.zeros(30, dtype=torch.uint8)]
        live.assign("three", [dropped])
        del dropped
        assert (live.live, live.peak) == (40, 60)
        assert live.peak_parts == {"one": 30, "two": 30}
        live.reset_peak()
    assert live.peak_parts == {"one": 10, "two": 30, "three": 0}
    assert len(both) == 2


@pytest.mark.slow
def test_the_largest_clips_that_fit(open_tiny: OpenTiny, tiny_dinov2: Path) -> None:
    family = shallow(open_tiny("ltxvideo", "t2v"))
    profile = settings(
        family,
        model={"dtype": "bfloat16"},
        adapter={"rank": 4},
        crepa={"encoder": str(tiny_dinov2), "encoder_image_size": "grid", "spatial_align": False},
        train={"batch_size": 4, "activation_checkpointing": False},
    )
    peaks = {frames: predict(profile, family, Bucket(frames, 96, 96), GPU).peak for frames in (17, 25, 33)}
    assert peaks[17] < peaks[25] < peaks[33]
    plan = Plan(buckets=[BucketCount(33, 96, 96, clips=2)])
    lines: list[str] = []
    check_memory(plan, family, profile, Target(GPU, peaks[17]), lines.append)
    assert lines[0] == "predicting memory"
    assert plan.memory is not None
    assert plan.memory.fitting is not None
    assert plan.memory.fitting.frames == 17
    assert (plan.memory.fitting.width, plan.memory.fitting.height) == (64, 64)
    (check,) = plan.checks
    assert check.status == "failure"
    assert "--set data.frames=17" in check.advice
    assert "train.activation_checkpointing=true" in check.advice
    saved = [one.saved for one in plan.memory.savings]
    assert saved == sorted(saved, reverse=True)

    fine = Plan(buckets=[BucketCount(17, 96, 96, clips=2)])
    check_memory(fine, family, profile, Target(GPU, peaks[33]), lines.append)
    assert fine.checks[0].status == "fine"
    assert "clips of up to 33 frames fit" in fine.checks[0].message
    shared = Plan(buckets=plan.buckets)
    check_memory(shared, family, with_setting(profile, "train", "sharding", True), Target(GPU, peaks[17]), lines.append)
    assert shared.checks[0].status == "fine", "nothing is known of several processes"
    assert "not predicted" in shared.checks[0].message
    assert memory_advice(profile, family, Bucket(33, 96, 96), GPU) == (plan.memory.training, plan.memory.savings)


def test_bisection() -> None:
    for count in range(8):
        items = list(range(count))
        for limit in range(-1, count):
            assert last_that_holds(items, limit.__ge__) == (None if limit < 0 else limit)


def test_smaller_sizes_keep_the_aspect_ratio() -> None:
    sizes = smaller_sizes(Size(832, 480), 16)
    assert (sizes[0], sizes[-1]) == (Size(32, 16), Size(800, 464))
    assert all(side % 16 == 0 for size in sizes for side in size)


def test_the_largest_bucket_decides() -> None:
    assert largest_bucket([]) is None
    counts = [BucketCount(17, 64, 96, 1), BucketCount(33, 64, 64, 5), BucketCount(17, 80, 80, 2)]
    assert largest_bucket(counts) == Bucket(33, 64, 64)


def test_lighter_settings_are_those_that_differ(open_tiny: OpenTiny) -> None:
    family = open_tiny("wan", "t2v")
    profile = settings(family, crepa={"encoder_image_size": 224, "spatial_align": False}, train={"ema": 0.99})
    tried = {f"{table}.{key}": value for table, key, value in lighter_settings(profile, family)}
    assert tried == {
        "data.frames": 13,
        "train.batch_size": 1,
        "memory.quantize_base": "int8",
        "model.dtype": "bfloat16",
        "adapter.rank": 4,
        "train.ema": 0.0,
        "crepa.encoder": "dinov2_vits14",
    }
    assert with_setting(profile, "crepa", "encoder", "dinov2_vits14").crepa.encoder == "dinov2_vits14"


def test_a_prediction_is_kept_and_found_again() -> None:
    assert kept(["facts"], lambda: {"weights": 5}) == {"weights": 5}
    assert kept(["facts"], lambda: {"weights": 6}) == {"weights": 5}
    assert kept(["others"], lambda: {"weights": 6}) == {"weights": 6}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b'{"weights": "much"}'])
def test_a_damaged_prediction_is_made_again(content: bytes) -> None:
    kept(["facts"], lambda: {"weights": 5})
    (file,) = folder().iterdir()
    file.write_bytes(content)
    assert kept(["facts"], lambda: {"weights": 6}) == {"weights": 6}
    assert kept(["facts"], lambda: {"weights": 7}) == {"weights": 6}


def test_a_prediction_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kept(["facts"], lambda: {"weights": 5}) == {"weights": 5}


@pytest.mark.slow
def test_an_overview_of_the_families(open_tiny: OpenTiny, tiny_dinov2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes side by side predict what this one does, in the order of the families, and pass on what is wrong."""
    encoder = {"encoder": str(tiny_dinov2), "encoder_image_size": 56}
    tiny = {name: open_tiny(name, "t2v") for name in ("ltxvideo", "wan")}
    profiles = {(name, "t2v"): settings(family, crepa=encoder) for name, family in tiny.items()}
    profiles |= {(name, "i2v"): settings(family, model={"checkpoint": "nobody/none"}) for name, family in tiny.items()}
    monkeypatch.setattr(overview, "FAMILIES", list(tiny))
    hub, *found = overview.family_memories(lambda *asked: profiles[asked], Target(CPU, None), lambda _: None)
    assert isinstance(hub, Check)
    for family, row, failed in zip(tiny.values(), found[::2], found[1::2], strict=True):
        assert isinstance(row, FamilyMemory)
        profile = profiles[family.name, "t2v"]
        bucket = form_bucket(profile, family)
        assert (row.family, row.card) == (family.name, "8 GB")
        assert row.shape == f"{bucket.width}x{bucket.height}, {bucket.frames} frames"
        assert row.training == sum(training_memory(profile, family, bucket, GPU).values())
        assert isinstance(failed, Check)
        assert "nobody/none" in failed.message


def test_a_teacher_that_stays_is_counted(open_tiny: OpenTiny, tiny_dinov2: Path) -> None:
    family = shallow(open_tiny("wan", "t2v"))
    encoder = {"encoder": str(tiny_dinov2), "encoder_image_size": 56}
    profile = settings(family, crepa=encoder)
    assert "teacher" not in training_memory(profile, family, Bucket(5, 64, 96), GPU)
    stays, lighter = (with_setting(profile, "crepa", "drop_vae_encoder", drops).crepa for drops in (False, True))
    whole = online_teacher_weights(family, stays, GPU)
    vae, teacher = family.load_vae_pipeline().vae, Dinov2Teacher.load(tiny_dinov2, torch.device("cpu"))
    halves = (
        sum(weight.nbytes for weight in teacher.model.parameters()) // 2,
        sum(one.nbytes for one in vae.parameters()),
    )
    assert whole == sum(halves), "a GPU holds the encoder in float16"
    assert online_teacher_weights(family, stays, CPU) == whole + halves[0], "a CPU in float32"
    dropped = sum(weight.nbytes for weight in vae.encoder.parameters())
    assert whole - online_teacher_weights(family, lighter, GPU) == dropped


def test_the_encoder_is_predicted_for_the_device_that_runs_it(open_tiny: OpenTiny, tiny_dinov2: Path) -> None:
    family = open_tiny("wan", "t2v")
    profile = settings(family, crepa={"encoder": str(tiny_dinov2), "encoder_image_size": 56})
    predicted = {device: preparation_memory(profile, family, Bucket(17, 64, 96), device) for device in (CPU, GPU)}
    teacher = Dinov2Teacher.load(tiny_dinov2, CPU)
    frames = torch.zeros(5, 3, 64, 96, dtype=torch.uint8)
    with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        teacher.features(frames, (56, 56))
    measured = sum(tensor.nbytes for tensor in [*tensors_of(teacher.model), frames]) + highest_level(profiled)
    assert predicted[CPU]["vision encoder"] == pytest.approx(measured, rel=0.05)
    assert predicted[GPU]["vision encoder"] < 0.9 * measured
    assert predicted[CPU]["VAE"] == predicted[GPU]["VAE"]


def test_the_device_that_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_target(24 * 10**9) == Target(GPU, 24 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine = training_target(None)
    assert machine.device == CPU
    assert machine.free is not None
    assert 0 < machine.free < psutil.virtual_memory().total
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * 10**9, 8 * 10**9))
    assert training_target(None) == Target(GPU, 5 * 10**9)
