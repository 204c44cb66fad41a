"""Loading a transformer in int8: what is quantized, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenTiny
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_memory import highest_level
from test_wan import two_experts
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from crepa_cli.errors import UserError
from crepa_cli.models import FAMILIES
from crepa_cli.models.family import Family
from crepa_cli.models.int8 import Int8Linear, has_int8
from crepa_cli.models.precision import is_kept_in_float32
from crepa_cli.models.wan import Wan

Write = Callable[[dict[str, Tensor], Path], None]


def changed(family: Family, folder: Path, write: Write) -> Family:
    """The family with a copy of its checkpoint whose transformer `write` writes anew from its weights."""
    shutil.copytree(family.base.name, folder)
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    path.unlink()
    write(weights, path.parent)
    return type(family)(str(folder), family.task)


def in_shards(dtype: torch.dtype) -> Write:
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


@pytest.mark.parametrize(("name", "dtype"), [("wan", torch.float32), *((name, torch.bfloat16) for name in FAMILIES)])
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
    with torch.device("meta"):
        predicted = family.empty_transformer(dtype, int8=True)
    weights = ([(key, one.dtype, one.shape) for key, one in model.named_parameters()] for model in (predicted, ours))
    assert next(weights) == next(weights)


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


@pytest.mark.slow
def test_loading_takes_the_quantized_weights_and_one_block(open_tiny: OpenTiny, tmp_path: Path) -> None:
    """The mapped file is not counted: the system drops its pages when it needs memory."""
    sizes = {"num_layers": 6, "num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096}

    def larger(_: dict[str, Tensor], folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | sizes
        (folder / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            weights = WanTransformer3DModel.from_config(config).state_dict()
        random = {name: torch.rand(weight.shape, dtype=torch.bfloat16) for name, weight in weights.items()}
        save_file(random, folder / "diffusion_pytorch_model.safetensors")

    family = changed(open_tiny("wan", "t2v"), tmp_path / "large", larger)
    with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        transformer = family.load_transformer(torch.bfloat16, int8=True)
    weights = sum(parameter.nbytes for parameter in transformer.parameters())
    block = 2 * sum(parameter.numel() for parameter in family.blocks(transformer)[0].parameters())
    assert weights > 10**8
    file = family.base.weight_files("transformer")[0].stat().st_size
    assert highest_level(profiled) - file <= 1.1 * weights + block


def test_the_other_expert_of_a_validation_is_quantized_too(open_tiny: OpenTiny, checkpoints: Path) -> None:
    family = Wan(two_experts(open_tiny, checkpoints, "t2v"), "t2v", variant="low")
    pipeline: Any = family.load_sampling_pipeline(family.load_transformer(torch.float32, int8=True))
    assert has_int8(pipeline.transformer)
    assert not has_int8(family.load_sampling_pipeline(family.load_transformer(torch.float32)).transformer)
