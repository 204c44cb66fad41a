"""SANA-Video with both of its VAEs: that of Wan (480p) and that of LTX-2 (720p)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import OpenTiny
from diffusers import AutoencoderKLLTX2Video, SanaVideoPipeline, SanaVideoTransformer3DModel
from test_families import CAPTION, FPS, batch_of, encoded_clip, first_frame

from crepa_cli.demo.tiny import normalize_latents, smooth_video, write_once
from crepa_cli.models.sanavideo import SanaVideo


def open_size(size: str, task: str, open_tiny: OpenTiny, checkpoints: Path) -> SanaVideo:
    """The tiny checkpoint of a published size."""
    source = open_tiny("sanavideo", "t2v").base.name
    if size == "480p":
        return SanaVideo(source, task)

    def write(folder: Path) -> None:
        vae = AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        )
        normalize_latents(vae, smooth_video(frames=33, size=192))
        parts = SanaVideoPipeline.from_pretrained(source).components
        config = dict(parts["transformer"].config) | {"patch_size": (1, 1, 1)}
        parts |= {"vae": vae, "transformer": SanaVideoTransformer3DModel.from_config(config)}
        SanaVideoPipeline(**parts).save_pretrained(folder)

    return SanaVideo(str(write_once(checkpoints / f"sanavideo-{size}", write)), task)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize(("size", "frames"), [("480p", 9), ("720p", 17)])
def test_training_gives_the_transformer_what_the_pipeline_gives_it(
    size: str, frames: int, task: str, open_tiny: OpenTiny, checkpoints: Path
) -> None:
    """Prompt, empty prompt, timesteps and the clean first frame."""
    torch.manual_seed(0)
    family = open_size(size, task, open_tiny, checkpoints)
    video, tensors = encoded_clip(family, frames, height=64, width=96)
    empty = family.encode_prompt(family.load_text_pipeline(torch.float32), "")
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(family.base.name)
    seen: list[tuple[Any, dict[str, Any]]] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, latents, inputs: seen.append((latents[0], inputs)), with_kwargs=True
    )
    arguments = family.form_arguments(width=96, height=64, frames=frames, fps=FPS)
    if task == "i2v":
        arguments["image"] = first_frame(video)
    pipeline(prompt=CAPTION, num_inference_steps=2, guidance_scale=2.0, output_type="latent", **arguments)

    latents, given = seen[-1]
    batch = batch_of(tensors, 1)
    trained = family.step(batch, torch.randn_like(batch["latents"]), given["timestep"].max()[None] / 1000).inputs
    for name in ("prompt_embeds", "prompt_attention_mask"):
        expected = given[name.replace("prompt_embeds", "encoder_hidden_states").replace("prompt", "encoder")]
        torch.testing.assert_close(torch.stack([empty[name], tensors[name]]), expected)
    torch.testing.assert_close(*torch.broadcast_tensors(trained["timestep"], given["timestep"][1:].float()))
    if task == "i2v":
        # The image has 8 bits per color, and the random VAE is not as smooth as a trained one.
        torch.testing.assert_close(trained["hidden_states"][:, :, 0], latents[1:, :, 0], rtol=0, atol=0.05)


def test_latents_of_the_other_vae_are_decoded(open_tiny: OpenTiny, checkpoints: Path) -> None:
    family = open_size("720p", "t2v", open_tiny, checkpoints)
    pipeline = family.load_vae_pipeline()
    video = smooth_video(frames=17, size=64)[0]
    with torch.no_grad():
        latents = family.encode_clip(pipeline, video)["latents"]
        assert family.decode_latents(pipeline, latents).shape == video.shape
    assert latents.shape == (4, 3, 2, 2)
    assert latents.mean().abs() < 1
    assert 0.2 < latents.std() < 2
