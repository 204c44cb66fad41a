"""What validation videos are sampled from: prompts, negative prompt, first frames, before training too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import OpenTiny
from test_families import CAPTION, EMBEDDED_GUIDANCE
from torch import Tensor

from crepa_cli import api
from crepa_cli.data.buckets import Bucket
from crepa_cli.data.clips import find_clips
from crepa_cli.data.images import first_frame
from crepa_cli.data.scan import PreparedClip
from crepa_cli.data.video import decode, probe, write_video
from crepa_cli.demo.clips import FPS, write_demo_clips
from crepa_cli.errors import UserError
from crepa_cli.events import Event, ValidationSampled
from crepa_cli.models import FAMILIES
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import open_family
from crepa_cli.runs.folder import RunFolder
from crepa_cli.runs.prompts import negative_prompt, sampled_texts, with_prompts, with_prompts_of

UNWANTED = "blurry, jittery"


def settings(family: Family, *sets: str) -> Profile:
    flags = {"model.family": family.name, "model.checkpoint": family.base.name, "model.task": family.task}
    sizes = ["data.width=96", "data.height=96", "data.frames=9"]
    return api.resolve("t2v", flags, [*sizes, *sets]).profile


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_encoded_prompts_give_what_the_published_pipeline_gives_for_their_texts(name: str, open_tiny: OpenTiny) -> None:
    family = open_tiny(name, "t2v")
    text = family.load_text_pipeline(torch.float32)
    encoded = family.sampling_arguments(
        family.encode_prompt(text, CAPTION), family.encode_negative_prompt(text, UNWANTED)
    )
    side = 2 * family.size_multiple
    form = family.form_arguments(width=side, height=side, frames=family.frame_multiple + 1, fps=16)
    if "sample_audio" in encoded:
        # Sound would change the video.
        form["sample_audio"] = encoded.pop("sample_audio")
    pipeline: Any = getattr(diffusers, family.pipeline_class).from_pretrained(family.base.name)

    def sampled(**prompts: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = family.guide(pipeline, 4.0) | {"output_type": "latent", "generator": generator}
        latents: Tensor = pipeline(**form, **arguments, **prompts, num_inference_steps=2).frames
        return latents

    # Some are trained on longer captions than their pipeline takes by default.
    length = {"max_sequence_length": family.caption_tokens} if family.caption_tokens else {}
    expected = sampled(prompt=CAPTION, negative_prompt=UNWANTED, **length)
    if name not in EMBEDDED_GUIDANCE:
        assert not torch.allclose(sampled(prompt=CAPTION, negative_prompt="red", **length), expected, atol=1e-3)
    family.for_encoded_prompts(pipeline)
    torch.testing.assert_close(sampled(**encoded), expected)


@pytest.fixture(name="clips")
def _clips(tmp_path: Path) -> list[PreparedClip]:
    """Four clips, the first two of which have the same caption."""
    write_demo_clips(tmp_path / "clips", count=4)
    (tmp_path / "clips/clip-01.txt").write_text((tmp_path / "clips/clip-00.txt").read_text())
    found = find_clips(tmp_path / "clips").clips
    return [PreparedClip(clip, probe(clip.path), Bucket(9, 96, 96), "", FPS) for clip in found]


def test_without_prompts_two_captions_are_taken(clips: list[PreparedClip], open_tiny: OpenTiny, tmp_path: Path) -> None:
    run, profile = RunFolder(tmp_path / "run"), settings(open_tiny("wan", "t2v"))
    chosen = with_prompts(profile, clips, run)
    assert chosen.validation.prompts == (clips[0].clip.caption, clips[2].clip.caption)
    assert chosen.validation.images == ()
    assert api.resolve(str(run.profile)).profile == chosen
    assert with_prompts_of(chosen, profile) == chosen
    assert with_prompts(chosen, clips[1:], run) == chosen


def test_image_to_video_starts_from_the_first_frames_of_these_clips(
    clips: list[PreparedClip], open_tiny: OpenTiny, tmp_path: Path
) -> None:
    profile = settings(open_tiny("wan", "i2v"))
    chosen = with_prompts(profile, clips, RunFolder(tmp_path / "run"))
    for path, clip in zip(chosen.validation.images, (clips[0], clips[2]), strict=True):
        frame = decode(clip.clip.path, frames=1, fps=16, width=96, height=96)[0]
        assert first_frame(path, 96, 96).tobytes() == frame.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_nothing_is_sampled_if_validation_is_off(
    clips: list[PreparedClip], open_tiny: OpenTiny, tmp_path: Path
) -> None:
    family = open_tiny("wan", "t2v")
    profile = settings(family, "validation.every=0", "validation.prompts=a")
    assert with_prompts(profile, clips, RunFolder(tmp_path / "run")) == profile
    assert (sampled_texts(profile.validation, family), negative_prompt(profile.validation, family)) == ([], "")


def test_the_negative_prompt_is_the_published_one_unless_the_settings_say_otherwise(open_tiny: OpenTiny) -> None:
    family = open_tiny("ltxvideo", "t2v")
    asked = [(), ("validation.negative_prompt=red",), ("validation.negative_prompt=",)]
    found = [negative_prompt(settings(family, *sets).validation, family) for sets in asked]
    assert found == ["worst quality, inconsistent motion, blurry, jittery, distorted", "red", ""]


def test_a_motion_score_is_asked_for_in_the_prompt_of_sana_and_refused_elsewhere(open_tiny: OpenTiny) -> None:
    sets = ["validation.prompts=a fox", "validation.motion_score=30"]
    sana = open_tiny("sanavideo", "t2v")
    assert sampled_texts(settings(sana, *sets).validation, sana) == ["a fox motion score: 30."]
    with pytest.raises(UserError, match=r"validation\.motion_score: wan knows no motion score"):
        open_family(settings(open_tiny("wan", "t2v"), *sets))


def test_one_step_is_refused_where_the_scheduler_cannot_take_it(open_tiny: OpenTiny) -> None:
    """LTX's scheduler would divide by zero and end in an IndexError."""
    ltx = open_tiny("ltxvideo", "t2v")
    with pytest.raises(UserError, match=r"validation\.steps = 1: .* choose 2 or more"):
        open_family(settings(ltx, "validation.steps=1"))
    open_family(settings(ltx, "validation.steps=1", "validation.every=0"))
    open_family(settings(open_tiny("wan", "t2v"), "validation.steps=1"))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_without_prompts_samples_the_base_first_and_keeps_its_prompts_when_resumed(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    sets = ["validation.prompts=[]", "validation.every=1", "validation.steps=2", "train.steps=1", "crepa.enabled=false"]
    clips = tmp_path / "clips"
    write_demo_clips(clips, count=3)
    flags = {"model.family": "wan", "data.path": str(clips)}
    profile = api.resolve("t2v", flags, sets, demo=True).profile
    events: list[Event] = []
    run = api.train(profile, output=tmp_path / "run", listeners=[events.append])
    sampled = [event for event in events if isinstance(event, ValidationSampled)]
    assert [(event.step, len(event.paths)) for event in sampled] == [(0, 2), (1, 2)]

    prompts = api.resolve(str(run.profile)).profile.validation.prompts
    write_video(tmp_path / "base.mp4", base_sample(demo, prompts[0]), 16)
    before, expected = (decode_all(path) for path in (run.samples(0) / "00.mp4", tmp_path / "base.mp4"))
    assert (before.float() - expected.float()).abs().mean() < 0.5
    (clips / "clip-00.mp4").unlink()
    (clips / "clip-00.txt").unlink()
    longer = api.resolve("t2v", flags, [*sets, "train.steps=2"], demo=True).profile
    api.train(longer, output=run.path, resume=True)
    assert api.resolve(str(run.profile)).profile.validation.prompts == prompts
    assert {path.name for path in run.samples(2).iterdir()} == {"00.mp4", "01.mp4", "sheet.png"}


def base_sample(demo: Path, prompt: str) -> Tensor:
    """The frames that the published pipeline samples from the base model: uint8 `[F, 3, H, W]`."""
    pipeline: Any = diffusers.WanPipeline.from_pretrained(demo / "crepa-demo/wan-trained")
    frames: Tensor = pipeline(
        prompt=prompt,
        negative_prompt="",
        width=96,
        height=64,
        num_frames=17,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(42),
        output_type="pt",
    ).frames[0]
    return (frames * 255).round().byte()


def decode_all(path: Path) -> Tensor:
    return decode(path, frames=17, fps=16, width=96, height=64)
