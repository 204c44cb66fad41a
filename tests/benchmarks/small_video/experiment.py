"""Runs of the controlled experiment: clips, trainings through `crepa_cli.api`, samples and their measures."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save
from torch import Tensor, nn

from crepa_cli import api
from crepa_cli.data.sheet import frame_row, write_sheet
from crepa_cli.data.video import write_video
from crepa_cli.demo.clips import DIRECTIONS, FPS
from crepa_cli.demo.scenes import (
    FRAMES,
    SIZE,
    START,
    TRAVEL,
    UNSEEN_SHAPE,
    Scene,
    all_scenes,
)
from crepa_cli.demo.tiny import write_once
from crepa_cli.files import write_whole
from crepa_cli.measures import measure
from crepa_cli.models import FINAL_LORA, family_defaults
from crepa_cli.models.noise import Flow
from crepa_cli.models.wan import Wan
from crepa_cli.profile import Profile
from crepa_cli.profile.layers import complete
from crepa_cli.report.metrics import read_metrics
from crepa_cli.runs.folder import RunFolder
from crepa_cli.teachers.dinov2 import Dinov2Teacher
from crepa_cli.training.flow import seeded_generator
from small_video.arms import ARMS, DEFAULT, LAMBDA, Arm, Tables, teaching
from small_video.checker import check, path_of

PROMPTS = 12
IMAGE_SIDE = 64
"""The largest side of the teacher's square input in pixels."""
SIGMAS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Noise levels of the held-out loss."""
SAMPLER_STEPS = 8
LOST = 0.5
"""The distance that counts if a frame shows no shape: from the middle of the picture to its edge."""
Values = dict[str, list[float]]
"""A value for each held-out prompt, by the name of the measure."""


class Start(NamedTuple):
    """What runs begin with and train on.

    Attributes:
        trained: scenes of the training clips, each with a way of its own.
        held_out: scenes whose captions are sampled.
        settings: of all its runs.
        guidance: of the samples.
        prompt_tokens: length that prompts are padded to. A model that begins anew needs no 512 of them.
        fresh: whether the transformer begins with random weights.
    """

    trained: list[Scene]
    held_out: list[Scene]
    settings: Tables
    guidance: float
    prompt_tokens: int
    fresh: bool


def starts() -> dict[str, Start]:
    """From scratch on scenes that few steps suffice for, and a LoRA of the trained model on a shape it has not seen."""
    simple = [scene for scene in all_scenes() if (scene.texture, scene.background) == ("plain", "gray")]
    rings = all_scenes((UNSEEN_SHAPE,))
    scratch: Tables = {
        "adapter": {"kind": "full"},
        "train": {"steps": 600, "batch_size": 8, "learning_rate": 2e-3, "lr_warmup_steps": 10, "ema": 0.98},
    }
    lora: Tables = {
        "adapter": {"kind": "lora", "rank": 16},
        "train": {"steps": 60, "batch_size": 4, "learning_rate": 5e-3, "lr_warmup_steps": 5},
    }
    return {
        "scratch": Start(2 * simple[PROMPTS:], simple[:PROMPTS], scratch, guidance=2.0, prompt_tokens=16, fresh=True),
        "lora": Start(
            rings[PROMPTS : PROMPTS + 32], rings[:PROMPTS], lora, guidance=4.0, prompt_tokens=512, fresh=False
        ),
    }


@dataclass(frozen=True)
class Lab:
    """The folder of an experiment.

    Attributes:
        folder: for clips, cache, checkpoints and runs.
        wan: the small Wan.
        teacher: the small DINOv2.
    """

    folder: Path
    wan: Path
    teacher: Path

    def prepare(self, name: str, start: Start) -> None:
        """Write the clips of a start, `name`, and fill the cache that all its runs share, unless that is done."""
        for index, scene in enumerate(start.trained):
            video = self.clips(name) / f"{index:03d}.mp4"
            if not video.exists():
                write_whole(video.with_suffix(".txt"), f"{scene.caption}\n".encode())
                write_video(video, scene.render(index + 1), FPS)
        with patch("crepa_cli.models.wan.PROMPT_TOKENS", start.prompt_tokens):
            api.fill_cache(self.settings(self.wan, name, start, ARMS[DEFAULT], seed=0, overrides={}))
        self.held_out_latents(name, start)

    def run(self, start: Start, name: str, arm: str, seed: int, overrides: Tables) -> dict[str, Any]:
        """Train one arm and measure it; `name` is that of the start."""
        output = self.folder / "runs" / f"{name}-{arm}-{seed}"
        shutil.rmtree(output, ignore_errors=True)  # left by one that was stopped
        base = self.fresh_checkpoint(seed) if start.fresh else self.wan
        profile = self.settings(base, name, start, ARMS[arm], seed, overrides)
        with patch("crepa_cli.models.wan.PROMPT_TOKENS", start.prompt_tokens), teaching(ARMS[arm]):
            run = api.train(profile, output=output)
        metrics = read_metrics(run.metrics)
        values = self.values(trained_pipeline(base, run, fresh=start.fresh), name, start, output.with_suffix(".png"))
        shutil.rmtree(output)
        return {
            "steps": len(metrics),
            "seconds": sum(line["step_seconds"] for line in metrics),
            "similarity": metrics[-1]["crepa_similarity_ema"],
            "values": values,
        }

    def values(self, pipeline: WanPipeline, name: str, start: Start, sheet: Path) -> Values:
        """The held-out loss of a model, and the measures of its samples."""
        return {
            "held_out_loss": held_out_losses(pipeline, start, self.held_out_latents(name, start)),
            **self.measures(sampled(pipeline, start, sheet), start.held_out),
        }

    def measures(self, videos: Iterable[Tensor], scenes: list[Scene]) -> Values:
        """The measures of videos, uint8 `[F, 3, H, W]`, of scenes."""
        rows = [
            {**self._measures(video), **check(video, scene)._asdict(), "way": way_error(video, scene)}
            for video, scene in zip(videos, scenes, strict=True)
        ]
        return {name: [float(row[name]) for row in rows] for name in rows[0]}

    def _measures(self, video: Tensor) -> Mapping[str, float]:
        def encode(frames: Tensor) -> Tensor:
            return self._encoder.features((frames * 255).round().byte(), (self._side, self._side)).float()

        return measure(video.float() / 255, encode).values

    def references(self, name: str, start: Start) -> dict[str, Values]:
        """The measures of real clips of the held-out scenes, and of a model that has been trained before."""
        found = {"real clips": self.measures([scene.render(0) for scene in start.held_out], start.held_out)}
        if not start.fresh:
            pipeline = WanPipeline.from_pretrained(self.wan, dtype=torch.float32)
            found["before the training"] = self.values(pipeline, name, start, self.folder / f"{name}.png")
        return found

    @property
    def _side(self) -> int:
        patch = self._encoder.patch_size
        return IMAGE_SIDE // patch * patch

    def held_out_latents(self, name: str, start: Start) -> Tensor:
        """Normalized latents `[B, C, T, h, w]` of a real clip of each held-out scene, computed once."""
        path = self.folder / f"held-out-{name}.safetensors"
        if not path.exists():
            family = Wan(str(self.wan), "t2v")
            pipeline = family.load_vae_pipeline()
            clips = [scene.render(0).transpose(0, 1).float() / 127.5 - 1 for scene in start.held_out]
            with torch.no_grad():
                latents = torch.stack([family.encode_clip(pipeline, clip)["latents"] for clip in clips])
            write_whole(path, save({"latents": latents}))
        return load_file(path)["latents"]

    @cached_property
    def _encoder(self) -> Dinov2Teacher:
        return Dinov2Teacher.load(self.teacher, torch.device("cpu"))

    def clips(self, name: str) -> Path:
        """The folder of a start's training clips, with their captions."""
        return self.folder / "clips" / name

    def fresh_checkpoint(self, seed: int) -> Path:
        """The small Wan with a transformer that is half as deep and has new weights; its output is 0 at first."""

        def write(folder: Path) -> None:
            shutil.copytree(self.wan, folder)
            torch.manual_seed(seed)
            config = WanTransformer3DModel.load_config(self.wan / "transformer")
            transformer = WanTransformer3DModel.from_config({**config, "num_layers": config["num_layers"] // 2})
            nn.init.zeros_(transformer.proj_out.weight)
            nn.init.zeros_(transformer.proj_out.bias)
            shutil.rmtree(folder / "transformer")
            transformer.save_pretrained(folder / "transformer")

        return write_once(self.folder / "checkpoints" / f"fresh-{seed}", write)

    def settings(self, base: Path, name: str, start: Start, arm: Arm, seed: int, overrides: Tables) -> Profile:
        """The settings of a run; all arms of a start and seed share noise, order of clips and first weights."""
        block = Wan(str(base), "t2v").block_count // 3
        form = {"width": SIZE.width, "height": SIZE.height, "frames": FRAMES, "fps": float(FPS)}
        teacher = {"encoder": str(self.teacher), "encoder_image_size": self._side}
        common: Tables = {
            "model": {"family": "wan", "checkpoint": str(base), "dtype": "float32"},
            "adapter": {"export": ["diffusers"], "export_dtype": "float32"},
            "data": {"path": str(self.clips(name)), **form},
            "train": {"seed": seed, "lr_scheduler": "cosine", "activation_checkpointing": False},
            "crepa": {"block_index": block, "lambda": LAMBDA, **teacher},
            "layersync": {"student_block": block, "teacher_block": 2 * block + 1, "lambda": LAMBDA},
            "validation": {"every": 0},
            "checkpoints": {"every": 0},
        }
        return complete(joined(common, start.settings, arm.settings, overrides), family_defaults)


def joined(*parts: Tables) -> dict[str, dict[str, object]]:
    """Tables of settings, of which later ones win."""
    names = {name: None for part in parts for name in part}
    return {name: {key: value for part in parts for key, value in part.get(name, {}).items()} for name in names}


def trained_pipeline(base: Path, run: RunFolder, *, fresh: bool) -> WanPipeline:
    """The stock pipeline with the weights of a run, in float32."""
    if fresh:
        transformer = WanTransformer3DModel.from_pretrained(run.weights / "transformer")
        return WanPipeline.from_pretrained(base, transformer=transformer, dtype=torch.float32)
    pipeline = WanPipeline.from_pretrained(base, dtype=torch.float32)
    pipeline.load_lora_weights(run.weights, weight_name=FINAL_LORA)
    return pipeline


def sampled(pipeline: WanPipeline, start: Start, sheet: Path) -> list[Tensor]:
    """A video, uint8 `[F, 3, H, W]`, for each held-out caption, from the same noise in every run; and their sheet."""
    captions = [scene.caption for scene in start.held_out]
    pipeline.set_progress_bar_config(disable=True)
    videos = pipeline(
        captions,
        [""] * len(captions),
        height=SIZE.height,
        width=SIZE.width,
        num_frames=FRAMES,
        num_inference_steps=SAMPLER_STEPS,
        guidance_scale=start.guidance,
        max_sequence_length=start.prompt_tokens,
        generator=[seeded_generator("sample", index) for index in range(len(captions))],
        output_type="pt",
    ).frames
    pixels = [(video.float().clamp(0, 1) * 255).round().byte() for video in videos]
    write_sheet(sheet, [frame_row(video) for video in pixels])
    return pixels


@torch.no_grad()
def held_out_losses(pipeline: WanPipeline, start: Start, latents: Tensor) -> list[float]:
    """The diffusion loss of each held-out clip, with fixed noise, as the mean over `SIGMAS`."""
    captions = [scene.caption for scene in start.held_out]
    prompts, _ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=start.prompt_tokens
    )
    errors = torch.zeros(len(captions))
    for sigma in SIGMAS:
        noise = torch.randn(latents.shape, generator=seeded_generator("held out", str(sigma)))
        noisy = Flow().add_noise(latents, noise, errors.new_full(errors.shape, sigma))
        timesteps = errors.new_full(errors.shape, 1000 * sigma)
        prediction = pipeline.transformer(noisy, timesteps, prompts).sample
        errors += (prediction - (noise - latents)).square().flatten(1).mean(1) / len(SIGMAS)
    losses: list[float] = errors.tolist()
    return losses


def way_error(video: Tensor, scene: Scene) -> float:
    """The mean distance of the shape from where the caption's mean clip has it, in shares of the picture's sides."""
    step = torch.tensor(DIRECTIONS[scene.direction])
    moment = torch.linspace(0, 1, len(video))[:, None]
    expected = torch.tensor(START[scene.direction]) + moment * step * TRAVEL[scene.direction]
    return float((path_of(video) - expected).norm(dim=1).nan_to_num(LOST).mean())
