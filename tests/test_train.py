"""`crepa train` from clips to weights: the demo's run, its files, resuming after a kill."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from conftest import RunCrepa
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from crepa_cli.alignment import CoefficientSchedule
from crepa_cli.data.video import probe
from crepa_cli.models import FAMILIES
from crepa_cli.report.metrics import read_metrics

WEIGHTS = "weights/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def demo_run(demo: Path) -> Path:
    return demo / "runs" / "wan-t2v-1"


def test_the_demo_leaves_the_files_of_a_run(demo_run: Path) -> None:
    for step in (20, 40, 60):
        files = {path.name for path in (demo_run / "checkpoints" / f"step-{step:06d}").iterdir()}
        assert files == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    for step in (0, 30, 60):
        video = probe(demo_run / "samples" / f"step-{step:06d}" / "00.mp4")
        assert (video.frames, video.width, video.height) == (17, 96, 64)
    card = (demo_run / "README.md").read_text()
    assert 'pipeline.load_lora_weights(".", weight_name="weights/pytorch_lora_weights.safetensors")' in card
    assert len(load_file(demo_run / WEIGHTS)) > 0
    assert len(read_metrics(demo_run / "metrics.jsonl")) == 60


def test_the_similarity_rises_and_the_coefficient_follows_its_schedule(demo_run: Path) -> None:
    metrics = read_metrics(demo_run / "metrics.jsonl")
    similarities = [line["crepa_similarity"] for line in metrics]
    assert sum(similarities[-10:]) / 10 - sum(similarities[:5]) / 5 > 0.2
    schedule = CoefficientSchedule(peak=0.2, total_steps=60, scheduler="cosine", end=0.1, warmup_steps=10)
    assert [line["step"] for line in metrics] == list(range(60))
    assert [line["crepa_coefficient"] for line in metrics] == [schedule.coefficient(step) for step in range(60)]
    assert metrics[0]["crepa_coefficient"] == 0.0
    for line in metrics:
        assert line["crepa_weighted_loss"] == line["crepa_coefficient"] * line["crepa_loss"]
        assert math.isclose(line["loss"], line["diffusion_loss"] + line["crepa_weighted_loss"], rel_tol=1e-5)
        assert -1 <= line["crepa_self_similarity"] <= 1
    assert metrics[-1]["crepa_self_similarity"] > metrics[0]["crepa_self_similarity"] + 0.2
    assert math.isclose(metrics[35]["crepa_coefficient"], 0.15)


def test_the_profile_of_a_run_repeats_it(demo: Path, demo_run: Path, run_crepa: RunCrepa, monkeypatch: Any) -> None:
    monkeypatch.chdir(demo)
    arguments = ["--profile", demo_run / "profile.toml", "--plain", "--steps", 4, "--output", "runs/again"]
    assert run_crepa("train", *arguments, "--set", "validation.every=0", "--set", "crepa.decay_steps=50") == 0
    first, again = (read_metrics(run / "metrics.jsonl")[:4] for run in (demo_run, demo / "runs" / "again"))
    assert [line["loss"] for line in first] == [line["loss"] for line in again]


def test_a_second_run_loads_no_encoder_vae_or_text_encoder(
    demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded that the cache stands for")

    monkeypatch.setattr(diffusers.AutoencoderKLWan, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.UMT5EncoderModel, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", refuse)
    monkeypatch.chdir(demo)
    # Validation videos are left out: they are decoded by the VAE.
    flags = ["--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", 3, "--set", "validation.every=0"]
    assert run_crepa("train", *flags, "--output", "runs/second") == 0
    assert read_metrics(demo / "runs" / "second" / "metrics.jsonl")[2]["crepa_similarity"] is not None


def test_the_exported_lora_loads_in_the_published_pipeline_and_changes_the_video(demo: Path, demo_run: Path) -> None:
    pipeline = diffusers.WanPipeline.from_pretrained(demo / "crepa-demo" / "wan-trained")

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a red disc",
            height=64,
            width=96,
            num_frames=17,
            num_inference_steps=4,
            generator=generator,
            output_type="pt",
        ).frames

    before = sample()
    pipeline.load_lora_weights(demo_run / "weights", weight_name="pytorch_lora_weights.safetensors")
    loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name=pipeline.get_active_adapters()[0])
    saved = {name.removeprefix("transformer."): tensor for name, tensor in load_file(demo_run / WEIGHTS).items()}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert (sample() - before).abs().mean() > 1e-3


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    first, second = load_file(ours), load_file(theirs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


SHORT = [
    *("--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", "16"),
    *("--set", "train.batch_size=1"),
    *("--set", "checkpoints.every=5", "--set", "validation.every=0", "--set", "train.ema=0.9"),
    *("--set", "train.lr_scheduler=cosine", "--set", "adapter.dropout=0.1", "--set", "train.gradient_accumulation=2"),
    *("--set", "crepa.similarity_threshold=0.12", "--set", "crepa.similarity_ema_decay=0.9"),
    *("--set", "crepa.warmup_steps=2"),
]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise equality, with dropout, accumulation, the average of the weights, and a cutoff by similarity.

    The runs that are resumed keep weights and hidden states elsewhere than before.
    """
    monkeypatch.chdir(demo)
    assert run_crepa("train", *SHORT, "--output", "runs/whole") == 0
    killed = demo / "runs" / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "crepa_cli", "train", *SHORT, "--output", killed], stdout=subprocess.DEVNULL
    )
    while len(read_metrics(killed / "metrics.jsonl")) < 8:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step-000005"]

    on_host = ["--set", "memory.stream_weights=true", "--set", "memory.offload_activations=true"]
    assert run_crepa("train", "--resume", "--output", killed, "--plain", *on_host) == 0

    whole = demo / "runs" / "whole"
    assert_same_tensors(killed / WEIGHTS, whole / WEIGHTS)
    for name in ("model", "optimizer", "average"):
        assert_same_tensors(*(run / "checkpoints/step-000016" / f"{name}.safetensors" for run in (killed, whole)))
    # The checkpoint and the run export the same average of the weights.
    written = (whole / WEIGHTS).read_bytes()
    assert run_crepa("export", whole) == 0
    assert (whole / WEIGHTS).read_bytes() == written
    kept = ("step", "loss", "crepa_similarity_ema", "crepa_coefficient", "crepa_cutoff", "learning_rate")
    lines, expected = (
        [[line[key] for key in kept] for line in read_metrics(run / "metrics.jsonl")] for run in (killed, whole)
    )
    assert lines == expected
    assert [line[4] for line in lines].index(True) > 5, "the cutoff comes after the kill, and depends on the average"

    after_cutoff = shutil.copytree(whole, demo / "runs" / "after-cutoff")
    shutil.rmtree(after_cutoff / "checkpoints/step-000016")
    assert run_crepa("train", "--resume", "--output", after_cutoff, "--plain") == 0
    assert_same_tensors(after_cutoff / WEIGHTS, whole / WEIGHTS)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_and_sigterm_save_a_checkpoint(number: signal.Signals, demo: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "crepa_cli", "train", *SHORT, "--output", tmp_path], cwd=demo, stdout=subprocess.DEVNULL
    )
    while len(read_metrics(tmp_path / "metrics.jsonl")) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == 128 + number
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    steps = len(read_metrics(tmp_path / "metrics.jsonl"))
    assert json.loads((checkpoint / "state.json").read_text())["progress"]["step"] == steps < 16


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(
    family: str, demo: Path, tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is finite, aligned, and changes the adapter; the slow tests show that it learns the right thing."""
    monkeypatch.chdir(demo)
    flags = ["--profile", "t2v", "--model", family, "--demo", "--plain", "--steps", 3, "--output", tmp_path]
    sets = ["validation.every=0", "crepa.warmup_steps=0", "train.batch_size=2"]
    assert run_crepa("train", *flags, *(word for setting in sets for word in ("--set", setting))) == 0
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in metrics)
    assert all(line["loss"] != line["diffusion_loss"] for line in metrics)
    added = [tensor for name, tensor in load_file(tmp_path / WEIGHTS).items() if "lora_B" in name]
    assert added
    assert all(tensor.isfinite().all() and tensor.any() for tensor in added)


EVERYTHING = (
    *("crepa.objective=relation", "crepa.projector=conv", "crepa.spatial_norm=0.6"),
    "crepa.adjacent_tau_seconds=0.25",
)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "ltxvideo", "sanavideo", "kandinsky6"])
def test_families_train_with_relations_a_convolution_and_tau_in_seconds(
    family: str, demo: Path, tmp_path: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is finite and trains adapter and projector, and the loss has the sign of the objective."""
    monkeypatch.chdir(demo)
    sets = [word for setting in EVERYTHING for word in ("--set", setting)]
    flags = ["--profile", "t2v", "--model", family, "--demo", "--plain", "--steps", 3, "--output", tmp_path]
    flags += ["--set", "validation.every=0", "--set", "crepa.warmup_steps=0"]
    flags += ["--set", "crepa.similarity_threshold=none", "--set", "train.batch_size=2"]
    assert run_crepa("train", *flags, *sets) == 0
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in metrics)
    assert all(line["projector_grad_norm"] > 0 for line in metrics)
    assert all(line["crepa_loss"] > 0 for line in metrics)


