"""Exported weights: what diffusers and ComfyUI make of the files, their names, headers and modes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from inspect import Parameter, signature
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from conftest import OpenTiny, RunCrepa
from diffusers import WanPipeline
from diffusers.loaders import lora_base
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from test_families import TASKS, batch_of, encoded_clip
from test_wan import two_experts
from torch import Tensor, nn

from crepa_cli.models import load_family
from crepa_cli.models.family import Family, Tensors, TransformerStep
from crepa_cli.models.wan import Wan
from crepa_cli.profile import AdapterSettings
from crepa_cli.report import loading
from crepa_cli.runs.folder import Exports, RunFolder
from crepa_cli.runs.header import file_header
from crepa_cli.settings import resolve
from crepa_cli.training.adapter import make_trainable
from crepa_cli.training.checkpoints import trained_weights
from crepa_cli.training.export import export_weights

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "run_comfyui.safetensors"
WITH_COMFYUI = [(name, task) for name, task in TASKS if load_family(name).comfyui_names is not None]
MORE_OF_WAN = ["add_k_proj", "add_v_proj", "time_proj", "proj_out", "linear_1", "linear_2", "ff.net.0.proj", "ff.net.2"]
"""Layers that an adapter can have in addition to the default ones."""

# The parameters of ComfyUI's own modules (its commit a125cd8 for Wan and LTX: comfy/ldm/wan/model.py and
# comfy/ldm/lightricks/model.py; comfy/ldm/kandinsky5/model.py keeps the names of kandinskylab/kandinsky-5,
# kandinsky/models/dit.py). "{i}" is a block, "|" separates the last parts of names.
ATTENTION = "q|k|v|o"
# Its commit 2fb2e75: comfy/ldm/lightricks/av_model.py and model.py, without the text connectors of later commits, which
# are a component of their own in diffusers.
LTX2_ATTENTION = "attn1|attn2|audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn"
LTX2_ADALN = (
    "adaln_single|audio_adaln_single|av_ca_video_scale_shift_adaln_single|av_ca_audio_scale_shift_adaln_single"
    "|av_ca_a2v_gate_adaln_single|av_ca_v2a_gate_adaln_single"
)
KANDINSKY6_CAPTIONS = (
    "video_text_embeddings|audio_text_embeddings|video_pooled_text_embeddings|audio_pooled_text_embeddings"
)
KANDINSKY6_TEXT = "video_text_transformer_blocks|audio_text_transformer_blocks"
KANDINSKY6_CROSS = "va_cross_attention|av_cross_attention"
KANDINSKY_ATTENTION = "self_attention|cross_attention"
COMFYUI_PARAMETERS: dict[str, list[str]] = {
    "wan": [
        "patch_embedding.weight|bias",
        "text_embedding.0|2.weight|bias",
        "time_embedding.0|2.weight|bias",
        "time_projection.1.weight|bias",
        "head.modulation",
        "head.head.weight|bias",
        "blocks.{i}.modulation",
        f"blocks.{{i}}.self_attn|cross_attn.{ATTENTION}.weight|bias",
        "blocks.{i}.self_attn|cross_attn.norm_q|norm_k.weight",
        "blocks.{i}.norm3.weight|bias",
        "blocks.{i}.ffn.0|2.weight|bias",
    ],
    "wan-i2v": [
        "blocks.{i}.cross_attn.k_img|v_img.weight|bias",
        "blocks.{i}.cross_attn.norm_k_img.weight",
        "img_emb.proj.0|1|3|4.weight|bias",
    ],
    "ltxvideo": [
        "scale_shift_table",
        "patchify_proj.weight|bias",
        "proj_out.weight|bias",
        "adaln_single.emb.timestep_embedder.linear_1|linear_2.weight|bias",
        "adaln_single.linear.weight|bias",
        "caption_projection.linear_1|linear_2.weight|bias",
        "transformer_blocks.{i}.scale_shift_table",
        "transformer_blocks.{i}.attn1|attn2.q_norm|k_norm.weight",
        "transformer_blocks.{i}.attn1|attn2.to_q|to_k|to_v.weight|bias",
        "transformer_blocks.{i}.attn1|attn2.to_out.0.weight|bias",
        "transformer_blocks.{i}.ff.net.0.proj.weight|bias",
        "transformer_blocks.{i}.ff.net.2.weight|bias",
    ],
    "ltx2": [
        "scale_shift_table|audio_scale_shift_table",
        "patchify_proj|audio_patchify_proj|proj_out|audio_proj_out.weight|bias",
        f"{LTX2_ADALN}.emb.timestep_embedder.linear_1|linear_2.weight|bias",
        f"{LTX2_ADALN}.linear.weight|bias",
        "caption_projection|audio_caption_projection.linear_1|linear_2.weight|bias",
        "transformer_blocks.{i}.scale_shift_table|audio_scale_shift_table",
        "transformer_blocks.{i}.scale_shift_table_a2v_ca_video|scale_shift_table_a2v_ca_audio",
        f"transformer_blocks.{{i}}.{LTX2_ATTENTION}.q_norm|k_norm.weight",
        f"transformer_blocks.{{i}}.{LTX2_ATTENTION}.to_q|to_k|to_v.weight|bias",
        f"transformer_blocks.{{i}}.{LTX2_ATTENTION}.to_out.0.weight|bias",
        "transformer_blocks.{i}.ff|audio_ff.net.0.proj.weight|bias",
        "transformer_blocks.{i}.ff|audio_ff.net.2.weight|bias",
    ],
    "kandinsky5_video": [
        "time_embeddings|text_embeddings|pooled_text_embeddings|visual_embeddings.in_layer.weight|bias",
        "time_embeddings.out_layer.weight|bias",
        "text_embeddings|pooled_text_embeddings.norm.weight|bias",
        "out_layer.modulation.out_layer.weight|bias",
        "out_layer.out_layer.weight|bias",
        "text_transformer_blocks.{t}.text_modulation.out_layer.weight|bias",
        "text_transformer_blocks.{t}.self_attention.to_query|to_key|to_value|out_layer.weight|bias",
        "text_transformer_blocks.{t}.self_attention.query_norm|key_norm.weight",
        "text_transformer_blocks.{t}.feed_forward.in_layer|out_layer.weight",
        "visual_transformer_blocks.{i}.visual_modulation.out_layer.weight|bias",
        "visual_transformer_blocks.{i}.self_attention|cross_attention.to_query|to_key|to_value|out_layer.weight|bias",
        "visual_transformer_blocks.{i}.self_attention|cross_attention.query_norm|key_norm.weight",
        "visual_transformer_blocks.{i}.feed_forward.in_layer|out_layer.weight",
    ],
    # kandinskylab/kandinsky-6, comfyui/kandinsky6/ldm/model.py and register.py (commit 8195e72).
    "kandinsky6": [
        "video_time_embeddings|audio_time_embeddings.in_layer|out_layer.weight|bias",
        f"{KANDINSKY6_CAPTIONS}.in_layer|norm.weight|bias",
        "audio_embeddings.in_layer|norm.weight|bias",
        "visual_embeddings.in_layer.weight|bias",
        "visual_token_type_embeddings.weight",
        "out_layer|audio_outLayer.modulation.out_layer.weight|bias",
        "out_layer|audio_outLayer.out_layer.weight|bias",
        f"{KANDINSKY6_TEXT}.{{t}}.text_modulation.out_layer.weight|bias",
        f"{KANDINSKY6_TEXT}.{{t}}.self_attention.to_query|to_key|to_value|out_layer.weight|bias",
        f"{KANDINSKY6_TEXT}.{{t}}.self_attention.query_norm|key_norm.weight",
        f"{KANDINSKY6_TEXT}.{{t}}.feed_forward.in_layer|out_layer.weight",
        "visual_blocks.{i}.videoT|audioT.visual_modulation.out_layer.weight|bias",
        f"visual_blocks.{{i}}.videoT|audioT.{KANDINSKY_ATTENTION}.to_query|to_key|to_value|out_layer.weight|bias",
        f"visual_blocks.{{i}}.videoT|audioT.{KANDINSKY_ATTENTION}.query_norm|key_norm.weight",
        "visual_blocks.{i}.videoT|audioT.feed_forward.in_layer|out_layer.weight",
        "visual_blocks.{i}.va_modulation|av_modulation.out_layer.weight|bias",
        f"visual_blocks.{{i}}.{KANDINSKY6_CROSS}.to_query|to_key|to_value|out_layer.weight|bias",
        f"visual_blocks.{{i}}.{KANDINSKY6_CROSS}.query_norm|key_norm.weight",
    ],
}
# Its commit 8d53494: comfy/ldm/hunyuan_video/model.py. Within blocks and the refiner these are the names of Tencent's
# checkpoints, without the joined queries, keys and values of ComfyUI. It reads them as its own in LoRAs (comfy/lora.py,
# model_lora_keys_unet) and in whole checkpoints (comfy/supported_models.py, process_unet_state_dict).
COMFYUI_PARAMETERS["hunyuanvideo15"] = [
    "img_in.proj.weight|bias",
    "time_in.in_layer|out_layer.weight|bias",
    "txt_in.input_embedder.weight|bias",
    "txt_in.t_embedder|c_embedder.in_layer|out_layer.weight|bias",
    "txt_in.individual_token_refiner.blocks.{t}.norm1|norm2|self_attn_qkv|self_attn_proj.weight|bias",
    "txt_in.individual_token_refiner.blocks.{t}.mlp.fc1|fc2.weight|bias",
    "txt_in.individual_token_refiner.blocks.{t}.adaLN_modulation.1.weight|bias",
    "byt5_in.layernorm|fc1|fc2|fc3.weight|bias",
    "vision_in.proj.0|1|3|4.weight|bias",
    "cond_type_embedding.weight",
    "double_blocks.{i}.img_attn_qkv|img_attn_proj|txt_attn_qkv|txt_attn_proj.weight|bias",
    "double_blocks.{i}.img_attn_q_norm|img_attn_k_norm|txt_attn_q_norm|txt_attn_k_norm.weight",
    "double_blocks.{i}.img_mod|txt_mod.linear.weight|bias",
    "double_blocks.{i}.img_mlp|txt_mlp.fc1|fc2.weight|bias",
    "final_layer.linear.weight|bias",
    "final_layer.adaLN_modulation.1.weight|bias",
]
# Names of Tencent's checkpoint throughout (hyvideo/modules/models.py), which ComfyUI turns into its own.
COMFYUI_PARAMETERS["hunyuanvideo"] = [
    "img_in.proj.weight|bias",
    "time_in|guidance_in.mlp.0|2.weight|bias",
    "vector_in.in_layer|out_layer.weight|bias",
    "txt_in.t_embedder.mlp.0|2.weight|bias",
    "txt_in.c_embedder.linear_1|linear_2.weight|bias",
    "single_blocks.{s}.linear1|linear2.weight|bias",
    "single_blocks.{s}.q_norm|k_norm.weight",
    "single_blocks.{s}.modulation.linear.weight|bias",
    *(
        name
        for name in COMFYUI_PARAMETERS["hunyuanvideo15"]
        if name.startswith(("double_blocks", "final_layer", "txt_in.input", "txt_in.individual"))
    ),
]
# comfy/lora.py (commit 17358c8, model_lora_keys_unet): every model takes "diffusion_model." before its own names;
# Kandinsky 5 takes "transformer." too. comfy/weight_adapter/lora.py (commit 6f98b15): `lora_B` and `lora_A`, and a
# scale of 1 unless there is an `.alpha`.
COMFYUI_PREFIXES = {name: ["diffusion_model."] for name in COMFYUI_PARAMETERS}
COMFYUI_PREFIXES["kandinsky5_video"].append("transformer.")


def comfyui_parameters(family: Family) -> set[str]:
    """The names of ComfyUI's parameters for a model of the family's size."""
    text_blocks = range(family.config.get("num_text_blocks") or family.config.get("num_refiner_layers", 0))
    templates = list(COMFYUI_PARAMETERS[family.name])
    if family.config.get("image_dim"):
        templates += COMFYUI_PARAMETERS["wan-i2v"]
    found: set[str] = set()
    for template in templates:
        names = [""]
        for part in template.split("."):
            names = [f"{name}.{choice}".lstrip(".") for name in names for choice in part.split("|")]
        found |= {
            name.format(i=i, s=s, t=t)
            for name in names
            for i in range(family.depths[0])
            for s in range(family.depths[-1])
            for t in text_blocks or [0]
        }
    return found


def shortened(family: Family) -> Any:
    """The transformer with its first two blocks alone, which is enough to mix up names."""
    transformer = family.load_transformer(torch.float32)
    setattr(transformer, family.blocks_attribute, family.blocks(transformer)[:2])
    return transformer


def lora(family: Family, transformer: Any = None, **settings: object) -> tuple[Any, AdapterSettings]:
    """A transformer with a random LoRA of rank 4, and the settings of it, exported in float32."""
    torch.manual_seed(0)
    defaults = {**family.settings["adapter"], "rank": 4, "alpha": 4.0, "export_dtype": "float32"}
    adapter = AdapterSettings.model_validate(defaults | settings)
    transformer = transformer or family.load_transformer(torch.float32)
    make_trainable(transformer, adapter)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return transformer, adapter


def exported(family: Family, folder: Path, **settings: object) -> tuple[Tensors, Tensors]:
    """The tensors of the diffusers file and of the ComfyUI file of a random LoRA of rank 4."""
    transformer, adapter = lora(family, **settings)
    exports = Exports(folder, "run")
    export_weights(family, transformer, trained_weights(transformer), adapter, exports, {})
    assert {path.name for path in folder.iterdir()} == {DIFFUSERS_FILE, COMFYUI_FILE}
    return load_file(folder / DIFFUSERS_FILE), load_file(folder / COMFYUI_FILE)


def load(family: Family, transformer: Any, folder: Path, name: str) -> None:
    """Load a LoRA as the code in the model card does: by the pipeline, or by the transformer if it loads none."""
    if family.lora_loader == "transformer.load_lora_adapter":
        transformer.load_lora_adapter(folder, weight_name=name)
        return
    pipeline_class = getattr(diffusers, family.pipeline_class)
    needed = [name for name, one in signature(pipeline_class).parameters.items() if one.default is Parameter.empty]
    pipeline_class(**dict.fromkeys(needed) | {"transformer": transformer}).load_lora_weights(folder, weight_name=name)


def a_step(family: Family) -> TransformerStep:
    """Inputs of one clip, half noise."""
    frames = 17 if family.name == "kandinsky5_video" else 2 * family.frame_multiple + 1
    _, tensors = encoded_clip(family, frames, 2 * family.size_multiple, 2 * family.size_multiple)
    batch = batch_of(tensors, 1)
    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(0))
    return family.step(batch, noise, torch.full((1,), 0.5))


def predicted(transformer: Any, step: TransformerStep) -> Tensor:
    with torch.no_grad():
        prediction: Tensor = transformer.eval()(**step.inputs).sample
    return prediction


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_both_files_predict_in_diffusers_what_training_predicts(
    name: str, task: str, open_tiny: OpenTiny, tmp_path: Path
) -> None:
    """Through diffusers' own loader, with a scale of 1/4 and of 4, whatever the header says."""
    family = open_tiny(name, task)
    step = a_step(family)
    untrained = shortened(family)
    plain = predicted(untrained, step)
    for alpha in (2.0, 32.0):
        transformer, adapter = lora(family, shortened(family), rank=8, alpha=alpha)
        trained = predicted(transformer, step)
        assert (trained - plain).abs().max() > 1e-3
        folder = tmp_path / f"alpha-{alpha:g}"
        export_weights(family, transformer, trained_weights(transformer), adapter, Exports(folder, "run"), {})
        files = sorted(folder.iterdir())
        assert len(files) == (1 if family.comfyui_names is None else 2)
        for file in files:
            with safe_open(file, framework="pt") as opened:
                assert "lora_adapter_metadata" not in opened.metadata()
            others = family.comfyui_joined or family.lora_loader != "load_lora_weights"
            if others and file.name == COMFYUI_FILE:
                continue  # diffusers does not read it; see tests/test_hunyuanvideo15.py and tests/test_hunyuanvideo.py
            load(family, untrained, folder, file.name)
            torch.testing.assert_close(predicted(untrained, step), trained, atol=1e-5, rtol=1e-5)
            untrained.unload_lora()


