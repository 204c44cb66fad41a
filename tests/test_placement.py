"""Streamed weights and offloaded activations: the same bits as without them, in far less memory of the device."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import WITH_IMAGES, OpenTiny
from test_wan import two_experts
from torch import Tensor

from crepa_cli.alignment import TokenGrid
from crepa_cli.data.buckets import Bucket
from crepa_cli.memory.host import predict_pinned
from crepa_cli.memory.live_bytes import LiveBytes
from crepa_cli.memory.preparation import text_encoders_peak
from crepa_cli.memory.shapes import Clips, encoded_clip
from crepa_cli.memory.step import predict_training
from crepa_cli.models import FAMILIES
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.models.streaming import place, stream
from crepa_cli.models.wan import Wan
from crepa_cli.processes import PRECISION
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import memory_mistakes
from crepa_cli.training.build import build_model, trainable
from crepa_cli.training.learner import Learner, build_learner
from crepa_cli.training.step import Teaching, step_losses

CPU = torch.device("cpu")
FEATURES = 24
TEACHER = TokenGrid(3, 4, 4)
TOKENS, LONGEST = 8, 4096
STREAM: dict[str, object] = {"stream_weights": True}
OFFLOAD: dict[str, object] = {"offload_activations": True}
KEEP: dict[str, object] = {"keep": "attention"}
Tables = dict[str, dict[str, object]]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def of_depth(family: Family, blocks: int) -> Family:
    """The family with this many blocks and random weights; of two kinds of blocks, one is of the second."""
    family = family.with_blocks(*([blocks] if len(family.depths) == 1 else [blocks - 1, 1]))
    vars(family)["load_transformer"] = family.empty_transformer
    return family


def settings(family: Family, tables: Tables) -> Profile:
    base: Tables = {
        "model": {"family": family.name, "checkpoint": family.base.name, "dtype": "float32", "task": family.task},
        "memory": {},
        "adapter": {**family.settings["adapter"], "rank": 4, "alpha": 4.0, "dropout": 0.1},
        "data": {"width": 96, "height": 96, "frames": 33, "fps": 16.0},
        "train": {"learning_rate": 1e-2, "gradient_accumulation": 2, "ema": 0.9},
        "crepa": {"block_index": 1},
        "validation": {"every": 0, "guidance_scale": 5.0},
    }
    return Profile.model_validate({table: values | tables.get(table, {}) for table, values in base.items()})


def clips_of(family: Family, profile: Profile, side: int = 64, tokens: int = TOKENS) -> Clips:
    """Clips of three latent frames with a caption of at most so many tokens."""
    bucket = Bucket(1 + 2 * family.frame_multiple, side, side)
    with torch.device("meta"):
        prompt = family.longest_prompt(torch_dtype(profile.model.dtype))
    short = {name: one[:tokens] if one.ndim else one.clamp(max=tokens) for name, one in prompt.items()}
    width = FEATURES if profile.crepa.encoder_teaches else family.hidden_size
    short |= {name: one for name, one in prompt.items() if name.startswith("pooled")}
    with torch.device("meta"):
        return Clips({**encoded_clip(family, bucket), "fps": torch.empty(()), **short}, TEACHER, width)


def filled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of one clip with content in place of a tensor without."""
    if not tensor.is_meta:
        return tensor[None]
    if not tensor.is_floating_point():
        return torch.ones(1, *tensor.shape, dtype=tensor.dtype)
    return torch.randn(1, *tensor.shape, generator=generator).to(tensor.dtype)


