"""The trained Wan of the demo, and the script that trains it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pretrain
import pytest
import torch
from safetensors.torch import load_file
from small_video import loop, text, transformer, vae
from small_video.checker import check
from torch import Tensor, nn

from crepa_cli.demo.scenes import all_scenes
from crepa_cli.demo.trained import WEIGHTS, write_trained_dinov2, write_trained_wan

PROMPTS = 10


def test_the_weights_are_small_and_whole(tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(sizes) < 8e6
    assert max(sizes) < 4e6
    write_trained_wan(tmp_path / "wan")
    write_trained_dinov2(tmp_path / "dinov2")
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {path.relative_to(WEIGHTS): path.read_bytes() for path in WEIGHTS.rglob("*") if path.is_file()}


@torch.no_grad()
def test_whole_sequences_are_encoded_and_decoded_as_the_published_forward_does_by_parts() -> None:
    model = vae.new_vae()
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    videos, _ = vae.batch_of(0, count=1)
    latents = vae.encode(model, videos)
    torch.testing.assert_close(latents, model.encode(videos).latent_dist.mode(), rtol=0, atol=1e-5)
    decoded = vae.decode(model, latents).clamp(-1, 1)
    torch.testing.assert_close(decoded, model.decode(latents).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_few_tokens_of_padding_count_as_hundreds() -> None:
    tokenizer = text.new_tokenizer()
    encoded = tokenizer(
        [all_scenes()[0].caption, ""], padding="max_length", max_length=text.TOKENS, return_tensors="pt"
    )
    model = transformer.new_transformer()
    nn.init.normal_(model.proj_out.weight, generator=torch.Generator().manual_seed(0))
    embeds = text.embed(text.new_text_encoder(len(tokenizer)), encoded.input_ids, encoded.attention_mask)
    noise = torch.randn(2, vae.CHANNELS, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    whole = nn.functional.pad(embeds, (0, 0, 0, text.PROMPT_TOKENS - text.TOKENS))
    expected = model(noise, torch.tensor([900.0, 20.0]), whole).sample
    with transformer.few_tokens(model) as few:
        few.bias = text.padding_bias(encoded.attention_mask)
        flow = model(noise, torch.tensor([900.0, 20.0]), embeds).sample
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(noise, torch.tensor([900.0, 20.0]), whole).sample, expected, rtol=0, atol=0)


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model_and_loss() -> tuple[nn.Linear, Callable[[int], Tensor]]:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        return model, lambda step: (model(torch.full((4,), 1.0 + step % 3)) - 1).square().sum()

    whole, loss = model_and_loss()
    loop.train(whole, loss, tmp_path / "whole.safetensors", steps=12, rate=0.1)

    def stopping(step: int) -> Tensor:
        if step == 7:
            raise KeyboardInterrupt
        return loss(step)

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    model, loss = model_and_loss()
    with pytest.raises(KeyboardInterrupt):
        loop.train(model, stopping, tmp_path / "parts.safetensors", steps=12, rate=0.1)
    resumed, loss = model_and_loss()
    loop.train(resumed, loss, tmp_path / "parts.safetensors", steps=12, rate=0.1)
    assert torch.equal(resumed.weight, whole.weight)
    again, loss = model_and_loss()
    loop.train(again, loss, tmp_path / "parts.safetensors", steps=12, rate=0.1)
    assert torch.equal(again.weight, whole.weight)


@pytest.mark.slow
def test_the_model_is_trained_by_one_command(tmp_path: Path) -> None:
    """Processes of equal seeds write equal weights, in the layout that is shipped."""
    script = str(Path(pretrain.__file__))
    for name in ("one", "two"):
        command = [sys.executable, script, "--quick", "--work", str(tmp_path / name), "--output", str(tmp_path / name)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    files = {path.relative_to(WEIGHTS) for path in WEIGHTS.rglob("*") if path.is_file()}
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
        if path.suffix == ".safetensors":
            trained, new = load_file(WEIGHTS / path), load_file(tmp_path / "one" / path)
            assert {name: (value.shape, value.dtype) for name, value in trained.items()} == {
                name: (value.shape, value.dtype) for name, value in new.items()
            }


@pytest.mark.slow
def test_the_published_pipeline_generates_what_prompts_say_that_were_not_trained_on() -> None:
    """Color and direction of at least 8 of 10; they were right in 10 when the weights were made."""
    pipeline: Any = diffusers.WanPipeline.from_pretrained(WEIGHTS / "wan")
    pipeline.set_progress_bar_config(disable=True)
    right = 0
    for seed, scene in enumerate(transformer.held_out()[:PROMPTS]):
        frames = pipeline(
            scene.caption,
            height=64,
            width=96,
            num_frames=17,
            num_inference_steps=12,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).frames[0]
        right += check((frames * 255).round().to(torch.uint8), scene) == (True, True)
    assert right >= 8
