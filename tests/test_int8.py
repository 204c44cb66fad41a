"""Frozen linear layers in int8: their values and gradients, loading, prediction, and training with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenTiny
from test_memory import settings
from test_placement import OFFLOAD, STREAM, assert_same_bits, of_depth
from test_precision import training_inputs
from test_processes import DEMO, TORCHRUN, crepa, largest_difference, losses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crepa_cli import api
from crepa_cli.events import Event, Notice, StepDone
from crepa_cli.models import FAMILIES
from crepa_cli.models.family import Family
from crepa_cli.models.int8 import Int8Linear, quantize
from crepa_cli.profile import AdapterSettings
from crepa_cli.runs.checks import family_mistakes
from crepa_cli.training.adapter import make_trainable


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_weight_differs_by_half_a_scale_at_most(stored: torch.dtype, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)[:, None]
    weight[3] = 0
    weight = weight.to(stored)
    codes, scale = quantize(weight, dtype)
    assert codes.dtype == torch.int8
    assert scale.dtype == dtype
    error = (codes.double() * scale.double() - weight.double()).abs()
    assert bool((error <= scale.double() * 0.501).all())
    assert int(codes[3].abs().sum()) == 0
    # A row's largest weight uses the whole range.
    assert bool((codes[torch.arange(64) != 3].abs().amax(1) >= 126).all())


def layer(dtype: torch.dtype) -> tuple[Int8Linear, nn.Linear]:
    """A layer in int8, and one in float64 with the same weight after quantization."""
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(48, 32, dtype=dtype).requires_grad_(False))
    exact = nn.Linear(48, 32, dtype=torch.float64).requires_grad_(False)
    exact.weight.copy_(layer.weight.double() * layer.scale.double())
    exact.bias.copy_(layer.bias.double())
    return layer, exact


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradient_are_those_of_the_dequantized_layer(
    dtype: torch.dtype, tolerance: float, recomputed: bool
) -> None:
    ours, exact = layer(dtype)
    hidden = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    first, second = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = checkpoint(ours, first, use_reentrant=False) if recomputed else ours(first)
    assert output.dtype == dtype
    expected = exact(second)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    assert first.grad is not None
    torch.testing.assert_close(first.grad.double(), second.grad, rtol=tolerance, atol=tolerance)


def test_nothing_but_int8_is_saved_for_the_backward() -> None:
    ours, _ = layer(torch.bfloat16)
    saved: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    hidden = torch.randn(5, 48, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(save, lambda one: one):
        ours(hidden)
    assert saved == [ours.weight.data_ptr(), ours.scale.data_ptr()]


def lora_on(transformer: Any, family: Family) -> dict[str, nn.Parameter]:
    """The parameters of a new LoRA whose matrices are all random, by name."""
    settings = {**family.settings["adapter"], "rank": 4, "alpha": 4.0, "export": ["diffusers"]}
    make_trainable(transformer, AdapterSettings.model_validate(settings))
    layers = {name: one for name, one in transformer.named_parameters() if one.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers.values():
            layer.copy_(torch.randn(layer.shape, generator=generator) * 0.05)
    return layers


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_learns_on_int8_what_it_learns_on_the_float_model(name: str, open_tiny: OpenTiny) -> None:
    """Its layers are the same, the loss differs by less than 2 %, and the gradients point the same way."""
    family = open_tiny(name, "t2v")
    kinds, losses, gradients = [], [], []
    for int8 in (False, True):
        transformer = family.load_transformer(torch.bfloat16, int8=int8)
        layers = lora_on(transformer, family)
        transformer.train().enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16):
            predicted = transformer(**training_inputs(family)).sample.float()
        loss = (predicted - torch.randn(predicted.shape, generator=torch.Generator().manual_seed(1))).square().mean()
        loss.backward()
        kinds.append({key: (one.shape, one.dtype) for key, one in layers.items()})
        losses.append(loss.item())
        gradients.append(torch.cat([one.grad.flatten() for one in layers.values() if one.grad is not None]))
    assert kinds[0] == kinds[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.98


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # both are the compiler's own
def test_compiled_blocks_compute_the_same(open_tiny: OpenTiny) -> None:
    family = open_tiny("wan", "t2v")
    computed = []
    for compiled in (False, True):
        transformer = family.load_transformer(torch.bfloat16, int8=True)
        layers = lora_on(transformer, family)
        transformer.train().enable_gradient_checkpointing()
        if compiled:
            block = family.blocks(transformer)[1]
            block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = transformer(**training_inputs(family)).sample.float()
        predicted.square().mean().backward()
        computed.append([predicted, *(one.grad for one in layers.values())])
    torch.testing.assert_close(computed[0], computed[1], rtol=0, atol=0)


def test_placement_changes_no_bit_of_it(open_tiny: OpenTiny) -> None:
    memory: dict[str, object] = {"quantize_base": "int8"}
    family = of_depth(open_tiny("ltxvideo", "t2v"), 3)
    assert_same_bits(family, {"memory": memory, "model": {"dtype": "bfloat16"}}, memory | STREAM | OFFLOAD, steps=2)


def demo_run(folder: Path, *sets: str, steps: int, resume: bool = False) -> list[str]:
    """The notices of a run of the demo in int8 that is stopped, or resumed and stopped, after some of its 60 steps."""
    sets = ("validation.every=0", "memory.quantize_base=int8", *sets)
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    events: list[Event] = []

    def enough() -> bool:
        return any(isinstance(event, StepDone) and event.step == steps - 1 for event in events)

    api.train(profile, output=folder, resume=resume, listeners=[events.append], should_stop=enough)
    return [event.message for event in events if isinstance(event, Notice)]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_demo_in_int8_loses_2_percent_at_most_and_resumes_bit_for_bit(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    whole, cut, saved = tmp_path / "whole", tmp_path / "cut", "checkpoints/step-000016/model.safetensors"
    demo_run(whole, "checkpoints.every=8", steps=16)
    ours, plain = losses(whole), losses(demo / "runs/wan-t2v-1")[:16]
    assert ours == pytest.approx(plain, rel=0.02)
    assert ours != plain

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step-000016")
    assert not any("quantize_base" in notice for notice in demo_run(cut, steps=16, resume=True))
    assert largest_difference(whole / saved, cut / saved) == 0

    notices = demo_run(cut, "memory.quantize_base=none", steps=17, resume=True)
    (notice,) = (notice for notice in notices if "quantize_base" in notice)
    assert "memory.quantize_base = 'none', after 'int8'" in notice


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_two_processes_that_share_out_int8_weights_learn_what_one_does(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    one, two, saved = tmp_path / "one", tmp_path / "two", "checkpoints/step-000002/model.safetensors"
    demo_run(one, "train.batch_size=1", "train.gradient_accumulation=2", "train.steps=2", steps=2)
    sets = ["train.batch_size=1", "memory.quantize_base=int8", "train.sharding=true"]
    crepa(demo, *DEMO, "--steps", "2", *(f"--set={one}" for one in sets), "--output", two, launcher=TORCHRUN)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert largest_difference(one / saved, two / saved) < 1e-5


def test_full_tuning_is_refused(open_tiny: OpenTiny) -> None:
    tables: dict[str, dict[str, object]] = {"memory": {"quantize_base": "int8"}, "adapter": {"kind": "full"}}
    family = open_tiny("wan", "t2v")
    (mistake,) = family_mistakes(family, settings(family, **tables))
    assert "memory.quantize_base: adapter.kind = 'full'" in mistake
