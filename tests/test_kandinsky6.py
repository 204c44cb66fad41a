"""Kandinsky 6: the reference behind the video, captions of different lengths, and the sound that is left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenTiny
from diffusers import Kandinsky6TI2VAPipeline
from test_families import CAPTION, batch_of, encoded_clip, sampled_latents
from torch import Tensor

from crepa_cli.errors import UserError
from crepa_cli.models import load_family
from crepa_cli.models.family import Family
from crepa_cli.models.kandinsky6 import Kandinsky6
from crepa_cli.report.loading import loading_code
from crepa_cli.runs.folder import RunFolder
from crepa_cli.settings import resolve


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_training_gives_the_transformer_what_the_pipeline_gives_it(task: str, open_tiny: OpenTiny) -> None:
    """The pipeline pads the caption to 1024 tokens with a mask; training cuts it, and predicts the same."""
    torch.manual_seed(0)
    family = open_tiny("kandinsky6", task)
    video, tensors = encoded_clip(family, frames=9, height=32, width=48)
    pipeline: Any = Kandinsky6TI2VAPipeline.from_pretrained(family.base.name)
    seen: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    sampled_latents(family, pipeline, video, tensors["latents"], steps=2)

    given = seen[-1]
    sigmas = given["timestep"] / 1000
    batch = batch_of(tensors, 1)
    step = family.step(batch, torch.randn_like(batch["latents"]), sigmas)
    trained = dict(step.inputs)
    frames = batch["latents"].shape[2]
    # The noise differs, and the pipeline's reference is an image of whole numbers.
    references = [inputs["hidden_states"][:, frames:, ..., :4].clone() for inputs in (trained, given)]
    torch.testing.assert_close(*references, atol=0.1, rtol=0)
    trained["hidden_states"][..., :4] = given["hidden_states"][..., :4]
    torch.testing.assert_close(trained["hidden_states"], given["hidden_states"])
    torch.testing.assert_close(trained["timestep"], given["timestep"])
    torch.testing.assert_close(trained["pooled_projections"], given["pooled_projections"])
    assert given["encoder_attention_mask"].sum() == trained["encoder_hidden_states"].shape[1]
    for name in ("visual_token_type_ids", "visual_rope_pos"):
        torch.testing.assert_close(trained.get(name), given[name])
    with torch.no_grad():
        predicted = [pipeline.transformer(**inputs | {"return_dict": True}).sample for inputs in (trained, given)]
    torch.testing.assert_close(*predicted, atol=1e-4, rtol=1e-4)

    assert step.weight is not None
    assert step.target.shape == predicted[0].shape
    weight = step.weight.expand_as(step.target)
    assert (weight[:, :frames] == 1).all()
    assert (weight[:, frames:] == 0).all()


@pytest.mark.parametrize("train", [False, True])
def test_padding_behind_a_short_caption_is_not_seen(train: bool, open_tiny: OpenTiny) -> None:
    """A batch gives the same results as its clips one by one."""
    torch.manual_seed(0)
    family = open_tiny("kandinsky6", "t2v")
    transformer = family.load_transformer(torch.float32).requires_grad_(True)
    if train:
        transformer.enable_gradient_checkpointing()
        transformer.train()
    lengths = [3, 11, 11]
    batch = {
        "latents": torch.randn(3, 4, 2, 4, 6),
        "prompt_embeds": torch.randn(3, 1024, 32),
        "prompt_length": torch.tensor(lengths),
        "pooled_embeds": torch.randn(3, 32),
    }
    noise, sigmas = torch.randn_like(batch["latents"]), torch.tensor([0.2, 0.5, 0.9])

    def gradient(predictions: Tensor) -> Tensor:
        transformer.zero_grad()
        predictions.pow(2).sum().backward()
        return transformer.video_text_transformer_blocks[0].attn.to_query.weight.grad.clone()

    together = transformer(**family.step(batch, noise, sigmas).inputs).sample
    of_batch = gradient(together)
    one_by_one = []
    for index in range(3):
        part = slice(index, index + 1)
        clip = {name: tensor[part] for name, tensor in batch.items()}
        one_by_one.append(transformer(**family.step(clip, noise[part], sigmas[part]).inputs).sample)
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(of_batch, gradient(torch.cat(one_by_one)), rtol=1e-2, atol=1e-2)


def test_prompts_are_those_of_the_published_pipeline(open_tiny: OpenTiny) -> None:
    family = open_tiny("kandinsky6", "t2v")
    published = Kandinsky6TI2VAPipeline.from_pretrained(family.base.name)
    embeds, pooled, mask, *_ = published.encode_prompt(CAPTION, do_classifier_free_guidance=False)
    tensors = family.encode_prompt(family.load_text_pipeline(torch.float32), CAPTION)
    length = int(tensors["prompt_length"])
    assert length == mask.sum() > 5
    torch.testing.assert_close(tensors["prompt_embeds"][:length], embeds[0, :length])
    torch.testing.assert_close(tensors["pooled_embeds"][None], pooled)
    assert tensors["prompt_embeds"].shape == (1024, 32)
    assert not tensors["prompt_embeds"][length:].any()


def changed(family: Family, folder: Path, **settings: object) -> str:
    """A copy of the transformer's configuration with other settings, beside that of the VAE."""
    for part in ("transformer", "vae"):
        (folder / part).mkdir(parents=True)
        shutil.copy(Path(family.base.name) / part / "config.json", folder / part)
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(folder)