@pytest.mark.parametrize(("name", "task"), WITH_COMFYUI)
def test_comfyui_knows_every_key_of_its_file(name: str, task: str, open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny(name, task)
    published, comfyui = exported(family, tmp_path / "weights")
    assert len(comfyui) == len(published) or (family.comfyui_joined and len(comfyui) < len(published))
    known = {
        f"{prefix}{parameter.removesuffix('.weight')}"
        for prefix in COMFYUI_PREFIXES[name]
        for parameter in comfyui_parameters(family)
        if parameter.endswith(".weight")
    }
    for key in comfyui:
        module, matrix, weight = key.rsplit(".", 2)
        assert module in known
        assert (matrix, weight) in {("lora_A", "weight"), ("lora_B", "weight")}


@pytest.mark.parametrize(("name", "task"), WITH_COMFYUI)
def test_a_full_fine_tune_has_the_parameters_of_comfyuis_own_model(
    name: str, task: str, open_tiny: OpenTiny, tmp_path: Path
) -> None:
    family = open_tiny(name, task)
    adapter = AdapterSettings.model_validate({**family.settings["adapter"], "rank": 4, "alpha": 4.0, "kind": "full"})
    transformer = family.load_transformer(torch.float32).requires_grad_(True)
    weights = trained_weights(transformer)
    exports = Exports(tmp_path / "weights", "run")
    export_weights(family, transformer, weights, adapter, exports, {})
    written = load_file(exports.folder / COMFYUI_FILE)
    assert written.keys() == comfyui_parameters(family)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in written.values()) == sum(tensor.numel() for tensor in weights.values())
    loaded = type(transformer).from_pretrained(exports.folder / exports.transformer)
    assert all(torch.equal(loaded.state_dict()[key].bfloat16(), tensor.bfloat16()) for key, tensor in weights.items())


