"""Frozen linear layers in int8: their values and gradients, loading, prediction, and training with them."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenTiny
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_memory import settings
from test_precision import training_inputs
from test_processes import DEMO, TORCHRUN, crepa, largest_difference, losses
from test_wan import two_experts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crepa_cli import api
from crepa_cli.errors import UserError
from crepa_cli.events import Event, Notice
from crepa_cli.models import FAMILIES
from crepa_cli.models.family import Family
from crepa_cli.models.int8 import Int8Linear, has_int8, quantize
from crepa_cli.models.precision import is_kept_in_float32
from crepa_cli.models.wan import Wan
from crepa_cli.profile import AdapterSettings
from crepa_cli.report.metrics import read_metrics
from crepa_cli.runs.checks import family_mistakes
from crepa_cli.runs.folder import RunFolder
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


def changed(family: Family, folder: Path, change: Any) -> Family:
    """The family with a copy of its checkpoint in which `change` has rewritten the transformer's weights."""
    shutil.copytree(family.base.name, folder)
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    path.unlink()
    change(weights, path.parent)
    return type(family)(str(folder), family.task)


def in_shards(dtype: torch.dtype) -> Any:
    def write(weights: dict[str, Tensor], folder: Path) -> None:
        """Three files with an index; the parameters of a layer need not be in one file."""
        index: dict[str, str] = {}
        for number in range(3):
            name = f"diffusion_pytorch_model-{number + 1:05d}-of-00003.safetensors"
            part = {key: weights[key].to(dtype) for key in sorted(weights)[number::3]}
            save_file(part, folder / name)
            index |= dict.fromkeys(part, name)
        table = {"metadata": {"total_size": 0}, "weight_map": index}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(table))

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_loading_quantizes_the_linear_layers_of_the_blocks_alone(
    name: str, dtype: torch.dtype, open_tiny: OpenTiny
) -> None:
    """All else is as `from_pretrained` makes it, buffers included."""
    family = open_tiny(name, "t2v")
    plain, ours = family.load_transformer(dtype), family.load_transformer(dtype, int8=True)
    inside = set(family.blocks(ours).modules())
    for path, module in ours.named_modules():
        linear = isinstance(module, nn.Linear) and module in inside and not is_kept_in_float32(ours, path)
        assert isinstance(module, Int8Linear) == linear
    assert has_int8(ours)
    assert not has_int8(plain)
    found = dict(ours.named_parameters()) | dict(ours.named_buffers())
    for key, expected in [*plain.named_parameters(), *plain.named_buffers()]:
        scale = found.get(f"{key.removesuffix('weight')}scale") if key.endswith("weight") else None
        if scale is not None:
            error = (found[key].float() * scale.float() - expected.float()).abs()
            assert bool((error <= 0.51 * scale.float() + 1e-2 * expected.float().abs()).all())
        else:
            assert found[key].dtype == expected.dtype
            assert torch.equal(found[key], expected)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert ours.dtype == plain.dtype
    assert not ours.training


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_and_other_dtypes_load_alike(stored: torch.dtype, open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("wan", "t2v")
    whole = family.load_transformer(torch.bfloat16, int8=True)
    shards = changed(family, tmp_path / "shards", in_shards(stored)).load_transformer(torch.bfloat16, int8=True)
    for (key, expected), (name, found) in zip(whole.named_parameters(), shards.named_parameters(), strict=True):
        assert (key, expected.dtype) == (name, found.dtype)
        if stored == torch.float32:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=1.01)


@pytest.mark.parametrize("int8", [False, True])
def test_an_incomplete_checkpoint_ends_with_one_message(int8: bool, open_tiny: OpenTiny, tmp_path: Path) -> None:
    def without_one(weights: dict[str, Tensor], folder: Path) -> None:
        weights.pop("blocks.3.attn1.to_q.weight")
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")

    family = changed(open_tiny("wan", "t2v"), tmp_path / "less", without_one)
    with pytest.raises(UserError, match=r"transformer is incomplete: it lacks blocks\.3\.attn1\.to_q\.weight"):
        family.load_transformer(torch.bfloat16, int8=int8)


