"""Predictions that are extended from a few blocks compared with those of all blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import OpenTiny
from test_memory import GPU, settings, small_clips
from torch import Tensor, nn

from crepa_cli.data.buckets import Bucket
from crepa_cli.memory.depth import Excerpt
from crepa_cli.memory.live_bytes import LiveBytes
from crepa_cli.memory.preparation import vae_peak
from crepa_cli.memory.repeats import run_once_per_shape
from crepa_cli.memory.shapes import Clips, clips_of, encoded_clip
from crepa_cli.memory.step import predict_training
from crepa_cli.memory.validation import decoding_peak
from crepa_cli.models import load_family
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile

Tables = dict[str, dict[str, object]]
FULL: Tables = {"adapter": {"kind": "full"}, "train": {"activation_checkpointing": False, "max_grad_norm": 0.0}}
LORA: Tables = {"model": {"dtype": "bfloat16"}, "train": {"activation_checkpointing": True}}
EVERYTHING: Tables = {
    "memory": {"stream_weights": True, "offload_activations": True, "finer_recompute": True, "quantize_base": "int8"}
}
BACKBONE: Tables = {"crepa": {"block_index": 1, "use_backbone_features": True, "teacher_block_index": 4}}
ON_HOST: Tables = {"memory": {"stream_weights": True, "offload_activations": True}}
ADAFACTOR: Tables = {"adapter": {"kind": "full"}, "train": {"optimizer": "adafactor", "ema": 0.9}}

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


def of_all_blocks(profile: Profile, family: Family, clips: Clips, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    with monkeypatch.context() as patch:
        patch.setattr(Excerpt, "of", lambda *_: None)
        return predict_training(profile, family, clips, GPU)


@pytest.mark.parametrize(
    ("name", "blocks", "tables"),
    [
        ("ltxvideo", 7, FULL | {"crepa": {"block_index": 3}}),
        pytest.param("wan", 10, LORA | BACKBONE | ON_HOST, marks=pytest.mark.slow),
        pytest.param("sanavideo", 8, ADAFACTOR | {"crepa": {"block_index": 6}}, marks=pytest.mark.slow),
        pytest.param(
            "ltxvideo", 12, LORA | {"memory": {"keep": "attention", "keep_blocks": 6}}, marks=pytest.mark.slow
        ),
        pytest.param(
            "wan", 12, LORA | {"memory": {"keep_blocks": 5}, "crepa": {"block_index": 9}}, marks=pytest.mark.slow
        ),
        pytest.param("kandinsky5_video", 6, LORA | {"crepa": {"block_index": 0}}, marks=pytest.mark.slow),
    ],
)
def test_a_few_blocks_tell_the_memory_of_all(
    name: str, blocks: int, tables: Tables, open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = open_tiny(name, "t2v").with_blocks(blocks)
    profile = settings(family, **tables)
    assert Excerpt.of(profile, family) is not None
    clips = small_clips(family, profile)
    if profile.crepa.use_backbone_features:
        clips = replace(clips, teacher=None, feature_size=family.hidden_size)
    extended = predict_training(profile, family, clips, GPU)
    assert extended == of_all_blocks(profile, family, clips, monkeypatch)


@pytest.mark.slow
def test_a_few_blocks_tell_the_memory_of_a_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    family = load_family("ltxvideo")("Lightricks/LTX-Video-0.9.5", "t2v")
    profile = settings(family, model={"dtype": "bfloat16"}, crepa={"block_index": 8})
    clips = clips_of(profile, family, Bucket(25, 256, 256))
    extended = predict_training(profile, family, clips, GPU)
    assert extended == of_all_blocks(profile, family, clips, monkeypatch)


def test_blocks_that_differ_are_all_run(open_tiny: OpenTiny) -> None:
    family = open_tiny("wan", "t2v")
    assert Excerpt.of(settings(family), family) == Excerpt(12, (0, 1, 2, 3, 11), (3,))
    one_layer: dict[str, object] = {"target_modules": ["blocks.3.attn1.to_q"]}
    assert Excerpt.of(settings(family, adapter=one_layer), family) is None
    assert Excerpt.of(settings(family), family.with_blocks(6)) is None


def test_tiles_of_one_shape_run_once() -> None:
    def peak(*, once: bool) -> tuple[int, int]:
        layer, runs = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)), []
        layer[0].register_forward_hook(lambda *_: runs.append(1))
        with torch.no_grad(), LiveBytes() as live:
            if once:
                run_once_per_shape(layer, "forward", live)
            tiles = [layer(torch.ones(rows, 64)) for rows in (100, 30, 100, 30, 100)]
        assert [len(tile) for tile in tiles] == [100, 30, 100, 30, 100]
        return live.peak, len(runs)

    (before, five), (after, two) = peak(once=False), peak(once=True)
    assert (before, five, two) == (after, 5, 2)


class Causal(nn.Module):
    """A layer that sees two frames before each, which a list hands on from call to call."""

    runs = 0

    def forward(self, frame: Tensor, cache: list[Tensor | None]) -> Tensor:
        self.runs += 1
        before = cache[0]
        seen = frame if before is None else torch.cat([before, frame])
        cache[0] = seen[-2 * len(frame) :].clone()
        return (seen * 2)[-len(frame) :].clone()


def test_calls_that_hand_on_frames_run_once_for_each_shape_of_them() -> None:
    def peak(*, once: bool) -> tuple[int, int]:
        layer = Causal()
        with torch.no_grad(), LiveBytes() as live:
            if once:
                run_once_per_shape(layer, "forward", live)
            for rows in (100, 30, 100):
                cache: list[Tensor | None] = [None]
                outputs = [layer(torch.ones(rows, 64), cache) for _ in range(5)]
                assert [len(one) for one in outputs] == [rows] * 5
                assert cache[0] is not None
                assert len(cache[0]) == 2 * rows
        return live.peak, layer.runs

    (before, fifteen), (after, six) = peak(once=False), peak(once=True)
    assert (before, fifteen, six) == (after, 15, 6)


@pytest.mark.slow
def test_a_vae_in_tiles_takes_what_it_takes_with_every_call(
    open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan's, of which every call for some frames takes the last frames of the one before."""
    family = open_tiny("wan", "t2v")
    family.vae_tiling = True
    bucket = Bucket(13, 288, 288)
    latents = encoded_clip(family, bucket)["latents"]
    peaks = decoding_peak(family, latents), vae_peak(family, bucket)
    for module in ("validation", "preparation"):
        monkeypatch.setattr(f"crepa_cli.memory.{module}.run_vae_once_per_shape", lambda *_: None)
    assert peaks == (decoding_peak(family, latents), vae_peak(family, bucket))


def test_live_bytes_are_those_of_torchs_own_tracker() -> None:
    tracking = pytest.importorskip("torch.distributed._tools.mem_tracker", reason="built without torch.distributed")
    tracker = tracking.MemTracker()
    with LiveBytes() as live:
        model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 48))
        optimizer, inputs = torch.optim.AdamW(model.parameters()), torch.ones(32, 48)

        def step() -> None:
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        tracker.track_external(model, optimizer, inputs)
        live.reset_peak()
        with tracker:
            step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert live.peak == peak
