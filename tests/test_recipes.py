"""The recipes: what `resolve` gives for each published checkpoint, held against what its authors publish."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import OpenTiny

from crepa_cli.hub.messages import PUBLISHED
from crepa_cli.models import load_family
from crepa_cli.profile import Profile, dump_toml
from crepa_cli.settings import resolve
from crepa_cli.training.flow import sample_sigmas


@dataclass(frozen=True)
class Recipe:
    """The published recipe of a checkpoint.

    `shift` is that of the noise levels; None if the scheduler's file or the size of the clip gives it. The learning
    rates are those of a LoRA and of full fine-tuning.
    """

    learning_rates: tuple[float, float]
    size: tuple[int, int]
    frames: int
    fps: float
    shift: float | None
    caption: int
    source: str


WAN_LORA_AND_FULL = "DiffSynth-Studio: examples/wanvideo/model_training"
WAN = "Wan2.1: wan/configs, 3.0 at 480p: diffusers pipeline_wan.py; " + WAN_LORA_AND_FULL
WAN22 = "Wan2.2: wan/configs; " + WAN_LORA_AND_FULL
LTX = "LTX-Video: model card, inference.py, pipeline_ltx_video.py; LTX-Video-Trainer: configs/ltxv_2b_{lora,full}.yaml"
LTX2 = "LTX-2: packages/ltx-trainer/{configs/t2v_lora.yaml,docs/quick-start.md,docs/configuration-reference.md}"
SANA = "Sana: configs/sana_video_config/Sana_2000M_{480px,720px_ltx2vae}_AdamW_fsdp.yaml"
KANDINSKY6 = "model cards (size, length, frame rate); kandinsky-6: text_embedder.py; musubi-tuner: docs/kandinsky6.md"
KANDINSKY = "kandinsky-5: configs/, t2v_pipeline.py; diffusers docs; musubi-tuner: docs/kandinsky5.md"
WAN_RATES, LTX_RATES, SANA_RATES, KANDINSKY_RATES = (1e-4, 1e-5), (2e-4, 1e-5), (1e-4, 5e-5), (1e-4, 1e-5)
LTX2_RATES = (1e-4, 1e-5)

RECIPES = {
    ("wan", "t2v", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"): Recipe(WAN_RATES, (832, 480), 81, 16, 3, 512, WAN),
    ("wan", "t2v", "Wan-AI/Wan2.1-T2V-14B-Diffusers"): Recipe(WAN_RATES, (832, 480), 81, 16, 3, 512, WAN),
    ("wan", "i2v", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"): Recipe(WAN_RATES, (832, 480), 81, 16, 3, 512, WAN),
    ("wan", "i2v", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"): Recipe(WAN_RATES, (1280, 720), 81, 16, 5, 512, WAN),
    ("wan", "t2v", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"): Recipe(WAN_RATES, (832, 480), 81, 16, 12, 512, WAN22),
    ("wan", "i2v", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"): Recipe(WAN_RATES, (832, 480), 81, 16, 5, 512, WAN22),
    ("wan", "t2v", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"): Recipe(WAN_RATES, (1280, 704), 121, 24, 5, 512, WAN22),
    ("ltxvideo", "t2v", "Lightricks/LTX-Video"): Recipe(LTX_RATES, (768, 512), 121, 30, None, 256, LTX),
    ("ltxvideo", "t2v", "Lightricks/LTX-Video-0.9.1"): Recipe(LTX_RATES, (768, 512), 121, 30, None, 256, LTX),
    ("ltxvideo", "t2v", "Lightricks/LTX-Video-0.9.5"): Recipe(LTX_RATES, (768, 512), 121, 30, None, 256, LTX),
    ("ltxvideo", "i2v", "Lightricks/LTX-Video-0.9.7-dev"): Recipe(LTX_RATES, (768, 512), 121, 30, None, 256, LTX),
    ("ltx2", "t2v", "Lightricks/LTX-2"): Recipe(LTX2_RATES, (960, 544), 49, 24, None, 1024, LTX2),
    ("ltx2", "i2v", "diffusers/LTX-2.3-Diffusers"): Recipe(LTX2_RATES, (960, 544), 49, 24, None, 1024, LTX2),
    ("ltx2", "t2v", "Lightricks/LTX-2.5-Diffusers"): Recipe(LTX2_RATES, (960, 544), 49, 24, None, 1024, LTX2),
    ("sanavideo", "t2v", "Efficient-Large-Model/SANA-Video_2B_480p_diffusers"): Recipe(
        SANA_RATES, (832, 480), 81, 16, 3, 300, SANA
    ),
    ("sanavideo", "t2v", "Efficient-Large-Model/SANA-Video_2B_720p_diffusers"): Recipe(
        SANA_RATES, (1280, 704), 81, 16, 3, 300, SANA
    ),
}
LITE, PRO = (768, 512), (1280, 768)
KANDINSKY_SIZES = {
    "T2V-Lite-sft-5s": (LITE, 121),
    "T2V-Lite-pretrain-5s": (LITE, 121),
    "T2V-Lite-sft-10s": (LITE, 241),
    "T2V-Lite-pretrain-10s": (LITE, 241),
    "I2V-Lite-5s": (LITE, 121),
    "T2V-Pro-sft-5s": (PRO, 121),
    "T2V-Pro-pretrain-5s": (PRO, 121),
    "T2V-Pro-sft-10s": (PRO, 241),
    "T2V-Pro-pretrain-10s": (PRO, 241),
    "I2V-Pro-sft-5s": (PRO, 121),
}
RECIPES |= {
    ("kandinsky5_video", name[:3].lower(), f"kandinskylab/Kandinsky-5.0-{name}-Diffusers"): Recipe(
        KANDINSKY_RATES, size, frames, 24, None, 512, KANDINSKY
    )
    for name, (size, frames) in KANDINSKY_SIZES.items()
}
RECIPES |= {
    ("kandinsky6", task, f"kandinskylab/Kandinsky-6.0-{name}-5s-Diffusers"): Recipe(
        KANDINSKY_RATES, (864, 480), 121, 24, None, 1024, KANDINSKY6
    )
    for task, name in [("t2v", "Lite"), ("t2v", "Lite-pretrain"), ("i2v", "Pro"), ("t2v", "Pro-pretrain")]
}
COG = "CogVideo: finetune/schemas/args.py, finetune/README.md (sizes, lengths), README.md (frame rates)"
COG_SIZES = {
    ("t2v", "CogVideoX-2b"): ((720, 480), 49, 8),
    ("t2v", "CogVideoX-5b"): ((720, 480), 49, 8),
    ("i2v", "CogVideoX-5b-I2V"): ((720, 480), 49, 8),
    ("t2v", "CogVideoX1.5-5B"): ((1360, 768), 81, 16),
    ("i2v", "CogVideoX1.5-5B-I2V"): ((1360, 768), 81, 16),
}
RECIPES |= {
    ("cogvideox", task, f"zai-org/{name}"): Recipe((2e-5, 2e-5), size, frames, fps, None, 226, COG)
    for (task, name), (size, frames, fps) in COG_SIZES.items()
}
HUNYUAN15 = "HunyuanVideo-1.5: train.py (shift, sizes, lengths), README.md (learning rates, frame rate)"
RECIPES |= {
    ("hunyuanvideo15", task, f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{size}p_{task}"): Recipe(
        (1e-4, 1e-5), (width, size), 121, 24, 3, 1000, HUNYUAN15
    )
    for task in ("t2v", "i2v")
    for width, size in ((848, 480), (1280, 720))
}
HUNYUAN = (
    "HunyuanVideo-I2V: scripts/run_train_image2video_lora.sh (rate, shift, length), hyvae_extract/README.md (360p); "
    "HunyuanVideo: sample_video.py (frame rate), hyvideo/config.py (captions); the rate of all weights is that of 1.5"
)
RECIPES["hunyuanvideo", "t2v", "hunyuanvideo-community/HunyuanVideo"] = Recipe(
    (1e-4, 1e-5), (640, 352), 129, 24, 7, 256, HUNYUAN
)


def recipe(family: str, task: str, checkpoint: str | None, *sets: str) -> Profile:
    flags = {"model.family": family, "model.task": task, "model.checkpoint": checkpoint}
    return resolve(None, flags, sets).profile


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No recipe of a published checkpoint needs the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("family", "task", "checkpoint"), RECIPES)
def test_a_published_checkpoint_is_trained_as_its_authors_train_it(family: str, task: str, checkpoint: str) -> None:
    expected = RECIPES[family, task, checkpoint]
    lora = recipe(family, task, checkpoint)
    full = recipe(family, task, checkpoint, "adapter.kind=full")
    assert (lora.train.learning_rate, full.train.learning_rate) == expected.learning_rates
    for profile in (lora, full):
        data = profile.data
        assert ((data.width, data.height), data.frames, data.fps) == (expected.size, expected.frames, expected.fps)
        assert profile.train.timestep_shift == expected.shift
    if (PUBLISHED / checkpoint).is_dir():
        opened = load_family(family)(checkpoint, task)
        with torch.device("meta"):
            assert len(opened.longest_prompt(torch.float32)["prompt_embeds"]) == expected.caption
        assert data.width % opened.size_multiple == data.height % opened.size_multiple == 0
        assert data.frames % opened.frame_multiple == 1


def test_the_table_has_every_published_checkpoint() -> None:
    listed = {(family, name) for family, _, name in RECIPES}
    known = {(name, one) for name in {family for family, _, _ in RECIPES} for one in load_family(name).published}
    assert listed == known
    assert all(set(load_family(name).checkpoints.values()) <= {one for _, one in listed} for name, _ in listed)


@pytest.mark.parametrize(
    ("family", "scheduler", "warmup", "clipping", "decay"),
    [
        ("wan", "constant", 0, 1.0, 0.01),
        ("ltxvideo", "linear", 0, 1.0, 0.01),
        ("ltx2", "linear", 0, 1.0, 0.01),
        ("sanavideo", "constant_with_warmup", 500, 0.1, 0.0),
        ("cogvideox", "constant_with_warmup", 100, 1.0, 1e-4),
    ],
)
def test_full_fine_tuning_warms_up_clips_and_decays_as_published(
    family: str, scheduler: str, warmup: int, clipping: float, decay: float
) -> None:
    """The sources are those of the table; DiffSynth-Studio clips nothing for Wan, and 1.0 stays as a guard."""
    train = recipe(family, "t2v", None, "adapter.kind=full").train
    assert (train.lr_scheduler, train.lr_warmup_steps) == (scheduler, warmup)
    assert (train.max_grad_norm, train.weight_decay) == (clipping, decay)
    lora = recipe(family, "t2v", None).train
    assert (lora.lr_scheduler, lora.lr_warmup_steps) == ("constant", 0)


@pytest.mark.parametrize(
    ("family", "part", "configuration", "published"),
    [
        ("wan", "model_index.json", {"expand_timesteps": True}, "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        ("wan", "model_index.json", {"boundary_ratio": 0.875}, "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        ("wan", "model_index.json", {}, None),
        (
            "sanavideo",
            "vae/config.json",
            {"_class_name": "AutoencoderKLLTX2Video"},
            "Efficient-Large-Model/SANA-Video_2B_720p_diffusers",
        ),
        (
            "kandinsky5_video",
            "transformer/config.json",
            {"attention_type": "nabla"},
            "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s-Diffusers",
        ),
        (
            "kandinsky5_video",
            "transformer/config.json",
            {"model_dim": 4096},
            "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers",
        ),
        (
            "hunyuanvideo15",
            "transformer/config.json",
            {"target_size": 960},
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
        ),
        ("cogvideox", "transformer/config.json", {"patch_size_t": 2}, "zai-org/CogVideoX1.5-5B"),
        ("cogvideox", "transformer/config.json", {"num_layers": 30}, "zai-org/CogVideoX-2b"),
    ],
)
def test_a_fine_tune_is_trained_like_the_checkpoint_that_its_configuration_resembles(
    family: str, part: str, configuration: dict[str, object], published: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "mine" / part
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(configuration))
    found, expected = recipe(family, "t2v", "mine"), recipe(family, "t2v", published)
    assert found.data == expected.data
    if published is not None:
        assert found.train == expected.train


def test_what_the_user_sets_wins() -> None:
    sets = ["data.fps=12", "data.width=640", "train.timestep_shift=4", "train.learning_rate=3e-5"]
    profile = recipe("wan", "t2v", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "adapter.kind=full", *sets)
    assert (profile.data.fps, profile.data.width) == (12, 640)
    assert (profile.train.timestep_shift, profile.train.learning_rate) == (4, 3e-5)


def test_a_run_made_before_keeps_its_recipe(tmp_path: Path) -> None:
    """Earlier versions stored every setting but those that were none, such as the shift of A14B."""
    before = {"train.timestep_sampling=logit_normal", "train.timestep_shift=none", "data.fps=25", "data.frames=97"}
    for family, checkpoint in [("ltxvideo", "Lightricks/LTX-Video"), ("wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers")]:
        stored = recipe(family, "t2v", checkpoint, *before)
        (tmp_path / "profile.toml").write_text(dump_toml(stored))
        assert resolve("profile.toml").profile == stored


def test_an_expert_of_wan_is_sampled_with_the_published_shift(open_tiny: OpenTiny, tmp_path: Path) -> None:
    shutil.copytree(open_tiny("wan", "t2v").base.name, tmp_path / "moe")
    shutil.copytree(tmp_path / "moe" / "transformer", tmp_path / "moe" / "transformer_2")
    index = tmp_path / "moe" / "model_index.json"
    experts = {"boundary_ratio": 0.875, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | experts))
    family = load_family("wan")(str(tmp_path / "moe"), "t2v", variant="low")
    pipeline = family.load_sampling_pipeline(family.load_transformer(torch.float32))
    pipeline.scheduler.set_timesteps(10)
    u = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    expected = 12 * u / (1 + 11 * u)
    torch.testing.assert_close(pipeline.scheduler.sigmas[:10].double(), expected, atol=0.02, rtol=0)


def ltx2_levels(count: int, mu: float) -> torch.Tensor:
    """Noise levels drawn as the documentation of LTX-2's trainer describes it."""
    generator = torch.Generator().manual_seed(7)
    normal, uniform, choice = (
        torch.randn(count, generator=generator, dtype=torch.float64),
        torch.rand(count, generator=generator, dtype=torch.float64),
        torch.rand(count, generator=generator, dtype=torch.float64),
    )
    lowest, highest = (torch.tensor(mu + z, dtype=torch.float64).sigmoid() for z in (-2.5758, 3.0902))
    stretched = ((mu + normal).sigmoid() - lowest) / (highest - lowest)
    return torch.where(choice < 0.1, uniform, stretched.abs().clamp(0, 1))


@pytest.mark.parametrize(("width", "height"), [(768, 512), (1216, 704)])
def test_long_clips_of_ltx_are_trained_at_low_noise_too(width: int, height: int) -> None:
    """As LTX-2's trainer draws levels: at least 5 % below 0.5 at 1216x704x121, where the shift alone left none."""
    family = load_family("ltxvideo")("Lightricks/LTX-Video-0.9.5", "t2v")
    shift = family.timestep_shift(torch.empty(1, 128, 16, height // 32, width // 32, device="meta"))
    sampling = recipe("ltxvideo", "t2v", None).train.timestep_sampling
    drawn = sample_sigmas(100_000, sampling, shift, torch.Generator().manual_seed(0))
    assert (drawn < 0.5).float().mean() > 0.05
    assert 0 <= drawn.min() < 0.01
    assert 0.99 < drawn.max() <= 1
    quantiles = torch.linspace(0.02, 0.98, 25)
    expected = ltx2_levels(100_000, math.log(shift)).float().quantile(quantiles)
    torch.testing.assert_close(drawn.quantile(quantiles), expected, atol=0.02, rtol=0)
