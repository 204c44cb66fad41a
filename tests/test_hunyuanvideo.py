"""HunyuanVideo 1.0: two kinds of blocks, captions of different lengths, guidance as an input, joined layers."""

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
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from test_depth import EVERYTHING, LORA, of_all_blocks
from test_families import encoded_clip, sampled_latents
from test_memory import GPU, settings, small_clips

from crepa_cli.errors import UserError
from crepa_cli.memory.depth import Excerpt
from crepa_cli.memory.step import predict_training
from crepa_cli.models import load_family
from crepa_cli.models.capture import HiddenStateCapture
from crepa_cli.models.family import Family, Tensors
from crepa_cli.models.hunyuanvideo import TEMPLATE_TOKENS, HunyuanVideo
from crepa_cli.models.joined import original_lora, original_weights
from crepa_cli.runs.checks import load_checkpoint
from crepa_cli.settings import resolve

PUBLISHED = "hunyuanvideo-community/HunyuanVideo"


def with_caption(tensors: Tensors, length: int) -> Tensors:
    """The clip with a caption of this length."""
    embeds = torch.zeros_like(tensors["prompt_embeds"])
    embeds[:length] = torch.randn(length, embeds.shape[1])
    return tensors | {"prompt_embeds": embeds, "prompt_length": torch.tensor(length)}


