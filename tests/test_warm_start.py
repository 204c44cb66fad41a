"""`adapter.init_from`: a run that starts where a LoRA left off."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import OpenTiny, RunCrepa
from safetensors.torch import load_file, save_file
from test_export import a_step, lora, predicted, shortened

from crepa_cli.errors import UserError
from crepa_cli.models import FAMILIES
from crepa_cli.models.family import Family, Tensors
from crepa_cli.models.joined import original_lora
from crepa_cli.models.lora import fetch_lora
from crepa_cli.profile import AdapterSettings
from crepa_cli.report.metrics import read_metrics
from crepa_cli.runs.folder import Exports
from crepa_cli.training.adapter import make_trainable, start_from
from crepa_cli.training.checkpoints import trained_weights
from crepa_cli.training.export import export_weights, lora_layers


def started(family: Family, file: Path, **settings: object) -> Any:
    """A new transformer with a LoRA of alpha 32 that starts from a file."""
    defaults = {**family.settings["adapter"], "rank": 8, "alpha": 32.0, "init_from": str(file)}
    adapter = AdapterSettings.model_validate(defaults | settings)
    transformer = shortened(family)
    make_trainable(transformer, adapter)
    start_from(transformer, family, adapter)
    return transformer


def in_other_forms(family: Family, weights: Tensors, alpha: float, folder: Path) -> list[Path]:
    """The LoRA as kohya's trainers write it, and as diffusers does: the scale beside the matrices."""
    plain = lora_layers(weights, alpha=8.0)
    original = plain if family.comfyui_names is None else original_lora(family, shortened(family), plain)
    kohya = {}
    for name, tensor in original.items():
        module, matrix, _ = name.rsplit(".", 2)
        key = f"lora_unet_{module.replace('.', '_')}"
        kohya[f"{key}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor
        if matrix == "lora_A":
            kohya[f"{key}.alpha"] = torch.tensor(alpha * len(tensor) / 8)
    published = {f"transformer.{name}": tensor for name, tensor in plain.items()}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 8, "transformer.lora_alpha": alpha})}
    folder.mkdir()
    save_file(kohya, folder / "kohya.safetensors")
    save_file(published, folder / "published.safetensors", metadata=metadata)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("name", FAMILIES)
def test_training_starts_with_the_predictions_of_the_lora(name: str, open_tiny: OpenTiny, tmp_path: Path) -> None:
    """In the names of diffusers, ComfyUI and kohya's trainers, wherever the scale is written."""
    family = open_tiny(name, "t2v")
    step = a_step(family)
    trained, adapter = lora(family, shortened(family), rank=8, alpha=2.0)
    expected = predicted(trained, step)
    weights = trained_weights(trained)
    export_weights(family, trained, weights, adapter, Exports(tmp_path / "ours", "run"), {})
    files = [*(tmp_path / "ours").iterdir(), *in_other_forms(family, weights, 2.0, tmp_path / "theirs")]
    assert len(files) == (3 if family.comfyui_names is None else 4)
    for file in files:
        torch.testing.assert_close(predicted(started(family, file), step), expected, atol=1e-5, rtol=1e-5)


def test_a_run_goes_on_at_the_loss_where_the_lora_left_off(
    demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    flags = ["--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", 1, "--output", "runs/warm"]
    sets = ["--set", "validation.every=0", "--set", "adapter.init_from=runs/wan-t2v-1/weights"]
    assert run_crepa("train", *flags, *sets) == 0
    before = [line["diffusion_loss"] for line in read_metrics(demo / "runs/wan-t2v-1/metrics.jsonl")]
    (warm,) = read_metrics(demo / "runs/warm/metrics.jsonl")
    # Both are of the same clips, noise and noise levels.
    assert warm["diffusion_loss"] < 0.6 * before[0]


@pytest.mark.parametrize(
    ("source", "setting", "message"),
    [
        ("runs/wan-t2v-1/weights", "adapter.rank=4", "its rank is 16; set adapter.rank = 16"),
        ("runs/wan-t2v-1/weights", "adapter.kind=full", "a LoRA cannot start a full fine-tune"),
        ("runs/wan-t2v-1/weights/step-000020", "adapter.rank=8", "several: wan-t2v-1_step-000020_comfyui.safetensors"),
        ("nothing.safetensors", "adapter.rank=8", "there is no such file"),
        ("runs/wan-t2v-1/profile.toml", "adapter.rank=8", "cannot be read"),
    ],
)
def test_what_cannot_start_a_run_is_said_before_training(
    source: str,
    setting: str,
    message: str,
    demo: Path,
    run_crepa: RunCrepa,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(demo)
    sets = ["--set", setting, "--set", f"adapter.init_from={source}"]
    assert run_crepa("train", "--profile", "t2v", "--model", "wan", "--demo", "--plain", *sets) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_layer_that_the_run_would_not_train_is_named(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("wan", "t2v")
    trained, adapter = lora(family, shortened(family), rank=8)
    exports = Exports(tmp_path / "weights", "run")
    export_weights(family, trained, trained_weights(trained), adapter, exports, {})
    with pytest.raises(UserError, match=r"such as diffusion_model.blocks.0.cross_attn.k.lora_A.weight"):
        started(family, exports.folder / exports.comfyui, target_modules=["to_q"])
    assert load_file(fetch_lora(str(exports.folder))).keys() == load_file(exports.folder / exports.diffusers).keys()


def test_a_file_on_the_hub_is_named_or_chosen_as_diffusers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from crepa_cli.models import lora as module

    files = ["README.md", "a_comfyui.safetensors", "weights/pytorch_lora_weights.safetensors"]
    monkeypatch.setattr(module, "list_files", lambda _: SimpleNamespace(files=dict.fromkeys(files)))
    monkeypatch.setattr(module, "fetch_file", lambda repository, filename: Path(f"{repository}:{filename}"))
    assert fetch_lora("user/repo") == Path("user/repo:weights/pytorch_lora_weights.safetensors")
    assert fetch_lora("user/repo/a_comfyui.safetensors") == Path("user/repo:a_comfyui.safetensors")
