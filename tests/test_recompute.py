"""Finer recomputation: the same training in less memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import OpenTiny, RunCrepa
from safetensors.torch import load_file
from test_memory import CPU, FEATURES, TEACHER, filled, measured_step, settings, shallow, small_clips
from test_placement import OFFLOAD, STREAM, of_depth, result
from torch import Tensor, nn

from crepa_cli.memory.savings import with_setting
from crepa_cli.memory.step import predict_training
from crepa_cli.models import FAMILIES
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.training.adapter import lora_layers
from crepa_cli.training.aligned import AlignedTransformer
from crepa_cli.training.build import build_model, trainable
from crepa_cli.training.step import Teaching, step_losses


def finer(profile: Profile) -> Profile:
    return with_setting(profile, "memory", "finer_recompute", True)


def training(family: Family, profile: Profile) -> AlignedTransformer:
    """A model with random weights, and with a LoRA that has an effect."""
    torch.manual_seed(0)
    model = build_model(profile, family, family.load_transformer(torch.float32), FEATURES)
    assert isinstance(model.transformer, nn.Module)
    for layer in lora_layers(model.transformer).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return model


def gradients(family: Family, profile: Profile) -> dict[str, Tensor]:
    """The losses, the gradients and the captured hidden states of a step on two clips, by name."""
    model = training(family, profile)
    generator = torch.Generator().manual_seed(1)
    batch = {}
    for name, tensor in small_clips(family, profile).tensors.items():
        pair = torch.stack([filled(tensor)] * 2)
        batch[name] = torch.randn(pair.shape, generator=generator) if pair.is_floating_point() else pair
    noise = torch.randn(batch["latents"].shape, generator=generator)
    features = torch.randn(2, TEACHER.frames, TEACHER.tokens, FEATURES, generator=generator)
    captured: list[Tensor] = []
    assert model.crepa is not None
    model.crepa.register_forward_pre_hook(lambda _, arguments: captured.append(arguments[0].detach()))
    torch.manual_seed(2)  # of dropout
    losses = step_losses(
        model, family, profile, batch, noise, torch.tensor([0.3, 0.7]), Teaching(features, TEACHER, 0.5)
    )
    losses.total.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    everything = family.uses_all_weights or profile.adapter.kind == "lora"
    assert (len(found) == len(trainable(model))) == everything
    assert len(captured) == 1, "a recomputation is not captured"
    return found | {"loss": losses.total.detach(), "captured": captured[0]}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= tolerance * theirs[name].norm().clamp(min=1e-6), name


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_captured_states_are_the_same(name: str, open_tiny: OpenTiny) -> None:
    family = shallow(open_tiny(name, "t2v"))
    profile = settings(family)
    assert_equal(gradients(family, finer(profile)), gradients(family, profile), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_of_full_tuning_are_the_same(name: str, checkpointing: bool, open_tiny: OpenTiny) -> None:
    family = shallow(open_tiny(name, "t2v"))
    tables: dict[str, dict[str, object]]
    tables = {"adapter": {"kind": "full"}, "train": {"activation_checkpointing": checkpointing}}
    profile = settings(family, **tables)
    assert_equal(gradients(family, finer(profile)), gradients(family, profile), 1e-6)


def test_a_part_that_is_recomputed_twice_drops_the_same(open_tiny: OpenTiny) -> None:
    family = shallow(open_tiny("wan", "t2v"))
    nested, once = (
        gradients(family, finer(settings(family, adapter={"dropout": 0.3}, train={"activation_checkpointing": nested})))
        for nested in (True, False)
    )
    assert_equal(nested, once, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_is_predicted_and_less(name: str, open_tiny: OpenTiny) -> None:
    family = shallow(open_tiny(name, "t2v"))
    profile = settings(family)
    clips = small_clips(family, profile)
    before, after = (sum(predict_training(one, family, clips, CPU).values()) for one in (profile, finer(profile)))
    assert after == pytest.approx(measured_step(family, finer(profile), clips), rel=0.05)
    assert after < before


def test_a_recomputed_part_keeps_nothing_for_each_block(open_tiny: OpenTiny) -> None:
    family = open_tiny("ltxvideo", "t2v")  # it calls attention with keywords
    profile = settings(family)
    clips = small_clips(family, profile)
    grown = [
        sum(predict_training(one, family.with_blocks(9), clips, CPU).values())
        - sum(predict_training(one, family.with_blocks(5), clips, CPU).values())
        for one in (profile, finer(profile))
    ]
    assert grown[1] == pytest.approx(grown[0], rel=0.01)


# Dynamo looks at .grad of every input of a graph.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_recompute_finely_too(open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    family = shallow(open_tiny("wan", "t2v"))
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager"))
    compiled = settings(family, train={"compile": True})
    assert_equal(gradients(family, finer(compiled)), gradients(family, settings(family)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_placement_changes_no_bit_of_it(name: str, open_tiny: OpenTiny) -> None:
    family = of_depth(open_tiny(name, "t2v"), 3)
    recompute: dict[str, object] = {"finer_recompute": True}
    (losses, weights), (found_losses, found) = (
        result(family, {"memory": recompute | placed}, steps=2) for placed in ({}, STREAM | OFFLOAD)
    )
    assert found_losses == losses
    assert all(torch.equal(found[name], one) for name, one in weights.items())


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_with_the_same_weights(
    demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose masks are drawn in every recomputation; it may go on with other memory settings."""
    monkeypatch.chdir(demo)
    sets = ("memory.finer_recompute=true", "checkpoints.every=3", "validation.every=0", "train.batch_size=1")
    flags = [word for setting in sets for word in ("--set", setting)]
    command = ["train", "--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", "6", *flags]
    whole = demo / "runs" / "finer"
    assert run_crepa(*command, "--set", "adapter.dropout=0.1", "--output", whole) == 0
    resumed = shutil.copytree(whole, demo / "runs" / "finer-resumed")
    shutil.rmtree(resumed / "checkpoints/step-000006")
    assert run_crepa("train", "--resume", "--plain", "--output", resumed) == 0
    ours, theirs = (load_file(run / "weights/pytorch_lora_weights.safetensors") for run in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    shutil.rmtree(resumed / "checkpoints/step-000006")
    others = ["--set", "memory.finer_recompute=false"]
    assert run_crepa("train", "--resume", "--plain", "--output", resumed, *others) == 0