@torch.no_grad()
def test_each_clip_sees_its_own_caption_alone_and_an_index_counts_through_both_kinds(open_tiny: OpenTiny) -> None:
    """As the transformer of diffusers does with a mask, in training and from the published pipeline."""
    torch.manual_seed(0)
    family = open_tiny("hunyuanvideo", "t2v")
    _, tensors = encoded_clip(family, 9, 32, 32)
    clips = [with_caption(tensors, length) for length in (20, 9, 14)]
    batch = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}
    inputs = family.step(batch, torch.randn_like(batch["latents"]), torch.full((3,), 0.5)).inputs
    given = {name: inputs[name] for name in ("hidden_states", "timestep", "pooled_projections", "guidance")} | {
        "encoder_hidden_states": batch["prompt_embeds"],
        "encoder_attention_mask": (torch.arange(256) < batch["prompt_length"][:, None]).float(),
    }
    stock = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(family.base.name, subfolder="transformer").eval()
    seen: dict[int, Any] = {}
    blocks = [*stock.transformer_blocks[3:], *stock.single_transformer_blocks[:3:2]]
    for index, block in zip((3, 4, 6), blocks, strict=True):
        block.register_forward_hook(lambda _block, _inputs, output, index=index: seen.update({index: output[0]}))
    expected = stock(**given).sample
    ours = family.load_transformer(torch.float32).eval()
    capture = HiddenStateCapture(family.blocks(ours), seen)
    with capture.recording() as states:
        torch.testing.assert_close(ours(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
    for index, hidden in seen.items():
        assert hidden.shape[1] == 3 * 2 * 2
        torch.testing.assert_close(states[index], hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(**given).sample, expected, atol=1e-5, rtol=1e-5)


def test_a_caption_is_what_the_pipeline_leaves_behind_its_instruction(open_tiny: OpenTiny) -> None:
    family = open_tiny("hunyuanvideo", "t2v")
    pipeline: Any = family.load_text_pipeline(torch.float32)
    before = str(DEFAULT_PROMPT_TEMPLATE["template"]).split("{}")[0]
    assert len(pipeline.tokenizer(before).input_ids) == TEMPLATE_TOKENS
    for caption in ("", "a red disc"):
        encoded = family.encode_prompt(pipeline, caption)
        length = int(encoded["prompt_length"])
        assert length == len(pipeline.tokenizer(caption, add_special_tokens=False).input_ids) + 1  # <|eot_id|>
        assert encoded["prompt_embeds"][:length].any(dim=1).all()
        assert not encoded["prompt_embeds"][length:].any()


def test_the_tokenizer_is_read_as_it_is_whatever_class_the_checkpoint_names(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    """The published one names Llama's, which splits texts in another way than Llama 3."""
    family = open_tiny("hunyuanvideo", "t2v")
    shutil.copytree(family.base.name, tmp_path / "named")
    index = tmp_path / "named" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": ["transformers", "LlamaTokenizerFast"]}))
    named = HunyuanVideo(str(tmp_path / "named"), "t2v")
    encoded, expected = (
        one.encode_prompt(one.load_text_pipeline(torch.float32), "a red disc") for one in (named, family)
    )
    assert torch.equal(encoded["prompt_embeds"], expected["prompt_embeds"])


def test_training_has_the_guidance_that_the_pipeline_has_by_itself(open_tiny: OpenTiny) -> None:
    family = open_tiny("hunyuanvideo", "t2v")
    video, tensors = encoded_clip(family, 9, 32, 32)
    pipeline = diffusers.HunyuanVideoPipeline.from_pretrained(family.base.name)
    seen: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    sampled_latents(family, pipeline, video, tensors["latents"], steps=1)
    batch = {name: tensor[None] for name, tensor in tensors.items()}
    ours = family.step(batch, torch.randn_like(batch["latents"]), torch.ones(1)).inputs
    assert torch.equal(ours["guidance"], seen[0]["guidance"])
    assert torch.equal(ours["timestep"], seen[0]["timestep"])


def test_image_to_video_is_refused(open_tiny: OpenTiny, tmp_path: Path) -> None:
    shutil.copytree(open_tiny("hunyuanvideo", "t2v").base.name, tmp_path / "other")
    config = tmp_path / "other" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_condition_type": "token_replace"}))
    with pytest.raises(UserError, match=r"generates from an image \(token_replace\).*--checkpoint hunyuanvideo-comm"):
        HunyuanVideo(str(tmp_path / "other"), "t2v")
    with pytest.raises(UserError, match="hunyuanvideo is trained for t2v, not for 'i2v'"):
        HunyuanVideo(PUBLISHED, "i2v")
    profile = resolve("i2v", {"model.family": "hunyuanvideo"}).profile
    with pytest.raises(UserError, match="hunyuanvideo is trained for t2v, not for 'i2v'"):
        load_checkpoint(profile)


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory", [{}, EVERYTHING["memory"], {"keep_blocks": 5}, {"keep_blocks": 9, "keep": "attention"}]
)
def test_a_few_blocks_of_each_kind_tell_the_memory_of_all(
    memory: dict[str, object], open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = open_tiny("hunyuanvideo", "t2v").with_blocks(8, 9)
    profile = settings(family, **LORA, crepa={"block_index": 3}, memory=memory)
    excerpt = Excerpt.of(profile, family)
    assert excerpt is not None
    assert {block < 8 for block in excerpt.repeated} == {True, False}
    clips = small_clips(family, profile)
    extended = predict_training(profile, family, clips, GPU)
    assert extended == of_all_blocks(profile, family, clips, monkeypatch)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Family:
    """The published transformer with a block of each kind: diffusers splits joined layers of its width alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return load_family("hunyuanvideo")(PUBLISHED, "t2v").with_blocks(1, 1)


def test_from_single_file_reads_the_names_and_rows_of_our_whole_weights(published: Family) -> None:
    with torch.device("meta"):
        transformer = published.empty_transformer(torch.float32)
    weights = {name: torch.randn(tensor.shape[:1]) for name, tensor in transformer.state_dict().items()}
    converted = convert_hunyuan_video_transformer_to_diffusers(original_weights(published, weights))
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in weights.items())


def test_diffusers_splits_the_joined_layers_of_the_comfyui_file_as_they_were(published: Family) -> None:
    with torch.device("meta"):
        transformer = published.empty_transformer(torch.float32)
    modules = [
        *(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_v", "to_out.0", "add_k_proj")),
        *(f"single_transformer_blocks.0.{name}" for name in ("attn.to_k", "proj_mlp", "proj_out")),
    ]
    layers = {}
    for module in modules:
        layers[f"{module}.lora_A.weight"] = torch.randn(2, 5)
        layers[f"{module}.lora_B.weight"] = torch.randn(transformer.get_submodule(module).out_features, 2)
    joined = original_lora(published, transformer, layers)
    assert joined["single_blocks.0.linear1.lora_B.weight"].shape == (7 * 3072, 4)
    read = HunyuanVideoLoraLoaderMixin.lora_state_dict({f"diffusion_model.{name}": one for name, one in joined.items()})
    for module in {name.rsplit(".", 2)[0].removeprefix("transformer.") for name in read}:
        down, up = (read[f"transformer.{module}.lora_{matrix}.weight"] for matrix in "AB")
        if module in modules:
            down_, up_ = (layers[f"{module}.lora_{matrix}.weight"] for matrix in "AB")
            torch.testing.assert_close(up @ down, up_ @ down_)
        else:
            assert not up.any()