def test_names_of_wan_are_those_of_the_original_checkpoint(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("wan", "i2v")
    targets = [*family.settings["adapter"]["target_modules"], *MORE_OF_WAN]  # type: ignore[misc]
    published, comfyui = exported(family, tmp_path / "weights", target_modules=targets)
    read = WanPipeline.lora_state_dict(tmp_path / "weights" / COMFYUI_FILE)
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


def test_the_files_of_two_experts_lie_in_one_folder_and_load_into_their_own(
    open_tiny: OpenTiny, checkpoints: Path, tmp_path: Path
) -> None:
    checkpoint = two_experts(open_tiny, checkpoints, "t2v")
    profile = resolve("t2v", {"model.family": "wan", "model.checkpoint": checkpoint}).profile
    run = RunFolder(tmp_path / "cats")
    names, ranges = set(), []
    for variant in ("high", "low"):
        family = Wan(checkpoint, "t2v", variant=variant)
        transformer, adapter = lora(family)
        exports = run.exports(family.expert)
        header = file_header(run, family, profile, exports)
        export_weights(family, transformer, trained_weights(transformer), adapter, exports, header)
        names |= {path.name for path in exports.folder.iterdir()}
        with safe_open(exports.folder / exports.comfyui, framework="pt") as file:
            assert file.metadata()["ss_output_name"] == f"cats_{variant}"
            ranges.append(file.metadata()["modelspec.timestep_range"])
    assert names == {
        f"{name}.safetensors"
        for name in ("high_pytorch_lora_weights", "low_pytorch_lora_weights", "cats_high_comfyui", "cats_low_comfyui")
    }
    assert ranges == ["875,1000", "0,875"]
    pipeline = WanPipeline.from_pretrained(checkpoint)
    pipeline.load_lora_weights(exports.folder, weight_name=exports.diffusers, load_into_transformer_2=True)
    loaded = get_peft_model_state_dict(pipeline.transformer_2, adapter_name="default_0")
    published = load_file(exports.folder / exports.diffusers)
    assert {f"transformer.{key}" for key in loaded} == published.keys()
    assert all(torch.equal(tensor, published[f"transformer.{key}"]) for key, tensor in loaded.items())


def test_equal_weights_make_equal_bytes_and_the_header_has_their_hash(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("wan", "t2v")
    transformer, adapter = lora(family)
    header = {f"key {number}": '«quoted» \n "text" \x01' for number in range(20)}
    contents = set()
    for name in ("first", "second"):
        exports = Exports(tmp_path / name, "run")
        export_weights(family, transformer, trained_weights(transformer), adapter, exports, header)
        contents.add((exports.folder / exports.comfyui).read_bytes())
    (content,) = contents
    start = 8 + int.from_bytes(content[:8], "little")
    with safe_open(tmp_path / "first" / COMFYUI_FILE, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(content[start:]).hexdigest()}"
    assert {key: metadata[key] for key in header} == header


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
def test_the_umask_decides_who_reads_the_files(open_tiny: OpenTiny, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        exported(open_tiny("wan", "t2v"), tmp_path / "weights")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "weights").iterdir()} == {0o640}


def test_the_dtype_halves_the_file(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("wan", "t2v")
    exact, _ = exported(family, tmp_path / "exact")
    short, _ = exported(family, tmp_path / "short", export_dtype="bfloat16")
    assert all(torch.equal(short[key], tensor.bfloat16()) for key, tensor in exact.items())


def test_steps_leave_the_weights_of_the_run_to_load_lora_weights(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers' own choice, among the files of a run that was uploaded as it is."""
    run = demo / "runs" / "wan-t2v-1"
    files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    assert {name for name in files if name.startswith("weights/")} == {
        "weights/pytorch_lora_weights.safetensors",
        "weights/wan-t2v-1_comfyui.safetensors",
        *(
            f"weights/step-0000{step}/wan-t2v-1_step-0000{step}_{program}.safetensors"
            for step in (20, 40)
            for program in ("diffusers", "comfyui")
        ),
    }
    repository = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(lora_base, "model_info", lambda _: repository)
    monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)
    assert lora_base._best_guess_weight_name("user/repo") == "weights/pytorch_lora_weights.safetensors"


def test_the_header_says_what_the_file_is(demo: Path) -> None:
    run = RunFolder(demo / "runs" / "wan-t2v-1")
    with safe_open(run.weights / "wan-t2v-1_comfyui.safetensors", framework="pt") as file:
        metadata = file.metadata()
    expected = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "comfyui",
        "modelspec.title": "wan-t2v-1",
        "modelspec.date": json.loads(run.facts.read_text())["date"],
        "ss_base_model_version": "wan2.1",
        "ss_sd_model_name": "wan-trained",
        "ss_output_name": "wan-t2v-1",
        "ss_network_dim": "16",
        "ss_network_alpha": "16",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert sum(json.loads(metadata["ss_tag_frequency"])["scenes"].values()) > 0


def test_what_comfyui_does_not_run_is_said_before_training(
    run_crepa: RunCrepa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["--set", "adapter.export=comfyui"]
    assert run_crepa("train", "--profile", "t2v", "--model", "sanavideo", "--demo", "--plain", *sets) == 2
    assert "comfyui is for wan, ltxvideo, kandinsky5_video" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_the_code_for_the_terminal_has_slashes(open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a checkpoint on Windows, whose paths stand in for those of this system."""
    family = open_tiny("wan", "t2v")
    monkeypatch.setattr(loading, "Path", PureWindowsPath)
    monkeypatch.setattr(family.base, "name", r"D:\new\wan")
    profile = resolve("t2v", {"model.family": "wan"}, []).profile
    assert 'from_pretrained("D:/new/wan", ' in loading.loading_lines(RunFolder(Path("runs/a")), family, profile)
