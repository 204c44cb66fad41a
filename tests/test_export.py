"""Exported LoRAs: in diffusers' layout, and in that of the original checkpoints for ComfyUI."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
import torch
from conftest import OpenTiny, RunCrepa
from diffusers import WanPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_ltxv_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from test_wan import two_experts

from crepa_cli.models.family import COMFYUI_FILE, Family, Tensors
from crepa_cli.models.wan import Wan
from crepa_cli.profile import AdapterSettings
from crepa_cli.report import card
from crepa_cli.settings import resolve
from crepa_cli.training.adapter import export_weights, make_trainable
from crepa_cli.training.checkpoints import trained_weights

READERS: dict[str, Any] = {
    "wan": _convert_non_diffusers_wan_lora_to_diffusers,
    "ltxvideo": _convert_non_diffusers_ltxv_lora_to_diffusers,
    "kandinsky5_video": lambda layers: {
        key.replace("diffusion_model.", "transformer.", 1): tensor for key, tensor in layers.items()
    },
}
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
MORE_OF_WAN = ["add_k_proj", "add_v_proj", "time_proj", "proj_out", "linear_1", "linear_2", "ff.net.0.proj", "ff.net.2"]
"""Layers that an adapter can have in addition to the default ones."""


def exported(family: Family, folder: Path, **settings: object) -> tuple[Tensors, Tensors]:
    """The tensors of the diffusers file and of the ComfyUI file of a random LoRA of rank 4."""
    torch.manual_seed(0)
    defaults = {"rank": 4, "alpha": 4.0, "target_modules": family.settings["adapter"]["target_modules"]}
    adapter = AdapterSettings.model_validate(defaults | {"export": ("diffusers", "comfyui")} | settings)
    transformer = family.load_transformer(torch.float32)
    make_trainable(transformer, adapter)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    export_weights(family, transformer, trained_weights(transformer), adapter, folder)
    assert {path.name for path in folder.iterdir()} == {DIFFUSERS_FILE, COMFYUI_FILE}
    return load_file(folder / DIFFUSERS_FILE), load_file(folder / COMFYUI_FILE)


@pytest.mark.parametrize(
    ("name", "task"), [("wan", "t2v"), ("wan", "i2v"), ("ltxvideo", "t2v"), ("kandinsky5_video", "i2v")]
)
def test_the_comfyui_file_read_back_is_the_diffusers_file(
    name: str, task: str, open_tiny: OpenTiny, tmp_path: Path
) -> None:
    published, comfyui = exported(open_tiny(name, task), tmp_path / "weights")
    read = READERS[name](dict(comfyui))
    assert read.keys() == published.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in published.items())


def test_names_of_wan_are_those_of_the_original_checkpoint(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("wan", "i2v")
    targets = [*family.settings["adapter"]["target_modules"], *MORE_OF_WAN]  # type: ignore[misc]
    published, comfyui = exported(family, tmp_path / "weights", target_modules=targets)
    read = _convert_non_diffusers_wan_lora_to_diffusers(dict(comfyui))
    assert read.keys() == published.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in published.items())
    assert {key.removesuffix(".lora_A.weight") for key in comfyui} >= {
        "diffusion_model.blocks.0.self_attn.q",
        "diffusion_model.blocks.11.cross_attn.o",
        "diffusion_model.blocks.3.cross_attn.k_img",
        "diffusion_model.blocks.3.ffn.0",
        "diffusion_model.blocks.3.ffn.2",
        "diffusion_model.time_projection.1",
        "diffusion_model.time_embedding.2",
        "diffusion_model.text_embedding.0",
        "diffusion_model.img_emb.proj.1",
        "diffusion_model.head.head",
    }


def test_alpha_is_kept(open_tiny: OpenTiny, tmp_path: Path) -> None:
    """Diffusers' reader folds it into the matrices; ComfyUI reads it as it is."""
    published, comfyui = exported(open_tiny("wan", "t2v"), tmp_path / "weights", alpha=8.0)
    assert comfyui["diffusion_model.blocks.0.self_attn.q.alpha"] == 8.0
    read = _convert_non_diffusers_wan_lora_to_diffusers(dict(comfyui))
    assert read.keys() == published.keys()
    for key, down in published.items():
        if "lora_A" in key:
            up = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(read[up] @ read[key], published[up] @ down * 8 / 4)


def test_the_lora_of_the_low_noise_expert_loads_into_it(open_tiny: OpenTiny, checkpoints: Path, tmp_path: Path) -> None:
    family = Wan(two_experts(open_tiny, checkpoints, "t2v"), "t2v", variant="low")
    published, _ = exported(family, tmp_path / "weights")
    pipeline = WanPipeline.from_pretrained(family.base.name)
    pipeline.load_lora_weights(tmp_path / "weights", weight_name=DIFFUSERS_FILE, load_into_transformer_2=True)
    loaded = get_peft_model_state_dict(pipeline.transformer_2, adapter_name="default_0")
    assert {f"transformer.{key}" for key in loaded} == published.keys()
    assert all(torch.equal(tensor, published[f"transformer.{key}"]) for key, tensor in loaded.items())


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("sanavideo", "adapter.rank=4", "comfyui is for wan, ltxvideo, kandinsky5_video"),
        ("wan", "adapter.kind=full", "comfyui is a layout for LoRA"),
    ],
)
def test_what_comfyui_does_not_run_is_said_before_training(
    family: str,
    setting: str,
    message: str,
    run_crepa: RunCrepa,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["--set", setting, "--set", "adapter.export=comfyui"]
    assert run_crepa("train", "--profile", "t2v", "--model", family, "--demo", "--plain", *sets) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_the_code_of_the_card_has_slashes(open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a checkpoint on Windows, whose paths stand in for those of this system."""
    family = open_tiny("wan", "t2v")
    monkeypatch.setattr(card, "Path", PureWindowsPath)
    monkeypatch.setattr(family.base, "name", r"D:\new\wan")
    profile = resolve("t2v", {"model.family": "wan"}, []).profile
    assert 'from_pretrained("D:/new/wan", ' in card.loading_code(family, profile)
