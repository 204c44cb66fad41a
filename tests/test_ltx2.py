"""LTX-2: the video beside its audio stream, captions that pass the connectors, and the versions."""

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
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from test_families import CAPTION, FPS, batch_of, encoded_clip, sampled_latents

from crepa_cli.demo.tiny import write_once
from crepa_cli.models.ltx2 import Ltx2
from crepa_cli.runs.capabilities import process_mistakes
from crepa_cli.runs.checks import family_mistakes
from crepa_cli.settings import resolve

OF_2_3 = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
CONNECTORS_OF_2_3 = {
    "per_modality_projections": True,
    "proj_bias": True,
    "video_hidden_dim": 48,
    "video_connector_attention_head_dim": 12,
    "video_gated_attn": True,
    "audio_hidden_dim": 16,
    "audio_connector_attention_head_dim": 4,
    "audio_gated_attn": True,
}
"""How LTX-2.3 differs: its transformer takes what the connectors return as it is."""


def open_version(version: str, task: str, open_tiny: OpenTiny, checkpoints: Path) -> Ltx2:
    """The tiny checkpoint of a version, with few blocks."""
    source = Path(open_tiny("ltx2", "t2v").base.name)

    def write(folder: Path) -> None:
        shutil.copytree(source, folder)
        changed = version == "2.3"
        models = (
            (diffusers.LTX2VideoTransformer3DModel, "transformer", {"num_layers": 2} | (OF_2_3 if changed else {})),
            (LTX2TextConnectors, "connectors", CONNECTORS_OF_2_3 if changed else {}),
        )
        for model, component, changes in models:
            config = json.loads((source / component / "config.json").read_text())
            model.from_config(config | changes).save_pretrained(folder / component)

    family = Ltx2(str(write_once(checkpoints / f"ltx2-{version}", write)), task)
    vars(family)["caption_tokens"] = 128
    return family


@pytest.mark.parametrize(("version", "task"), [("2.0", "t2v"), ("2.0", "i2v"), ("2.3", "i2v")])
def test_training_gives_the_transformer_what_the_pipeline_gives_it(
    version: str, task: str, open_tiny: OpenTiny, checkpoints: Path
) -> None:
    """But for the audio, to which the video does not attend in training."""
    torch.manual_seed(0)
    family = open_version(version, task, open_tiny, checkpoints)
    video, tensors = encoded_clip(family, frames=25, height=64, width=96)
    pipeline: Any = getattr(diffusers, family.pipeline_class).from_pretrained(family.base.name)
    seen: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    sampled_latents(family, pipeline, video, tensors["latents"], steps=2)

    given = seen[-1]
    batch = batch_of(tensors, 1)
    noise = torch.randn_like(batch["latents"])
    trained = family.step(batch, noise, given["sigma"] / 1000).inputs
    for name in ("encoder_hidden_states", "encoder_attention_mask", "sigma"):
        torch.testing.assert_close(trained[name], given[name])
    torch.testing.assert_close(*torch.broadcast_tensors(trained["timestep"], given["timestep"].view(1, -1)))
    torch.testing.assert_close(trained["video_coords"], given["video_coords"])

    isolated = given | {"isolate_modalities": True, "hidden_states": trained["hidden_states"], "return_dict": True}
    with torch.no_grad():
        predicted = [pipeline.transformer(**inputs).sample for inputs in (trained, isolated)]
    torch.testing.assert_close(*predicted)