class Training:
    """A run without clips: the learner, and steps on noise."""

    def __init__(self, family: Family, profile: Profile, clips: Clips) -> None:
        self.family, self.profile, self.clips = family, profile, clips
        self.generator = torch.Generator().manual_seed(0)
        accelerator = Accelerator(cpu=True, mixed_precision=PRECISION[profile.model.dtype])
        self.learner: Learner = build_learner(profile, family, clips.feature_size, accelerator, None, {})
        self.losses: list[float] = []

    def step(self) -> None:
        learner, accelerator = self.learner, self.learner.accelerator
        for _ in range(self.profile.train.gradient_accumulation):
            batch = {name: filled(tensor, self.generator) for name, tensor in self.clips.tensors.items()}
            noise = torch.randn(batch["latents"].shape, generator=self.generator)
            shape = 1, TEACHER.frames, TEACHER.tokens, self.clips.feature_size
            features = torch.randn(shape, generator=self.generator)
            teaching = Teaching(features if self.profile.crepa.encoder_teaches else None, TEACHER, 1.0)
            torch.manual_seed(len(self.losses))
            with accelerator.autocast():
                sigmas = torch.full((1,), 0.5)
                losses = step_losses(learner.model, self.family, self.profile, batch, noise, sigmas, teaching)
            accelerator.backward(losses.total)
            self.losses.append(losses.total.detach().item())
        learner.clip_gradients()
        learner.update(None)


