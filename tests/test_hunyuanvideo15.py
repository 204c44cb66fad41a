"""HunyuanVideo 1.5: captions of different lengths, the first frame, guidance by a component, joined layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import OpenTiny
from diffusers.loaders import HunyuanVideoLoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock
from safetensors.torch import save_file
from test_export import exported, lora
from test_families import batch_of, encoded_clip, sampled_latents
from torch import Tensor

from crepa_cli.errors import UserError
from crepa_cli.models.family import Tensors
from crepa_cli.models.hunyuanvideo15 import HunyuanVideo15, causal_mask
from crepa_cli.models.joined import original_lora
from crepa_cli.models.lora import read_lora
from crepa_cli.profile import Profile
from crepa_cli.report.loading import generating_code, loading_code
from crepa_cli.runs.folder import RunFolder
from crepa_cli.settings import resolve
from crepa_cli.training.adapter import lora_layers
from crepa_cli.training.checkpoints import trained_weights
from crepa_cli.training.export import lora_layers as exported_layers

TASKS = "t2v", "i2v"


def with_texts(tensors: Tensors, caption: int, glyphs: int) -> Tensors:
    """The clip with a caption and texts in it of these lengths."""
    found = dict(tensors)
    for which, length in (("", caption), ("_2", glyphs)):
        embeds = torch.zeros_like(tensors[f"prompt_embeds{which}"])
        embeds[:length] = torch.randn(length, embeds.shape[1])
        found |= {f"prompt_embeds{which}": embeds, f"prompt_length{which}": torch.tensor(length)}
    return found


def stock(family: Any) -> Any:
    """The transformer as diffusers loads it."""
    model = diffusers.HunyuanVideo15Transformer3DModel
    return model.from_pretrained(family.base.name, subfolder="transformer").eval()


def padded(batch: Tensors, hidden: Tensor) -> dict[str, Any]:
    """What the published pipelines give the transformer: captions with all their padding, and a blank image."""
    blank = torch.zeros(len(hidden), 729, 32)
    inputs = {"hidden_states": hidden, "image_embeds": batch.get("image_embeds", blank)}
    for which in ("", "_2"):
        embeds, lengths = batch[f"prompt_embeds{which}"], batch[f"prompt_length{which}"]
        inputs[f"encoder_hidden_states{which}"] = embeds
        inputs[f"encoder_attention_mask{which}"] = (torch.arange(embeds.shape[1]) < lengths[:, None]).float()
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_without_masks_each_clip_sees_its_own_caption_alone(task: str, open_tiny: OpenTiny) -> None:
    """As the transformer of diffusers does with masks of all tokens, in training and from the published pipelines."""
    torch.manual_seed(0)
    family = open_tiny("hunyuanvideo15", task)
    _, tensors = encoded_clip(family, 9, 32, 32)
    clips = [with_texts(tensors, *lengths) for lengths in ((20, 0), (9, 5), (14, 8))]
    batch = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}
    step = family.step(batch, torch.randn_like(batch["latents"]), torch.full((3,), 0.5))
    ours, timestep = family.load_transformer(torch.float32).eval(), torch.full((3,), 500.0)
    given = padded(batch, step.inputs["hidden_states"])
    expected = stock(family)(**given, timestep=timestep).sample
    torch.testing.assert_close(ours(**step.inputs).sample, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(**given, timestep=timestep).sample, expected, atol=1e-5, rtol=1e-5)


def test_texts_in_quotation_marks_are_encoded_twice(open_tiny: OpenTiny) -> None:
    family = open_tiny("hunyuanvideo15", "t2v")
    pipeline: Any = family.load_text_pipeline(torch.float32)
    plain, quoting = (family.encode_prompt(pipeline, text) for text in ("a sign", 'a sign "Hi"'))
    assert (int(plain["prompt_length_2"]), int(quoting["prompt_length_2"])) == (0, 8)
    for encoded in (plain, quoting):
        length = int(encoded["prompt_length"])
        assert encoded["prompt_embeds"][:length].any(dim=1).all()
        assert not encoded["prompt_embeds"][length:].any()


@torch.no_grad()
def test_the_first_latents_are_those_of_the_first_frame_alone(open_tiny: OpenTiny) -> None:
    """The pipeline encodes the image alone; training reads the condition from the clip's latents."""
    family = open_tiny("hunyuanvideo15", "i2v")
    video, tensors = encoded_clip(family, 9, 32, 48)
    alone = family.encode_clip(family.load_vae_pipeline(), video[:, :1])["latents"]
    torch.testing.assert_close(tensors["latents"][:, :1], alone, atol=1e-5, rtol=1e-5)
    pipeline: Any = diffusers.HunyuanVideo15ImageToVideoPipeline.from_pretrained(family.base.name)
    seen: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    sampled_latents(family, family.for_encoded_prompts(pipeline), video, tensors["latents"], steps=1)
    ours = family.step(batch_of(tensors, 1), torch.randn(1, *tensors["latents"].shape), torch.ones(1)).inputs
    # The pipeline takes an image of 8 bits.
    torch.testing.assert_close(ours["hidden_states"][:, 4:], seen[0]["hidden_states"][:, 4:], atol=0.05, rtol=0)
    torch.testing.assert_close(ours["image_embeds"], seen[0]["image_embeds"], atol=0.05, rtol=0)