def test_prompts_that_have_passed_the_connectors_sample_what_the_caption_samples(
    open_tiny: OpenTiny, checkpoints: Path
) -> None:
    family = open_version("2.3", "t2v", open_tiny, checkpoints)
    video, tensors = encoded_clip(family, frames=9, height=64, width=64)
    pipelines = [diffusers.LTX2Pipeline.from_pretrained(family.base.name) for _ in range(2)]
    with torch.no_grad():
        negative = family.encode_negative_prompt(pipelines[0], "blurry")
    prompt = {name: tensors[name] for name in negative}
    encoded = family.sampling_arguments(prompt, negative)
    text = {name: encoded[name] for name in encoded if "prompt" not in name}
    samples = [
        sampled_latents(family, pipeline, video, tensors["latents"], 2, **arguments, guidance=3.0)
        for pipeline, arguments in (
            (pipelines[0], text | {"prompt": CAPTION, "negative_prompt": "blurry"}),
            (family.for_encoded_prompts(pipelines[1]), encoded),
        )
    ]
    torch.testing.assert_close(*samples)


def test_the_frame_rate_scales_positions_in_time(open_tiny: OpenTiny) -> None:
    family = open_tiny("ltx2", "t2v")
    _, tensors = encoded_clip(family, frames=17, height=64, width=64)
    batch = batch_of(tensors, 2) | {"fps": torch.tensor([FPS, 2 * FPS])}
    seconds = family.step(batch, batch["latents"], torch.full((2,), 0.5)).inputs["video_coords"][:, 0, -1]
    torch.testing.assert_close(seconds, torch.tensor([[9 / FPS, 17 / FPS], [4.5 / FPS, 8.5 / FPS]]))


def test_noise_grows_with_the_number_of_latents(open_tiny: OpenTiny) -> None:
    family = open_tiny("ltx2", "t2v")
    assert family.timestep_shift(torch.zeros(1, 8, 4, 16, 16)) == pytest.approx(math.exp(0.95))
    assert family.timestep_shift(torch.zeros(2, 8, 16, 16, 16)) == pytest.approx(math.exp(2.05))


def test_what_depends_on_the_version_is_said_to_the_pipeline(open_tiny: OpenTiny, checkpoints: Path) -> None:
    """The pipelines' defaults are those of LTX-2.3; the text encoder, which would tell, is not loaded."""
    prompt = {name: torch.zeros(4, 8) for name in ("prompt_embeds", "audio_prompt_embeds")}
    prompt["prompt_attention_mask"] = torch.ones(4)
    for version, task, expected in (
        ("2.0", "i2v", {"use_cross_timestep": False, "stg_scale": 0.0, "audio_stg_scale": 0.0}),
        ("2.3", "i2v", {"use_cross_timestep": True}),
    ):
        family = open_version(version, task, open_tiny, checkpoints)
        arguments = family.sampling_arguments(prompt, prompt)
        assert {name: value for name, value in arguments.items() if "prompt" not in name} == expected
    family.base.read_config("text_encoder/config.json")["model_type"] = "gemma4_unified"
    assert family.sampling_arguments(prompt, prompt)["image_crf"] == 18


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ltx2", "spectrograms"),
        ("kandinsky6", "does not read the sound of clips"),
        ("wan", "generates videos without sound"),
    ],
)
def test_training_the_sound_is_refused_with_the_reason(name: str, reason: str, open_tiny: OpenTiny) -> None:
    family = open_tiny(name, "t2v")
    flags = {"model.family": name, "model.checkpoint": family.base.name}
    profile = resolve("t2v", flags, ["model.audio=true"]).profile
    (refusal,) = [one for one in family_mistakes(family, profile) if "model.audio" in one]
    assert reason in refusal


def test_several_processes_train_whole_weights_only_if_they_are_sharded(open_tiny: OpenTiny) -> None:
    family = open_tiny("ltx2", "t2v")
    flags = {"model.family": "ltx2", "model.checkpoint": family.base.name}

    def mistakes(processes: int, *sets: str) -> list[str]:
        return process_mistakes(resolve("t2v", flags, sets).profile, family, processes)

    (message,) = mistakes(2, "adapter.kind=full")
    assert "train.sharding = true" in message
    assert not mistakes(1, "adapter.kind=full")
    assert not mistakes(2, "adapter.kind=full", "train.sharding=true")
    assert not mistakes(2)