def test_full_tuning_writes_a_transformer(demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    flags = ["--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", 2, "--output", "runs/full"]
    assert run_crepa("train", *flags, "--set", "adapter.kind=full", "--set", "validation.every=0") == 0
    transformer = diffusers.WanTransformer3DModel.from_pretrained(demo / "runs/full/weights/transformer")
    base = diffusers.WanTransformer3DModel.from_pretrained(demo / "crepa-demo/wan-trained/transformer")
    assert not any("crepa" in name or "projector" in name for name, _ in transformer.named_parameters())
    assert any(not torch.equal(a, b) for a, b in zip(transformer.parameters(), base.parameters(), strict=True))
    file = demo / "runs/full/weights/full_comfyui.safetensors"
    written = file.read_bytes()
    file.unlink()
    assert run_crepa("export", "runs/full", "--format", "comfyui") == 0
    assert file.read_bytes() == written


def test_trackers_get_the_metrics(demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    flags = ["--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", 2, "--output", "runs/tracked"]
    trackers = ["--set", "report.trackers=tensorboard", "--set", "validation.every=0"]
    assert run_crepa("train", *flags, *trackers) == 0
    assert list((demo / "runs/tracked/trackers").rglob("events.out.tfevents.*"))


VARIANTS = {
    "features in every step": ["crepa.teacher_cache=false", "crepa.drop_vae_encoder=true"],
    "one feature per token": ["crepa.encoder_image_size=grid"],
    "a deeper block teaches": ["crepa.use_backbone_features=true", "crepa.teacher_block_index=9"],
    "pooled frames": ["crepa.spatial_align=false", "crepa.adjacent_distance=2", "crepa.cumulative_neighbors=true"],
    "layersync": ["layersync.enabled=true", "layersync.student_block=3", "layersync.teacher_block=9"],
    "no alignment": ["crepa.enabled=false"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_align_trains(
    variant: str, demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    sets = [word for setting in VARIANTS[variant] for word in ("--set", setting)]
    flags = ["--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", 6, "--set", "validation.every=0"]
    flags += ["--set", "crepa.warmup_steps=0", "--set", "train.batch_size=2"]
    run = demo / "runs" / variant.replace(" ", "-")
    assert run_crepa("train", *flags, *sets, "--output", run) == 0
    metrics = read_metrics(run / "metrics.jsonl")
    aligned = variant != "no alignment"
    assert all((line["crepa_similarity"] is not None) == aligned for line in metrics)
    assert all((line["layersync_loss"] is not None) == (variant == "layersync") for line in metrics)
    terms = [line["diffusion_loss"] + line["crepa_coefficient"] * (line["crepa_loss"] or 0) for line in metrics]
    terms = [term + 0.2 * (line["layersync_loss"] or 0) for term, line in zip(terms, metrics, strict=True)]
    assert [line["loss"] for line in metrics] == pytest.approx(terms, rel=1e-5)
    if aligned:
        similarities = [line["crepa_similarity"] for line in metrics]
        assert sum(similarities[-3:]) > sum(similarities[:3])