def test_damaged_misshapen_and_unknown_weights(
    open_tiny: OpenTiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def truncated(weights: dict[str, Tensor], folder: Path) -> None:
        save_file(weights, folder / "all")
        (folder / "diffusion_pytorch_model.safetensors").write_bytes((folder / "all").read_bytes()[:-100])

    def misshapen(weights: dict[str, Tensor], folder: Path) -> None:
        name = "blocks.3.attn1.to_q.weight"
        save_file(weights | {name: weights[name][:8].clone()}, folder / "diffusion_pytorch_model.safetensors")

    def unknown(weights: dict[str, Tensor], folder: Path) -> None:
        others = {"blocks.0.attn2.norm_added_q.weight": torch.ones(2), "blocks.0.spare": torch.ones(2)}
        save_file(weights | others, folder / "diffusion_pytorch_model.safetensors")

    wan = open_tiny("wan", "t2v")
    with pytest.raises(UserError, match="cannot be read"):
        changed(wan, tmp_path / "truncated", truncated).load_transformer(torch.bfloat16, int8=True)
    with pytest.raises(UserError, match=r"to_q\.weight has the shape \(8, 48\) in the checkpoint, and \(48, 48\)"):
        changed(wan, tmp_path / "misshapen", misshapen).load_transformer(torch.bfloat16, int8=True)
    with caplog.at_level(logging.WARNING):
        changed(wan, tmp_path / "unknown", unknown).load_transformer(torch.bfloat16, int8=True)
    assert "does not use: blocks.0.spare" in caplog.text
    assert "norm_added_q" not in caplog.text


PEAK = """
import gc, sys, threading
import torch
from crepa_cli.models import load_family

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def sample():
    while not ended.wait(0.001):
        levels.append(anonymous())

torch.set_num_threads(1)
small, large = (load_family("wan")(folder, "t2v") for folder in sys.argv[1:])
small.load_transformer(torch.bfloat16, int8=True)
gc.collect()
before, levels, ended = anonymous(), [], threading.Event()
sampler = threading.Thread(target=sample)
sampler.start()
transformer = large.load_transformer(torch.bfloat16, int8=True)
ended.set()
sampler.join()
weights = sum(parameter.nbytes for parameter in transformer.parameters())
block = 2 * sum(parameter.numel() for parameter in transformer.blocks[0].parameters())
print(max(levels) - before, weights, block)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory without mapped files is read from /proc")
def test_loading_takes_the_quantized_weights_and_one_block(open_tiny: OpenTiny, tmp_path: Path) -> None:
    """Pages of the checkpoint itself do not count: the system drops them when it needs memory."""

    def larger(_: dict[str, Tensor], folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        sizes = {"num_layers": 6, "num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096}
        torch.manual_seed(0)
        transformer = WanTransformer3DModel.from_config(config | sizes)
        # Not to(), which warns of modules that are better left in float32.
        weights = {name: weight.bfloat16() for name, weight in transformer.state_dict().items()}
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | sizes))

    small = open_tiny("wan", "t2v")
    large = changed(small, tmp_path / "large", larger)
    command = [sys.executable, "-c", PEAK, small.base.name, large.base.name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, weights, block = map(int, done.stdout.split()[-3:])
    assert weights > 10**8
    assert peak <= 1.1 * weights + block


def test_the_other_expert_of_a_validation_is_quantized_too(open_tiny: OpenTiny, checkpoints: Path) -> None:
    family = Wan(two_experts(open_tiny, checkpoints, "t2v"), "t2v", variant="low")
    pipeline: Any = family.load_sampling_pipeline(family.load_transformer(torch.float32, int8=True))
    assert has_int8(pipeline.transformer)
    assert not has_int8(family.load_sampling_pipeline(family.load_transformer(torch.float32)).transformer)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prediction_has_the_weights_that_are_loaded(name: str, open_tiny: OpenTiny) -> None:
    family = open_tiny(name, "t2v")
    with torch.device("meta"):
        empty = family.empty_transformer(torch.bfloat16, int8=True)
    kinds = [
        {key: (one.dtype, one.shape) for key, one in model.named_parameters()}
        for model in (empty, family.load_transformer(torch.bfloat16, int8=True))
    ]
    assert kinds[0] == kinds[1]


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


def run_of(folder: Path, *settings: str, resume: bool = False) -> tuple[RunFolder, list[str]]:
    """A run of the demo with an int8 base, four steps unless the settings say otherwise, and its notices of it."""
    sets = ["validation.every=0", "train.batch_size=1", "train.steps=4", "memory.quantize_base=int8", *settings]
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    events: list[Event] = []
    run = api.train(profile, output=folder, resume=resume, listeners=[events.append])
    notices = [event.message for event in events if isinstance(event, Notice)]
    return run, [notice for notice in notices if "quantize_base" in notice]


def weights_of(run: Path, step: int = 4) -> dict[str, Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/model.safetensors")


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_in_int8_resumes_bit_for_bit_and_says_if_it_goes_on_without(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    every = "checkpoints.every=2"
    sampled = ["validation.every=4", "validation.steps=1"]
    whole, notices = run_of(tmp_path / "whole", every, *sampled)
    assert notices == []
    assert len(list(whole.path.rglob("*.mp4"))) == 2, "before and after"
    cut = shutil.copytree(whole.path, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints/step-000004")
    _, notices = run_of(cut, every, resume=True)
    assert notices == []
    first, second = weights_of(cut), weights_of(whole.path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    shutil.rmtree(cut / "checkpoints/step-000004")
    _, notices = run_of(cut, every, "memory.quantize_base=none", resume=True)
    (notice,) = notices
    assert "memory.quantize_base = 'none', after 'int8'" in notice


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_losses_of_the_demo_stay_within_2_percent(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    sets = ["validation.every=0", "memory.quantize_base=int8"]
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    metrics = tmp_path / "run/metrics.jsonl"

    def after_20_steps() -> bool:
        return metrics.exists() and len(read_metrics(metrics)) == 20

    api.train(profile, output=tmp_path / "run", should_stop=after_20_steps)
    ours, plain = losses(tmp_path / "run"), losses(demo / "runs/wan-t2v-1")
    assert len(ours) == 20
    assert ours == pytest.approx(plain[:20], rel=0.02)
    assert ours != plain[:20]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_two_processes_that_share_out_int8_weights_learn_what_one_does(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    one, _ = run_of(tmp_path / "one", "train.gradient_accumulation=2", "train.steps=2")
    two = tmp_path / "two"
    settings = ["train.batch_size=1", "memory.quantize_base=int8", "train.sharding=true"]
    crepa(demo, *DEMO, "--steps", "2", *(f"--set={one}" for one in settings), "--output", two, launcher=TORCHRUN)
    assert losses(two) == pytest.approx(losses(one.path), abs=1e-5)
    saved = "checkpoints/step-000002/model.safetensors"
    assert largest_difference(one.path / saved, two / saved) < 1e-5


def test_full_tuning_is_refused(open_tiny: OpenTiny) -> None:
    tables: dict[str, dict[str, object]] = {"memory": {"quantize_base": "int8"}, "adapter": {"kind": "full"}}
    family = open_tiny("wan", "t2v")
    (mistake,) = family_mistakes(family, settings(family, **tables))
    assert "memory.quantize_base: adapter.kind = 'full'" in mistake
