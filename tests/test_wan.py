"""The layouts of Wan 2.2: per-token timesteps (TI2V), and two experts (A14B)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenTiny
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file, save_file
from test_families import encoded_clip, overfitted, sampled_similarity

from crepa_cli.demo.tiny import normalize_latents, smooth_video, write_once
from crepa_cli.demo.wan import tiny_transformer
from crepa_cli.errors import UserError
from crepa_cli.models.base import check_embedding
from crepa_cli.models.wan import Wan
from crepa_cli.training.flow import sample_sigmas

BOUNDARY = 0.875


@pytest.fixture(scope="session")
def ti2v(open_tiny: OpenTiny, checkpoints: Path) -> str:
    """A tiny checkpoint of Wan 2.2 TI2V: one for both tasks, with a VAE that compresses 16 times."""

    def write(folder: Path) -> None:
        vae = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        )
        normalize_latents(vae, smooth_video(frames=33, size=128))
        published = WanPipeline.from_pretrained(open_tiny("wan", "t2v").base.name)
        parts = published.components | {"vae": vae, "transformer": tiny_transformer()}
        WanPipeline(**parts, expand_timesteps=True).save_pretrained(folder)

    return str(write_once(checkpoints / "wan-ti2v", write))


def two_experts(open_tiny: OpenTiny, folder: Path, task: str) -> str:
    """A tiny checkpoint of Wan 2.2 A14B, whose image-to-video model has no image encoder."""

    def write(folder: Path) -> None:
        parts = WanPipeline.from_pretrained(open_tiny("wan", "t2v").base.name).components
        channels = {"in_channels": 4 if task == "t2v" else 12}
        for name in ("transformer", "transformer_2"):
            parts[name] = tiny_transformer(**channels)
        pipeline_class = WanPipeline if task == "t2v" else WanImageToVideoPipeline
        pipeline_class(**parts, boundary_ratio=BOUNDARY).save_pretrained(folder)

    return str(write_once(folder / f"wan-experts-{task}", write))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_one_checkpoint_with_timesteps_per_token_has_both_tasks(task: str, ti2v: str) -> None:
    family = Wan(ti2v, task)
    assert family.size_multiple == 32
    _, tensors = encoded_clip(family, frames=9, height=64, width=64)
    step = family.step(
        {name: tensor[None] for name, tensor in tensors.items()},
        torch.randn_like(tensors["latents"])[None],
        torch.tensor([0.5]),
    )
    first = 0.0 if task == "i2v" else 500.0
    assert step.inputs["timestep"].tolist() == [[first] * 4 + [500.0] * 8]


@pytest.mark.slow
def test_an_overfitted_transformer_with_timesteps_per_token_gives_its_clip_back(ti2v: str) -> None:
    """From its first frame; without one, all tokens have the same timestep, as in other checkpoints."""
    torch.manual_seed(0)
    family = Wan(ti2v, "i2v")
    video, tensors = encoded_clip(family, frames=9, height=64, width=64)
    transformer = overfitted(family, tensors, steps=150)
    assert sampled_similarity(family, video, tensors, transformer=transformer) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_each_expert_learns_its_own_noise_levels(task: str, open_tiny: OpenTiny, checkpoints: Path) -> None:
    torch.manual_seed(0)
    folder = two_experts(open_tiny, checkpoints, task)
    high, low = (Wan(folder, task, variant=variant) for variant in ("high", "low"))
    assert (high.sigma_range, low.sigma_range) == ((BOUNDARY, 1.0), (0.0, BOUNDARY))
    video, tensors = encoded_clip(high, frames=9, height=32, width=32)
    assert ("condition" in tensors, "image_embeds" in tensors) == (task == "i2v", False)
    experts = {family.component: overfitted(family, tensors, steps=150) for family in (high, low)}
    assert list(experts) == ["transformer", "transformer_2"]
    assert sampled_similarity(high, video, tensors, **experts) >= 0.8


@pytest.mark.parametrize(("variant", "component"), [("high", "transformer"), ("low", "transformer_2")])
def test_videos_are_sampled_with_the_trained_expert_and_the_other_as_published(
    variant: str, component: str, open_tiny: OpenTiny, checkpoints: Path
) -> None:
    family = Wan(two_experts(open_tiny, checkpoints, "t2v"), "t2v", variant=variant)
    trained = family.load_transformer(torch.float32)
    pipeline = family.load_sampling_pipeline(trained)
    assert getattr(pipeline, component) is trained
    other = {"transformer": "transformer_2", "transformer_2": "transformer"}[component]
    published = WanPipeline.from_pretrained(family.base.name)
    torch.testing.assert_close(getattr(pipeline, other).state_dict(), getattr(published, other).state_dict())


@pytest.mark.parametrize(
    ("name", "task", "variant", "message"),
    [
        ("wan-t2v", "i2v", None, "generates from text alone"),
        ("wan-i2v", "t2v", None, "generates from an image"),
        ("wan-t2v", "t2v", "low", "choose none"),
        ("wan-experts-t2v", "t2v", "middle", "one of: high, low"),
    ],
)
def test_a_checkpoint_that_lacks_what_is_asked_of_it(
    name: str, task: str, variant: str | None, message: str, open_tiny: OpenTiny, checkpoints: Path
) -> None:
    open_tiny("wan", "t2v"), open_tiny("wan", "i2v"), two_experts(open_tiny, checkpoints, "t2v")
    with pytest.raises(UserError, match=message):
        Wan(str(checkpoints / name), task, variant=variant)


def test_the_condition_is_the_pipelines_own(open_tiny: OpenTiny) -> None:
    """The mask marks the first frame; after it come the latents of that frame followed by gray."""
    family = open_tiny("wan", "i2v")
    _, tensors = encoded_clip(family, frames=9, height=32, width=48)
    mask, latents = tensors["condition"][:4], tensors["condition"][4:]
    assert mask[:, 0].min() == 1
    assert mask[:, 1:].max() == 0
    torch.testing.assert_close(latents[:, 0], tensors["latents"][:, 0])
    assert not torch.allclose(latents[:, 1:], tensors["latents"][:, 1:], atol=0.1)
    assert tensors["image_embeds"].shape == (5, 32)


def test_tokenizers_by_the_name_in_published_checkpoints(open_tiny: OpenTiny, tmp_path: Path) -> None:
    checkpoint = Path(open_tiny("wan", "t2v").base.name)
    for part in checkpoint.iterdir():
        (tmp_path / part.name).symlink_to(part)
    index: dict[str, Any] = json.loads((checkpoint / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    index["tokenizer"] = ["transformers", "T5TokenizerFast"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipeline = Wan(str(tmp_path), "t2v").load_text_pipeline(torch.float32)
    assert pipeline.tokenizer("a")["input_ids"]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "stretched"])
@pytest.mark.parametrize("bounds", [(0.0, BOUNDARY), (BOUNDARY, 1.0)])
def test_noise_levels_of_an_expert_are_those_of_the_whole_range_within_its_own(
    sampling: str, bounds: tuple[float, float]
) -> None:
    generator = torch.Generator().manual_seed(0)
    everywhere = sample_sigmas(200_000, sampling, 3.0, generator)
    within = everywhere[(everywhere >= bounds[0]) & (everywhere <= bounds[1])]
    drawn = sample_sigmas(200_000, sampling, 3.0, generator, bounds)
    quantiles = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(drawn.quantile(quantiles), within.quantile(quantiles), atol=5e-3, rtol=0)


@pytest.fixture
def published_encoder(open_tiny: OpenTiny, tmp_path: Path) -> Path:
    """The tiny checkpoint with a text encoder in the published layout: its embedding is `shared.weight` alone."""
    folder = tmp_path / "wan"
    shutil.copytree(open_tiny("wan", "t2v").base.name, folder)
    config, weights = folder / "text_encoder/config.json", folder / "text_encoder/model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    tensors = load_file(weights)
    embedding = {tensors.pop(name) for name in ("shared.weight", "encoder.embed_tokens.weight") if name in tensors}
    save_file(tensors | {"shared.weight": embedding.pop()}, weights, metadata={"format": "pt"})
    return folder


def test_captions_are_the_same_if_the_text_encoder_holds_its_embedding_once(
    published_encoder: Path, open_tiny: OpenTiny
) -> None:
    families = open_tiny("wan", "t2v"), Wan(str(published_encoder), "t2v")
    with torch.no_grad():
        tied, published = (one.encode_prompt(one.load_text_pipeline(torch.float32), "a red disc") for one in families)
        other = families[1].encode_prompt(families[1].load_text_pipeline(torch.float32), "a blue square")
    torch.testing.assert_close(published, tied, rtol=0, atol=0)
    assert not torch.allclose(other["prompt_embeds"], published["prompt_embeds"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_text_encoder_without_its_embedding_is_refused(tied: bool, open_tiny: OpenTiny) -> None:
    """As transformers 5.0 to 5.2 load it: an embedding of its own, zero or whatever memory held."""
    encoder: Any = open_tiny("wan", "t2v").load_text_pipeline(torch.float32).text_encoder
    if not tied:
        encoder.encoder.embed_tokens = torch.nn.Embedding.from_pretrained(encoder.shared.weight.detach().clone())
    else:
        torch.nn.init.zeros_(encoder.shared.weight)
    with pytest.raises(UserError, match=r"without its embedding.*transformers>=5\.3"):
        check_embedding(encoder)
