"""A transformer in one file, with the names of its original checkpoint, which ComfyUI uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import OpenTiny
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from crepa_cli import api
from crepa_cli.errors import UserError
from crepa_cli.models.family import Family
from crepa_cli.models.int8 import has_int8
from crepa_cli.models.weights import make_empty
from crepa_cli.profile import Profile
from crepa_cli.report.metrics import read_metrics
from crepa_cli.runs.checks import load_checkpoint
from crepa_cli.runs.sources import needs

PREFIX = "model.diffusion_model."


def original(family: Family, path: Path, changes: Mapping[str, Tensor], prefix: str = "") -> Path:
    """The weights of a tiny checkpoint's transformer in one file, by the names that our export gives them."""
    weights = load_file(family.base.weight_files("transformer")[0])
    named = {f"{prefix}{family.original_name(name)}": tensor for name, tensor in weights.items()}
    save_file({**named, **changes}, path)
    return path


@pytest.mark.parametrize(("name", "prefix"), [("wan", ""), ("wan", PREFIX), ("ltxvideo", PREFIX)])
def test_a_file_with_original_names_holds_the_same_transformer(
    name: str, prefix: str, open_tiny: OpenTiny, tmp_path: Path
) -> None:
    """Beside a VAE, as some files have one."""
    family = open_tiny(name, "t2v")
    beside = {"vae.decoder.weight": torch.zeros(1)} if prefix else {}
    ours = family.with_file(original(family, tmp_path / "model.safetensors", beside, prefix))
    for dtype, int8 in [(torch.bfloat16, False), (torch.float32, True)]:
        _assert_same(ours.load_transformer(dtype, int8=int8), family.load_transformer(dtype, int8=int8))
    hollow = ours.hollow_transformer(torch.float32)
    make_empty(hollow)
    ours.read_weights(hollow)
    _assert_same(hollow, family.load_transformer(torch.float32))


def _assert_same(ours: Any, theirs: Any) -> None:
    wanted = theirs.state_dict()
    assert has_int8(ours) == has_int8(theirs)
    assert ours.state_dict().keys() == wanted.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name])
    assert not any(parameter.requires_grad for parameter in theirs.parameters())


def test_it_is_what_from_single_file_loads(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("wan", "t2v")
    path = original(family, tmp_path / "model.safetensors", {}, PREFIX)
    published = WanTransformer3DModel.from_single_file(str(path), config=family.base.name, subfolder="transformer")
    _assert_same(family.with_file(path).load_transformer(torch.float32), published.requires_grad_(False))


def test_a_file_that_cannot_be_trained_is_refused_before_any_work(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("wan", "t2v")
    fp8 = torch.zeros(144, 48).to(torch.float8_e4m3fn)
    original(family, tmp_path / "fp8.safetensors", {"blocks.0.ffn.0.weight": fp8})
    original(family, tmp_path / "scaled.safetensors", {"scaled_fp8": torch.zeros(2)})
    original(family, tmp_path / "wide.safetensors", {"head.head.weight": torch.zeros(64, 48)})
    original(family, tmp_path / "more.safetensors", {"vace_blocks.0.weight": torch.zeros(1)})
    save_file({"head.modulation": torch.zeros(1, 2, 48)}, tmp_path / "less.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"no weights")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    messages = {
        "fp8.safetensors": r"quantized weights \(F8_E4M3\).*in bfloat16 or float16",
        "scaled.safetensors": r"quantized weights \(scaled fp8\)",
        "small.gguf": "GGUF and pickled files are not",
        "cut.safetensors": "cannot be read",
        "none.safetensors": "cannot be read: No such file",
        "wide.safetensors": r"proj_out\.weight is \(64, 48\) in it and \(16, 48\) there; set model\.components",
        "more.safetensors": r"does not fit transformer/config\.json of .*it has vace_blocks\.0\.weight beside",
        "less.safetensors": r"it lacks blocks\.0",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            family.with_file(tmp_path / name)
    sana = open_tiny("sanavideo", "t2v")
    with pytest.raises(UserError, match="diffusers reads no single file of a SanaVideoTransformer3DModel"):
        sana.with_file(tmp_path / "any.safetensors")


def test_the_other_components_and_the_defaults_are_those_of_the_model_that_the_file_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "wan_14b.safetensors"
    save_file(
        {"head.modulation": torch.zeros(1, 2, 5120), "patch_embedding.weight": torch.zeros(5120, 16, 1, 2, 2)}, path
    )
    flags = {"model.family": "wan", "model.checkpoint": str(path)}
    profile = api.resolve("t2v", flags).profile
    assert profile.model.components == profile.model.repository == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    assert profile.train.timestep_shift == 3.0
    a14b = api.resolve("t2v", flags, ["model.components=Wan-AI/Wan2.2-T2V-A14B-Diffusers"]).profile
    assert a14b.model.repository == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    assert a14b.train.timestep_shift == 12.0
    folder = api.resolve("t2v", {"model.family": "wan"}, ["model.components=owner/model"]).profile
    with pytest.raises(UserError, match="it is for a checkpoint in one file"):
        load_checkpoint(folder)


@pytest.mark.slow
def test_a_run_from_a_file_starts_as_one_from_the_folder(
    open_tiny: OpenTiny, tiny_dinov2: Path, short_clips: Path, tmp_path: Path
) -> None:
    family = open_tiny("wan", "t2v")
    file = original(family, tmp_path / "model.safetensors", {}, PREFIX)
    sets = ["data.width=32", "data.height=32", "data.frames=9", "train.steps=2", "validation.every=0"]
    sets += ["model.dtype=float32", "adapter.rank=4", "crepa.encoder_image_size=28"]

    def settings(**model: str) -> Profile:
        flags = {f"model.{key}": value for key, value in model.items()}
        flags |= {"model.family": "wan", "data.path": str(short_clips), "crepa.encoder": str(tiny_dinov2)}
        return api.resolve("t2v", flags, sets).profile

    losses = []
    profiles = [settings(checkpoint=str(file), components=family.base.name), settings(checkpoint=family.base.name)]
    for index, profile in enumerate(profiles):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = api.train(profile, output=tmp_path / str(index))
        losses.append(read_metrics(run.metrics)[0]["diffusion_loss"])
    # The LoRA has no effect yet.
    assert losses[0] == losses[1]
    (need, _) = needs(profiles[0], load_checkpoint(profiles[0]))
    assert "transformer" not in need.folders
    card = (tmp_path / "0/README.md").read_text()
    assert 'WanTransformer3DModel.from_single_file(\n    "model.safetensors", config=' in card