def result(family: Family, tables: Tables, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the weights, frozen ones and the moving average included, after some steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    profile = settings(family, tables)
    training = Training(family, profile, clips_of(family, profile))
    for _ in range(steps):
        training.step()
    weights = dict(training.learner.aligned.named_parameters())
    average = training.learner.average
    assert average is not None
    return training.losses, weights | {str(i): one for i, one in enumerate(average.shadow_params)}


def assert_same_bits(family: Family, tables: Tables, *placements: dict[str, object], steps: int) -> None:
    losses, weights = result(family, tables, steps)
    assert losses[0] != losses[-1]
    for memory in placements:
        found_losses, found = result(family, tables | {"memory": tables.get("memory", {}) | memory}, steps)
        assert found_losses == losses, memory
        assert found.keys() == weights.keys()
        assert [name for name, one in found.items() if not torch.equal(one, weights[name])] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_placement_changes_no_bit(name: str, open_tiny: OpenTiny) -> None:
    assert_same_bits(of_depth(open_tiny(name, "t2v"), 3), {}, STREAM | OFFLOAD, steps=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", FAMILIES)
def test_each_placement_changes_no_bit_in_twenty_steps(name: str, open_tiny: OpenTiny) -> None:
    tables: Tables = {"model": {"dtype": "bfloat16"}, "train": {"gradient_accumulation": 1}}
    assert_same_bits(of_depth(open_tiny(name, "t2v"), 3), tables, STREAM, OFFLOAD, STREAM | OFFLOAD, steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_each_placement_changes_no_bit_of_image_to_video(name: str, open_tiny: OpenTiny) -> None:
    tables: Tables = {"train": {"gradient_accumulation": 1}}
    assert_same_bits(of_depth(open_tiny(name, "i2v"), 4), tables, STREAM, OFFLOAD, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tables",
    [
        {"crepa": {"use_backbone_features": True, "teacher_block_index": 3}},
        {"layersync": {"enabled": True, "student_block": 0, "teacher_block": 3}, "crepa": {"enabled": False}},
        {"adapter": {"target_modules": ["to_q"]}, "train": {"optimizer": "adafactor"}},
        {"memory": {"finer_recompute": True}},
    ],
    ids=["a block teaches", "layersync", "few layers", "finer recomputation"],
)
def test_placement_changes_no_bit_of_other_ways_to_train(tables: Tables, open_tiny: OpenTiny) -> None:
    assert_same_bits(of_depth(open_tiny("wan", "t2v"), 4), tables, STREAM | OFFLOAD, steps=3)


@pytest.mark.slow
def test_placement_changes_no_bit_of_weights_in_int8(open_tiny: OpenTiny) -> None:
    assert_same_bits(open_tiny("wan", "t2v"), {"memory": {"quantize_base": "int8"}}, STREAM | OFFLOAD, steps=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_placement_changes_no_bit_of_compiled_blocks(open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without inductor, which takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    tables: Tables = {"train": {"compile": True, "gradient_accumulation": 1}, "adapter": {"dropout": 0.0}}
    assert_same_bits(of_depth(open_tiny("ltxvideo", "t2v"), 3), tables, STREAM | OFFLOAD, steps=2)


# Kandinsky normalizes queries and keys in float32, with weights in bfloat16.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize(
    "name", [name if name == "wan" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_what_is_kept_changes_no_bit(name: str, open_tiny: OpenTiny) -> None:
    tables: Tables = {"model": {"dtype": "bfloat16"}}
    family = of_depth(open_tiny(name, "t2v"), 3)
    assert_same_bits(family, tables, {"keep": "all"}, KEEP | OFFLOAD | {"keep_blocks": 2}, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_kept_changes_no_bit_in_twenty_steps(name: str, open_tiny: OpenTiny) -> None:
    tables: Tables = {"train": {"gradient_accumulation": 1}}
    ways: tuple[dict[str, object], ...] = (KEEP, {"keep": "all"}, KEEP | {"keep_blocks": 1})
    assert_same_bits(of_depth(open_tiny(name, "t2v"), 2), tables, *ways, steps=20)


def test_offloading_changes_no_bit_of_full_tuning(open_tiny: OpenTiny) -> None:
    assert_same_bits(of_depth(open_tiny("ltxvideo", "t2v"), 3), {"adapter": {"kind": "full"}}, OFFLOAD, steps=2)


WAN = (STREAM, OFFLOAD, KEEP, OFFLOAD | {"keep_blocks": 2})
PREDICTED = [*((name, STREAM | OFFLOAD) for name in FAMILIES), *(("wan", one) for one in WAN)]


@pytest.mark.parametrize(
    ("name", "memory"),
    [pytest.param(*one, marks=() if one == ("ltxvideo", STREAM | OFFLOAD) else pytest.mark.slow) for one in PREDICTED],
)
def test_predicted_and_measured_agree(name: str, memory: dict[str, object], open_tiny: OpenTiny) -> None:
    family = of_depth(open_tiny(name, "t2v"), 4)
    profile = settings(family, {"memory": memory, "train": {"gradient_accumulation": 1}})
    predicted = predict_training(profile, family, clips_of(family, profile, side=128, tokens=LONGEST), CPU)
    peak, host = measured(family, profile)
    assert sum(predicted.values()) == pytest.approx(peak, rel=0.01)
    bucket = Bucket(1 + 2 * family.frame_multiple, 128, 128)
    assert predict_pinned(profile, family, bucket)["training"] == pytest.approx(host, rel=0.05)


def measured(family: Family, profile: Profile) -> tuple[int, int]:
    """The peak of live bytes in a real step, and the bytes on the host after it."""
    clips = clips_of(family, profile, side=128, tokens=LONGEST)
    with LiveBytes() as live:
        training = Training(family, profile, clips)
        training.step()
        live.reset_peak()
        training.step()
        return live.peak, live.host


@pytest.mark.slow
def test_memory_of_the_device_does_not_grow_with_depth(open_tiny: OpenTiny) -> None:
    """Each block adds its adapter, with gradient, optimizer state and average; all else of it goes to the host."""
    families = [of_depth(open_tiny("ltxvideo", "t2v"), blocks) for blocks in (3, 5)]
    profile = settings(families[0], {"memory": STREAM | OFFLOAD})
    peaks, hosts = zip(*(measured(family, profile) for family in families), strict=True)
    model = build_model(profile, families[1], families[1].load_transformer(torch.float32), None)
    block = families[1].blocks(model.transformer)[1]
    adapter = sum(one.nbytes for one in trainable(block))
    weights = sum(one.nbytes for one in block.parameters()) - adapter
    counters = sum(4 for _ in trainable(block))  # AdamW counts the steps of each weight
    assert peaks[1] - peaks[0] <= 2 * (5 * adapter + counters)
    assert hosts[1] - hosts[0] > 2 * weights


class AllBytes(LiveBytes):
    """Also keeps the most bytes held at any time, those on the host included."""

    most = 0

    def _add(self, part: str, size: int) -> None:
        super()._add(part, size)
        self.most = max(self.most, self.live + self.host)


def test_two_blocks_are_on_the_device_and_loading_takes_one_more(open_tiny: OpenTiny) -> None:
    family = of_depth(open_tiny("wan", "t2v"), 5)
    with AllBytes() as live:
        transformer = family.load_transformer(torch.bfloat16)
        blocks = family.blocks(transformer)
        everything = live.live
        live.most = 0
        staying = stream(blocks, CPU)
        block = sum(-(-one.nbytes // 256) * 256 for one in blocks[0].parameters())
        outside = everything - sum(one.nbytes for block in blocks for one in block.parameters())
        assert live.live - outside == pytest.approx(2 * block, abs=512)
        assert live.host == pytest.approx(5 * block, abs=5 * 256)
        # The buffers are on the device.
        assert live.most - 2 * block <= everything + block
    assert staying == {one for block in blocks for one in block.parameters()}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"memory": STREAM, "adapter": {"kind": "full"}}, ["memory.stream_weights", "adapter.kind = 'full'"]),
        ({"memory": STREAM, "train": {"sharding": True}}, ["memory.stream_weights", "train.sharding"]),
        (
            {"memory": STREAM | OFFLOAD, "train": {"activation_checkpointing": False}},
            ["memory.stream_weights", "memory.offload_activations", "train.activation_checkpointing = true"],
        ),
        ({"memory": STREAM | {"keep": "all"}}, ["memory.stream_weights", "memory.keep other than 'all'"]),
        ({"memory": STREAM | KEEP}, ["memory.stream_weights", "memory.keep = 'attention'"]),
        ({"memory": STREAM | {"keep_blocks": 1}}, ["memory.stream_weights", "memory.keep_blocks"]),
        ({"memory": {"keep_blocks": 1, "finer_recompute": True}}, ["memory.keep_blocks", "memory.finer_recompute"]),
        ({"memory": KEEP | {"finer_recompute": True}}, ["memory.keep", "memory.finer_recompute"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(
    tables: Tables, words: list[str], open_tiny: OpenTiny
) -> None:
    mistakes = "\n".join(memory_mistakes(settings(open_tiny("wan", "t2v"), tables)))
    assert [word for word in words if word not in mistakes] == []


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name if name == "ltxvideo" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_streamed_text_encoder_changes_no_bit(name: str, open_tiny: OpenTiny) -> None:
    family = open_tiny(name, "t2v")
    pipelines = [family.load_text_pipeline(torch.float32) for _ in range(2)]
    with LiveBytes() as live:
        for encoder in family.text_encoders:
            place(getattr(pipelines[1], encoder), CPU, streamed=True)
    profile = settings(family, {"memory": STREAM})
    assert predict_pinned(profile, family, Bucket(1, 64, 64))["preparation"] == live.host > 0
    for caption in ("a red disc", "a blue square moves"):
        expected, found = (family.encode_prompt(pipeline, caption) for pipeline in pipelines)
        assert [key for key, one in expected.items() if not torch.equal(one, found[key])] == []


@pytest.mark.slow
@torch.no_grad()
def test_another_expert_is_streamed_as_it_is_loaded(open_tiny: OpenTiny, checkpoints: Path) -> None:
    family = Wan(two_experts(open_tiny, checkpoints, "t2v"), "t2v")
    profile = settings(family, {})
    clips = clips_of(family, profile)
    transformer = family.load_transformer(torch.float32)
    resident, streamed = (family.load_sampling_pipeline(transformer).transformer_2 for _ in range(2))
    with LiveBytes() as live:
        place(streamed, CPU, streamed=True)
    assert live.host > 3 * live.live > 0
    batch = {name: filled(tensor, torch.Generator().manual_seed(0)) for name, tensor in clips.tensors.items()}
    inputs = family.step(batch, batch["latents"], torch.full((1,), 0.5)).inputs
    for _ in range(2):
        assert torch.equal(streamed(**inputs).sample, resident(**inputs).sample)


@torch.no_grad()
def test_a_streamed_text_encoder_is_predicted(open_tiny: OpenTiny) -> None:
    family = copy(open_tiny("wan", "t2v"))
    family.streams_text_encoders = True
    encoder: Any = family.load_text_pipeline(torch.float32).text_encoder
    with LiveBytes() as live:
        encoder = type(encoder)(encoder.config).eval()
        place(encoder, CPU, streamed=True)
        live.reset_peak()
        encoder(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64))
    clips = clips_of(family, settings(family, {}))
    assert text_encoders_peak(family, clips, torch.float32) == pytest.approx(live.peak, rel=0.01)