def test_checkpoints_that_cannot_be_trained_are_refused(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("kandinsky6", "t2v")
    distilled = changed(family, tmp_path / "distilled", out_visual_dim=40)
    with pytest.raises(UserError, match="distilled is distilled: it predicts"):
        Kandinsky6(distilled, "t2v")
    of_text = changed(family, tmp_path / "of-text", visual_token_type_num_embeddings=0)
    Kandinsky6(of_text, "t2v")
    with pytest.raises(UserError, match="generates from text alone"):
        Kandinsky6(of_text, "i2v")


@pytest.mark.parametrize(
    ("size", "heads", "weights"),
    [("Lite", 1, 3_176_632_424), ("Lite", 10, 3_177_988_112), ("Pro", 10, 30_139_423_760)],
)
def test_the_published_configurations_have_the_weights_of_the_published_files(
    size: str, heads: int, weights: int
) -> None:
    """As the Hub counts them in the safetensors of Lite, and of the distilled ones, which predict ten at once."""
    family = load_family("kandinsky6")(f"kandinskylab/Kandinsky-6.0-{size}-5s-Diffusers", "t2v")
    family.config |= {"out_visual_dim": 16 * heads, "out_audio_dim": 40 * heads}
    with torch.device("meta"):
        counts = [
            sum(one.numel() for one in family.with_blocks(blocks).empty_transformer(torch.bfloat16).parameters())
            for blocks in (1, 2)
        ]
    assert counts[0] + (family.block_count - 1) * (counts[1] - counts[0]) == weights


def test_what_makes_sound_is_left_where_it_is(open_tiny: OpenTiny) -> None:
    family = open_tiny("kandinsky6", "i2v")
    assert {"audio_vae", "vocoder"} <= family.base.read_config("model_index.json").keys()
    assert not {"audio_vae", "vocoder"} & set(family.base.components)
    pipeline = family.load_sampling_pipeline(family.load_transformer(torch.float32))
    assert pipeline.audio_vae is pipeline.vocoder is None


def test_the_code_that_loads_a_lora_calls_what_the_pipeline_has(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("kandinsky6", "t2v")
    profile = resolve("t2v", {"model.family": "kandinsky6", "model.checkpoint": family.base.name}).profile
    code = loading_code(RunFolder(tmp_path / "cats"), family, profile, "base", "runs/cats")
    assert 'pipeline.transformer.load_lora_adapter("runs/cats", weight_name="weights/pytorch_lora' in code
