"""LTX-Video's two time coordinates of tokens: up to version 0.9.1, and since 0.9.5."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import OpenTiny
from test_families import FPS, batch_of, encoded_clip, overfitted, sampled_latents, sampled_similarity

from crepa_cli.demo.tiny import write_once
from crepa_cli.models.ltxvideo import LtxVideo

VERSIONS = ["0.9", "0.9.5"]


def open_version(version: str, task: str, open_tiny: OpenTiny, checkpoints: Path) -> LtxVideo:
    """The tiny checkpoint of a version; the scheduler of later ones does not shift by the sequence length."""
    source = open_tiny("ltxvideo", "t2v").base.name
    if version == "0.9":
        return LtxVideo(source, task)

    def write(folder: Path) -> None:
        shutil.copytree(source, folder)
        path = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text()) | {"use_dynamic_shifting": False, "shift_terminal": None}
        path.write_text(json.dumps(config))

    return LtxVideo(str(write_once(checkpoints / f"ltxvideo-{version}", write)), task)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("version", VERSIONS)
def test_training_gives_the_transformer_what_the_pipeline_gives_it(
    version: str, task: str, open_tiny: OpenTiny, checkpoints: Path
) -> None:
    torch.manual_seed(0)
    family = open_version(version, task, open_tiny, checkpoints)
    video, tensors = encoded_clip(family, frames=25, height=64, width=96)
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(family.base.name)
    seen: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    sampled_latents(family, pipeline, video, tensors["latents"], steps=2)

    given = seen[-1]
    batch = batch_of(tensors, 1)
    trained = family.step(batch, torch.randn_like(batch["latents"]), given["timestep"].max()[None] / 1000).inputs
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        assert torch.equal(trained[name], given[name])
    torch.testing.assert_close(*torch.broadcast_tensors(trained["timestep"], given["timestep"].view(1, -1)))

    def rotation(inputs: Any) -> Any:
        names = ("num_frames", "height", "width", "rope_interpolation_scale", "video_coords")
        return pipeline.transformer.rope(inputs["hidden_states"], **{name: inputs.get(name) for name in names})

    torch.testing.assert_close(rotation(trained), rotation(given), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_overfitted_transformer_of_later_versions_gives_its_clip_back(
    open_tiny: OpenTiny, checkpoints: Path
) -> None:
    torch.manual_seed(0)
    family = open_version("0.9.5", "i2v", open_tiny, checkpoints)
    assert family.pipeline_class == "LTXConditionPipeline"
    video, tensors = encoded_clip(family, frames=17, height=64, width=64)
    transformer = overfitted(family, tensors, steps=60)
    assert sampled_similarity(family, video, tensors, transformer=transformer) >= 0.8


@pytest.mark.parametrize("version", VERSIONS)
def test_noise_grows_with_the_number_of_latents(version: str, open_tiny: OpenTiny, checkpoints: Path) -> None:
    family = open_version(version, "t2v", open_tiny, checkpoints)
    assert family.timestep_shift(torch.zeros(1, 8, 4, 16, 16)) == pytest.approx(math.exp(0.95))
    assert family.timestep_shift(torch.zeros(2, 8, 16, 16, 16)) == pytest.approx(math.exp(2.05))


def test_the_frame_rate_scales_positions_in_time(open_tiny: OpenTiny) -> None:
    family = open_tiny("ltxvideo", "t2v")
    _, tensors = encoded_clip(family, frames=17, height=64, width=64)
    batch = batch_of(tensors, 2) | {"fps": torch.tensor([FPS, 2 * FPS])}
    seconds = family.step(batch, batch["latents"], torch.full((2,), 0.5)).inputs["video_coords"][:, 0, -1]
    torch.testing.assert_close(seconds, torch.tensor([16 / FPS, 8 / FPS]))


def test_a_vae_that_denoises_decodes_latents_and_samples(
    open_tiny: OpenTiny, checkpoints: Path, tmp_path: Path
) -> None:
    """Since version 0.9.1 the decoder takes a timestep, and the pipeline adds noise to what it decodes."""
    folder = tmp_path / "denoising"
    shutil.copytree(open_version("0.9.5", "t2v", open_tiny, checkpoints).base.name, folder)
    diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_spatio_temporal_scaling=(True, True, True),
        decoder_inject_noise=(False, False, False, False),
        upsample_residual=(True, True, True),
        upsample_factor=(2, 2, 2),
        timestep_conditioning=True,
    ).save_pretrained(folder / "vae")
    family = LtxVideo(str(folder), "t2v")
    pipeline = family.load_sampling_pipeline(family.load_transformer(torch.float32))
    prompt = family.encode_prompt(family.load_text_pipeline(torch.float32), "a red disc")
    arguments = family.sampling_arguments(prompt, prompt)
    assert (arguments["decode_timestep"], arguments["decode_noise_scale"]) == (0.05, 0.025)
    arguments |= family.form_arguments(width=64, height=64, frames=17, fps=FPS)
    with torch.no_grad():
        assert family.decode_latents(pipeline, torch.randn(8, 3, 2, 2)).shape == (3, 17, 64, 64)
        (video,) = pipeline(**arguments, num_inference_steps=1, output_type="pt").frames
    assert video.shape == (17, 3, 64, 64)
    assert video.isfinite().all()
