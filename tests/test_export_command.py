"""`crepa export`: weights from the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import RunCrepa
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from test_export import comfyui_parameters

from crepa_cli.models.wan import Wan

RUN = Path("runs/wan-t2v-1")


@pytest.fixture(autouse=True)
def _in_the_demo(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)


def test_a_run_that_is_over_is_exported_to_the_same_bytes(run_crepa: RunCrepa) -> None:
    file = RUN / "weights/wan-t2v-1_comfyui.safetensors"
    others = {path: path.stat().st_mtime_ns for path in RUN.rglob("*") if path.is_file() and path != file}
    written = file.read_bytes()
    file.unlink()
    assert run_crepa("export", RUN, "--format", "comfyui") == 0
    assert file.read_bytes() == written
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_a_step_is_exported_in_another_dtype(run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]) -> None:
    name = RUN / "weights/step-000020/wan-t2v-1_step-000020_diffusers.safetensors"
    written = load_file(name)
    assert run_crepa("export", RUN, "--step", 20, "--format", "diffusers", "--dtype", "fp32") == 0
    assert capsys.readouterr().out.strip() == f"diffusers: {name}"
    saved = load_file(RUN / "checkpoints/step-000020/model.safetensors")
    for key, tensor in load_file(name).items():
        assert torch.equal(tensor, saved[key.removesuffix(".weight") + ".default.weight"])
        assert torch.equal(tensor.bfloat16(), written[key])


def test_a_lora_is_merged_into_its_base(run_crepa: RunCrepa) -> None:
    assert run_crepa("export", RUN, "--merge", "--dtype", "float32") == 0
    folder = RUN / "weights/merged"
    base = WanTransformer3DModel.from_pretrained("crepa-demo/wan-trained/transformer").state_dict()
    merged = WanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
    saved = load_file(RUN / "checkpoints/step-000060/model.safetensors")
    changed = 0
    for name, weight in merged.items():
        matrices = [
            saved.get(f"transformer.{name.removesuffix('weight')}{part}.default.weight")
            for part in ("lora_B", "lora_A")
        ]
        up, down = matrices
        expected = base[name] if up is None or down is None else base[name].double() + up.double() @ down.double()
        torch.testing.assert_close(weight.double(), expected.double(), atol=1e-6, rtol=1e-6)
        changed += up is not None
    assert changed == len([name for name in saved if "lora_A" in name])
    comfyui = load_file(folder / "wan-t2v-1_merged_comfyui.safetensors")
    assert comfyui.keys() == comfyui_parameters(Wan("crepa-demo/wan-trained", "t2v"))
    assert torch.equal(comfyui["blocks.3.self_attn.q.weight"], merged["blocks.3.attn1.to_q.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no run: it has no profile.toml"),
        ([RUN, "--step", 30], "has no checkpoint of step 30, but step-000020, step-000040, step-000060"),
    ],
)
def test_what_cannot_be_exported_is_said(
    arguments: list[object], message: str, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_crepa("export", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