def test_the_mask_of_the_vae_is_the_one_of_diffusers() -> None:
    form: Any = (3, 4, torch.float32, torch.device("cpu"), 2)
    assert torch.equal(causal_mask(*form), HunyuanVideo15AttnBlock.prepare_causal_attention_mask(*form))


def test_a_checkpoint_of_the_other_task_or_of_few_steps_is_refused(open_tiny: OpenTiny, tmp_path: Path) -> None:
    shutil.copytree(open_tiny("hunyuanvideo15", "i2v").base.name, tmp_path / "few")
    config = tmp_path / "few" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_meanflow": True}))
    with pytest.raises(UserError, match="distilled to a few steps"):
        HunyuanVideo15(str(tmp_path / "few"), "i2v")
    for task, other in (("t2v", "i2v"), ("i2v", "t2v")):
        with pytest.raises(UserError, match=f"not '{other}'; --checkpoint hunyuanvideo-community/"):
            HunyuanVideo15(open_tiny("hunyuanvideo15", task).base.name, other)


def test_diffusers_splits_the_joined_layers_of_the_comfyui_file_as_they_were(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    """Each part's change is the same; of the refiner's layers diffusers splits the wrong matrix."""
    published, comfyui = exported(open_tiny("hunyuanvideo15", "t2v"), tmp_path)
    joined = comfyui["diffusion_model.double_blocks.3.img_attn_qkv.lora_A.weight"]
    assert joined.shape == (12, 48)
    blocks = {name: tensor for name, tensor in comfyui.items() if "txt_in" not in name}
    read = HunyuanVideoLoraLoaderMixin.lora_state_dict(blocks)
    modules = {name.rsplit(".", 2)[0] for name in published if "context_embedder" not in name}
    unchanged = {name.rsplit(".", 2)[0] for name in read} - modules
    assert len(unchanged) == 12
    for module in unchanged:
        assert not read[f"{module}.lora_B.weight"].any()
    for module in modules:
        ours, theirs = (
            found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"] for found in (published, read)
        )
        torch.testing.assert_close(theirs, ours)


def test_a_part_without_a_lora_is_not_changed(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("hunyuanvideo15", "t2v")
    transformer, adapter = lora(family, target_modules=["to_q", "to_v"])
    layers = exported_layers(trained_weights(transformer), adapter.alpha)
    joined = original_lora(family, transformer, layers)
    name = "double_blocks.2.img_attn_qkv"
    change = joined[f"{name}.lora_B.weight"] @ joined[f"{name}.lora_A.weight"]
    assert not change[48:96].any()
    save_file(joined, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors", family, transformer, lora_layers(transformer))
    assert found.keys() == lora_layers(transformer).keys()
    for module, (down, up, _) in found.items():
        expected = layers[f"{module}.lora_B.weight"] @ layers[f"{module}.lora_A.weight"]
        torch.testing.assert_close(up @ down, expected)


def test_the_last_modulation_has_the_order_of_the_original_checkpoint(open_tiny: OpenTiny) -> None:
    """scripts/convert_hunyuan_video1_5_to_diffusers.py swaps its halves."""
    family, tensor = open_tiny("hunyuanvideo15", "t2v"), torch.arange(8.0)
    assert family.original_rows("norm_out.linear", tensor).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert family.original_rows("proj_out", tensor) is tensor


def test_the_code_of_the_card_loads_by_the_transformer_and_sets_the_guider(open_tiny: OpenTiny, tmp_path: Path) -> None:
    profile: Profile = resolve("i2v", {"model.family": "hunyuanvideo15", "model.task": "i2v"}).profile
    family = open_tiny("hunyuanvideo15", "i2v")
    loading = loading_code(RunFolder(tmp_path / "run"), family, profile, "checkpoint", "run")
    assert 'pipeline.transformer.load_lora_adapter("run", weight_name="weights/pytorch_lora_' in loading
    generating = generating_code(family, profile)
    assert "pipeline.guider.guidance_scale = 6\n" in generating
    assert "prompt='...', num_frames=121,\n" in generating
    assert "guidance_scale=" not in generating
    compile(loading + "\n" + generating, "card", "exec")
