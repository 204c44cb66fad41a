"""`crepa eval`: videos of which the answer is known, equal ones, and those of two demo runs."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import OpenTiny, RunCrepa
from torch import Tensor

from crepa_cli.data.video import decode, write_video
from crepa_cli.demo.clips import FPS, write_demo_clips
from crepa_cli.errors import UserError
from crepa_cli.evaluate.prompts import Sampled, prompts_of_file
from crepa_cli.evaluate.videos import read_video
from crepa_cli.evaluate.weights import Weights
from crepa_cli.runs.checks import load_checkpoint
from crepa_cli.runs.prompts import negative_prompt
from crepa_cli.settings import resolve
from crepa_cli.training.sampling import VideoSampler

FRAMES, PROMPTS = 8, 5
STEADINESS = ("temporal_flickering", "dinov2_consistency")


@pytest.fixture(name="folders", scope="module")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of videos: as they are, the same again, with their frames shuffled, still, and mixed with gray."""
    root = tmp_path_factory.mktemp("videos")
    write_demo_clips(root / "clips", count=PROMPTS)
    for index in range(PROMPTS):
        clip = root / f"clips/clip-{index:02d}.mp4"
        video = decode(clip, frames=FRAMES, fps=FPS / 2, width=64, height=48)
        order = torch.randperm(FRAMES, generator=torch.Generator().manual_seed(index))
        made = {
            "base": video,
            "same": video,
            "shuffled": video[order],
            "still": video[:1].expand_as(video),
            "pale": (video.float() / 2 + 64).byte(),
        }
        for name, frames in made.items():
            write_video(root / name / f"{index:02d}.mp4", frames, FPS / 2)
    return root


@pytest.fixture(name="in_folders")
def _in_folders(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folders)
    return folders


@pytest.mark.usefixtures("in_folders")
def test_videos_are_named_as_what_they_are(
    run_crepa: RunCrepa, tiny_dinov2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training clips are those of which the base's videos are made: as a reference they have the same figures."""
    names = "base", "same", "shuffled", "still", "pale"
    videos = [part for name in names for part in ("--videos", name)]
    encoder = f"crepa.encoder={tiny_dinov2.as_posix()}"
    sets = ["--model", "wan", "--set", encoder, "--set", "crepa.encoder_image_size=56", "--data", "clips"]
    assert run_crepa("eval", *videos, *sets, "--output", tmp_path / "out", "--json") == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out/report.json").read_text(encoding="utf-8") == printed

    report = json.loads(printed)
    base, *others = report["columns"]
    columns: dict[str, Any] = {column["name"]: column for column in others}
    assert {one["verdict"] for one in columns["same"]["differences"].values()} == {"no difference seen"}
    for name in STEADINESS:
        assert columns["shuffled"]["differences"][name]["judgement"] == "worse"
        assert columns["still"]["means"][name] == pytest.approx(1, abs=0.002)
        assert columns["still"]["differences"][name]["judgement"] == "with less motion"
    flags = {name: column["flags"] for name, column in columns.items()}
    washed_out = [f"washed out ({name}) in 5 of 5 videos" for name in ("saturation", "contrast")]
    assert flags == {"same": [], "shuffled": [], "still": ["no motion in 5 of 5 videos"], "pale": washed_out}
    for name, mean in report["reference"]["means"].items():
        assert mean == pytest.approx(base["means"][name], abs=0.01)


@pytest.mark.usefixtures("in_folders")
def test_equal_videos_give_equal_reports_and_no_difference(
    run_crepa: RunCrepa, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for output in ("first", "second"):
        assert run_crepa("eval", "--videos", "base", "--videos", "same", "--output", tmp_path / output) == 0
        written.append((tmp_path / output / "report.json").read_bytes())
    assert written[0] == written[1]
    assert str(tmp_path).encode() not in written[0]
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "no difference seen" in printed
    assert "DINOv2 consistency is left out" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: name the folder of a run"),
        (["--videos", "nowhere"], "--videos nowhere: there is no such folder"),
        (["--videos", "base", "--videos", "."], "--videos .: it holds no file that ends in .mp4"),
        (["--videos", "base", "--videos", "other"], "no name of a video is in all of base, other"),
    ],
)
def test_what_cannot_be_compared_is_said(
    arguments: list[str], message: str, run_crepa: RunCrepa, in_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_folders / "other").mkdir(exist_ok=True)
    (in_folders / "other/another.mp4").touch()
    assert run_crepa("eval", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


TEXTS = "a red disc drifts to the left", "a green star"
RUN = Path("runs/wan-t2v-1")
LORA = RUN / "weights/pytorch_lora_weights.safetensors"


def published(lora: Path | None, file: Path) -> Tensor:
    """The frames that the published pipeline samples for the first prompt, read back from a video file."""
    profile = resolve(str(RUN / "profile.toml")).profile
    data, validation = profile.data, profile.validation
    pipeline: Any = diffusers.WanPipeline.from_pretrained(profile.model.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    frames: Tensor = pipeline(
        prompt=TEXTS[0],
        negative_prompt=negative_prompt(validation, load_checkpoint(profile)),
        width=data.width,
        height=data.height,
        num_frames=data.frames,
        num_inference_steps=2,
        guidance_scale=validation.guidance_scale,
        generator=torch.Generator().manual_seed(profile.train.seed),
        output_type="pt",
    ).frames[0]
    write_video(file, (frames * 255).round().byte(), data.fps)
    return frames_of(file)


def frames_of(file: Path) -> Tensor:
    """The frames of a video `[F, 3, H, W]`, from 0 to 255."""
    return read_video(file)[0].float()


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ("nowhere", [], "nowhere is neither the folder of a run nor a LoRA: there is no such file"),
        ("unfinished", [], "has no weights that can be loaded: finish it with crepa train --resume"),
        ("another", [], "was trained with model.revision = 'v2', and the first run with None"),
        ("unfinished", ["--videos", "samples"], "--videos compares folders of videos: leave out the runs"),
    ],
)
def test_weights_that_cannot_be_evaluated_are_named(
    run: str,
    flags: list[str],
    message: str,
    demo: Path,
    run_crepa: RunCrepa,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(demo)
    settings = (RUN / "profile.toml").read_text(encoding="utf-8")
    for name, revision in {"unfinished": "", "another": 'revision = "v2"\n'}.items():
        (tmp_path / name).mkdir()
        changed = settings.replace("[model]\n", f"[model]\n{revision}")
        (tmp_path / name / "profile.toml").write_text(changed, encoding="utf-8")
    assert run_crepa("eval", RUN, tmp_path / run, *flags, "--output", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_prompts_are_read_line_by_line_and_those_of_image_to_video_with_an_image(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\n a red disc, drifting \na fox\n", encoding="utf-8")
    assert prompts_of_file(file, "t2v") == [Sampled("a fox"), Sampled("a red disc, drifting")]
    with pytest.raises(UserError, match=r"line 1: image to video starts from an image"):
        prompts_of_file(file, "i2v")
    file.write_text("a fox\tfox.png\n", encoding="utf-8")
    assert prompts_of_file(file, "i2v") == [Sampled("a fox", "fox.png")]
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="it holds no prompts"):
        prompts_of_file(file, "t2v")


def test_a_full_fine_tune_is_loaded_in_place_of_the_base(open_tiny: OpenTiny, tmp_path: Path) -> None:
    family = open_tiny("wan", "t2v")
    tuned = family.load_transformer(torch.float32)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01)
    tuned.save_pretrained(tmp_path / "transformer")
    flags = {"model.family": "wan", "model.checkpoint": family.base.name, "model.dtype": "float32"}
    profile = resolve("t2v", flags, ["data.width=96", "data.height=64", "data.frames=9"]).profile
    loaded = Weights("tuned", "full", {"": tmp_path}, family).load(profile, torch.device("cpu"))["transformer"]
    assert all(torch.equal(one, tuned.state_dict()[name]) for name, one in loaded.state_dict().items())


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_runs_are_compared_with_the_base_and_an_interruption_changes_nothing(
    demo: Path,
    run_crepa: RunCrepa,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run with CREPA, one without, and the LoRA of the first as a file."""
    monkeypatch.chdir(demo)
    without = tmp_path / "without"
    sets = ["--set", "crepa.enabled=false", "--set", "validation.every=0"]
    train = ["train", "--demo", "--profile", "t2v", "--model", "wan", "--quiet", "--steps", 2, *sets]
    assert run_crepa(*train, "--output", without) == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))

    sampled: list[int] = []
    sample = VideoSampler.sample

    def counted(sampler: VideoSampler, *arguments: Any, **named: Any) -> Tensor | None:
        if len(sampled) == interrupted_at:
            signal.raise_signal(signal.SIGINT)
        frames = sample(sampler, *arguments, **named)
        sampled.append(named["seed"])
        return frames

    monkeypatch.setattr(VideoSampler, "sample", counted)
    command = ["eval", RUN, without, LORA, "--prompts", prompts, "--steps", 2, "--output"]
    interrupted_at = 3
    assert run_crepa(*command, tmp_path / "stopped") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Stopped; the same command goes on at the next video."
    interrupted_at = -1
    assert run_crepa(*command, tmp_path / "stopped") == 0
    assert len(sampled) == 4 * len(TEXTS)
    # Streamed weights compute the same, and so do prompts that are encoded anew.
    cache = f"data.cache={(tmp_path / 'cache').as_posix()}"
    assert run_crepa(*command, tmp_path / "whole", "--set", "memory.stream_weights=true", "--set", cache) == 0
    written = [(tmp_path / folder / "report.json").read_bytes() for folder in ("stopped", "whole")]
    assert written[0] == written[1]

    report = json.loads(written[0])
    names = ["base", "wan-t2v-1", "without", "pytorch_lora_weights"]
    assert [column["name"] for column in report["columns"]] == names
    assert report["settings_that_differ"]["crepa.enabled"] == {"wan-t2v-1": True, "without": False}
    assert [row["prompt"] for row in report["videos"]] == list(TEXTS)
    assert "dinov2_consistency" in report["columns"][0]["means"]
    first = [tmp_path / "whole" / report["videos"][0]["columns"][name]["file"] for name in names]
    assert first[1].read_bytes() == first[3].read_bytes()
    base, trained = frames_of(first[0]), frames_of(first[1])
    assert (base - published(None, tmp_path / "base.mp4")).abs().mean() < 0.1
    assert (trained - published(LORA, tmp_path / "trained.mp4")).abs().mean() < 0.1
    assert (trained - base).abs().mean() > 0.2

    page = (tmp_path / "whole/report.html").read_text(encoding="utf-8")
    assert page.count("<video ") == 4 * len(TEXTS) + len(report["reference"]["videos"])
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert str(tmp_path) not in page
