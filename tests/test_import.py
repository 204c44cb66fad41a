"""Runs of other trainers: an import describes the same run, or is refused with the reason.

The formulas are written down here from those trainers' code (SimpleTuner's and takenoko's crepa regularizers, the CREPA
module of musubi-tuner's forks for LTX-2) as of 2026.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from crepa_cli.alignment.loss import neighbor_weights
from crepa_cli.errors import UserError
from crepa_cli.models import FAMILIES, family_defaults
from crepa_cli.models.flavours import FLAVOURS
from crepa_cli.profile import CrepaSettings, Profile
from crepa_cli.profile.alignment import ENCODERS
from crepa_cli.profile.conversion import mean_weight
from crepa_cli.profile.layers import complete
from crepa_cli.profile.project import project_settings
from crepa_cli.profile.simpletuner import Imported, export_crepa, import_config, read_config
from crepa_cli.teachers import dinov2
from crepa_cli.training.build import coefficient_schedule

LATENT_FRAMES = 21


def imported(config: dict[str, Any], frames: int = LATENT_FRAMES) -> Imported:
    return import_config(config, "config.json", FLAVOURS, lambda _: frames)


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        imported(config)
    return str(error.value)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def profile_of(tmp_path: Path) -> Callable[..., Profile]:
    """The profile of the crepa.toml that a configuration is imported to."""

    def make(config: dict[str, Any], family: str | None = None) -> Profile:
        found = imported(config).settings
        flags = {"model.family": family}
        contents = project_settings(profile=None, imported=found, flags=flags, folder=tmp_path, families=FAMILIES)
        return complete(contents, family_defaults)

    return make


WAN, KANDINSKY = "Wan-AI/Wan2", "kandinskylab/Kandinsky-5.0"
EXAMPLES: dict[str, tuple[dict[str, Any], tuple[str, str, str | None]]] = {
    "kandinsky5-video-2b-t2v.peft-lora": (
        {"model_family": "kandinsky5_video"},
        (f"{KANDINSKY}-T2V-Lite-sft-5s-Diffusers", "t2v", None),
    ),
    "ltxvideo-0.9.5-t2v.peft-lora": (
        {
            "model_family": "ltxvideo",
            "model_flavour": "0.9.5",
            "pretrained_model_name_or_path": "Lightricks/LTX-Video-0.9.5",
        },
        ("Lightricks/LTX-Video-0.9.5", "t2v", None),
    ),
    "sanavideo-2b-480p.peft-lora": (
        {
            "model_family": "sanavideo",
            "model_flavour": "2b-480p",
            "pretrained_model_name_or_path": "Efficient-Large-Model/SANA-Video_2B_480p_diffusers",
        },
        ("Efficient-Large-Model/SANA-Video_2B_480p_diffusers", "t2v", None),
    ),
    "wan-1.3b.peft-lora+TREAD": (
        {"model_family": "wan", "pretrained_model_name_or_path": f"{WAN}.1-T2V-1.3B-Diffusers"},
        (f"{WAN}.1-T2V-1.3B-Diffusers", "t2v", None),
    ),
    "wan-2.2-i2v-a14b-high.peft-lora+TREAD": (
        {"model_family": "wan", "model_flavour": "i2v-14b-2.2-high"},
        (f"{WAN}.2-I2V-A14B-Diffusers", "i2v", "high"),
    ),
    "wan-2.2-i2v-a14b-low.peft-lora+TREAD": (
        {"model_family": "wan", "model_flavour": "i2v-14b-2.2-low"},
        (f"{WAN}.2-I2V-A14B-Diffusers", "i2v", "low"),
    ),
    "wan2.1-i2v-14b-480p-8xh100.peft-lora+cp-fa3": (
        {"model_family": "wan", "model_flavour": "i2v-14b-2.1"},
        (f"{WAN}.1-I2V-14B-480P-Diffusers", "i2v", None),
    ),
    "wan2.1-i2v-14b-720p-8xh100.peft-lora+cp-fa3": (
        {"model_family": "wan", "model_flavour": "i2v-14b-2.1-720p"},
        (f"{WAN}.1-I2V-14B-720P-Diffusers", "i2v", None),
    ),
    "wan2.1-t2v-1.3b-480p-single-gpu.peft-lora+ramtorch": (
        {"model_family": "wan", "model_flavour": "t2v-480p-1.3b-2.1", "ramtorch": True},
        (f"{WAN}.1-T2V-1.3B-Diffusers", "t2v", None),
    ),
    "wan2.1-t2v-14b-480p-8xh100.peft-lora+cp-fa3": (
        {"model_family": "wan", "model_flavour": "t2v-480p-14b-2.1"},
        (f"{WAN}.1-T2V-14B-Diffusers", "t2v", None),
    ),
    "wan2.2-ti2v-5b-480p-single-gpu.peft-lora+ramtorch": (
        {"model_family": "wan", "model_flavour": "ti2v-5b-2.2"},
        (f"{WAN}.2-TI2V-5B-Diffusers", "t2v", None),
    ),
    "an LTX flavour that is not given": ({"model_family": "ltxvideo"}, ("Lightricks/LTX-Video-0.9.5", "t2v", None)),
    "Kandinsky's image to video": (
        {"model_family": "Kandinsky5-Video", "model_flavour": "I2V-Lite-5s"},
        (f"{KANDINSKY}-I2V-Lite-5s-Diffusers", "i2v", None),
    ),
    "a path of its own": (
        {"model_family": "wan", "model_flavour": "i2v-14b-2.1", "pretrained_model_name_or_path": "./mine"},
        ("./mine", "i2v", None),
    ),
}
"""What the example configurations of SimpleTuner for these families say of the model, and some that they do not."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_configuration_trains_the_same_model(name: str, profile_of: Callable[..., Profile]) -> None:
    config, (checkpoint, task, variant) = EXAMPLES[name]
    profile = profile_of({**config, "crepa_enabled": True, "crepa_block_index": 4, "crepa_similarity_threshold": 0.85})
    assert (profile.model.checkpoint, profile.model.task, profile.model.variant) == (checkpoint, task, variant)
    assert profile.crepa.enabled
    assert profile.crepa.similarity_threshold == pytest.approx(0.85 / (1 + 2 * 20 / 21 * math.exp(-1)), rel=1e-9)
    assert (profile.crepa.block_index, profile.crepa.encoder) == (4, "dinov2_vitg14")


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        ({"model_flavour": "i2v-14b-2.2-hgih"}, ["model_flavour = ", "did you mean i2v-14b-2.2-high?"]),
        ({"model_family": "ltxvideo", "model_flavour": "0.95"}, ["must be one of 0.9.5, 0.9.0; did you mean 0.9.5?"]),
        ({"model_flavour": "flf2v-14b-2.1"}, ["first and a last frame"]),
        ({"model_flavour": "vace-14b-2.1"}, ["control videos"]),
        ({"model_flavour": "animegen-t2v-low"}, ["single files"]),
        (
            {"distillation_method": "anyflow"},
            ['distillation_method = "anyflow": crepa does not train with this method'],
        ),
        ({"lora_type": "lycoris"}, ["lora_type"]),
        ({"crepa_feature_source": "self_flow"}, ["moving average of the model itself"]),
        ({"crepa_self_flow": True}, ["moving average of the model itself"]),
        ({"crepa_feature_source": "backbnoe"}, ["did you mean backbone?"]),
        ({"crepa_feature_source": "encoder", "crepa_use_backbone_features": True}, ["contradicts"]),
        ({"crepa_model": "qwen3-vl"}, ["the teachers here are DINOv2 encoders"]),
        ({"irepa_enabled": True, "irepa_projector_kernel_size": 5}, ["irepa_projector_kernel_size = 5: here it is 3"]),
        ({"model_flavour": "t2v", "crepa_self_flow": True}, ["model_flavour", "moving average"]),
    ],
)
def test_what_would_train_another_run_is_refused_with_the_reason(config: dict[str, Any], reasons: list[str]) -> None:
    message = refusal({"model_family": "wan", "crepa_enabled": True, **config})
    assert message.startswith("config.json: ")
    assert all(reason in message for reason in reasons)


@pytest.mark.parametrize("source", ["backbone", "Internal"])
def test_a_backbone_teacher_stays_one(source: str, profile_of: Callable[..., Profile]) -> None:
    config = {
        "model_family": "wan",
        "crepa_enabled": True,
        "crepa_feature_source": source,
        "crepa_spatial_align": False,
    }
    crepa = profile_of({**config, "crepa_teacher_block_index": 16}).crepa
    assert (crepa.use_backbone_features, crepa.teacher_block_index, crepa.spatial_align) == (True, 16, True)
    assert "crepa_spatial_align = false has no effect there" in imported(config).notes[0]
    with pytest.raises(UserError, match="needs crepa\\.teacher_block_index"):
        profile_of(config)
    assert not profile_of(
        {"model_family": "wan", "crepa_enabled": True, "crepa_spatial_align": False}
    ).crepa.spatial_align


@pytest.mark.parametrize("config", [{}, {"crepa_enabled": False}, {"crepa_enabled": None}, {"crepa_enabled": "false"}])
def test_crepa_is_off_unless_it_is_enabled(config: dict[str, Any], profile_of: Callable[..., Profile]) -> None:
    config = {"model_family": "wan", "crepa_similarity_threshold": 0.85, **config}
    assert not profile_of(config).crepa.enabled
    assert imported(config).notes == ["CREPA is off: crepa_enabled is not true there; see [crepa] enabled"]


def test_the_block_that_simpletuner_takes_by_default(profile_of: Callable[..., Profile]) -> None:
    assert profile_of({"model_family": "sanavideo", "crepa_enabled": True}).crepa.block_index == 8


def simpletuner_weight(step: int, total: int, config: dict[str, Any]) -> float:
    """The coefficient in SimpleTuner, but for the threshold."""
    peak, end = config.get("crepa_lambda", 0.5), config.get("crepa_lambda_end", 0.0)
    warmup, decay = config.get("crepa_warmup_steps", 0), config.get("crepa_decay_steps", 0) or total
    if 0 < config.get("crepa_cutoff_step", 0) <= step:
        return 0.0
    if step < warmup:
        return float(peak * step / warmup)
    scheduler = config.get("crepa_scheduler", "constant").lower()
    progress = min((step - warmup) / max(decay - warmup, 1), 1.0)
    curves = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "polynomial": (1 - progress) ** config.get("crepa_power", 1.0),
    }
    return float(peak if scheduler == "constant" else end + (peak - end) * curves[scheduler])


def coefficients(profile: Profile) -> list[float]:
    schedule = coefficient_schedule(profile)
    return [schedule.coefficient(step) for step in range(profile.train.steps)]


SCHEDULES = list(product(["Linear", "cosine", "POLYNOMIAL"], [0, 7, 60], [0, 5, 7, 40, 60, 90]))


def test_every_schedule_of_simpletuner_has_the_same_coefficient_at_every_step(
    profile_of: Callable[..., Profile],
) -> None:
    for scheduler, warmup, decay in SCHEDULES:
        config = {
            "model_family": "wan",
            "max_train_steps": 60,
            "crepa_enabled": True,
            "crepa_scheduler": scheduler,
            "crepa_warmup_steps": warmup,
            "crepa_decay_steps": decay,
            "crepa_cutoff_step": 50,
            "crepa_lambda_end": 0.1,
            "crepa_power": 2.0,
        }
        profile = profile_of(config)
        expected = [simpletuner_weight(step, 60, config) for step in range(60)]
        assert coefficients(profile) == pytest.approx(expected, abs=1e-12), (scheduler, warmup, decay)
        back = export_crepa(profile, {}, lambda: LATENT_FRAMES).config
        again = [simpletuner_weight(step, 60, back) for step in range(60)]
        assert again == pytest.approx(expected, abs=1e-12), (scheduler, warmup, decay)


def test_the_end_of_the_decay_is_converted_and_said() -> None:
    config = {"model_family": "wan", "crepa_enabled": True, "crepa_scheduler": "cosine", "crepa_warmup_steps": 100}
    found = imported({**config, "crepa_decay_steps": 5000})
    assert {one.key: one.value for one in found.settings}["decay_steps"] == 4900
    assert found.notes == [
        "crepa_decay_steps = 5000 becomes 4900: the decay is counted from step 0 there, and from the end of the warmup "
        "here"
    ]


def summed_weights(frames: int, distance: int, tau: float, cumulative: bool) -> float:
    """The mean over frames of the sum of weights, frame by frame."""
    total = 0.0
    for frame, other in product(range(frames), repeat=2):
        apart = abs(frame - other)
        neighbor = 0 < apart <= distance if cumulative else apart == distance > 0
        total += math.exp(-apart / tau) if neighbor else float(apart == 0)
    return total / frames


CLIPS = list(product([1, 2, 5, 16, 21, 31], [0, 1, 2, 4], [0.5, 1.0, 3.0], [False, True]))


def test_the_mean_sum_of_weights_is_that_of_the_loss() -> None:
    for clip in CLIPS:
        assert mean_weight(*clip) == pytest.approx(summed_weights(*clip), rel=1e-12)
        assert mean_weight(*clip) == pytest.approx(float(neighbor_weights(*clip).sum() / clip[0]), rel=1e-12)
    assert mean_weight(21, 1, 1.0, False) == pytest.approx(1.7007, abs=1e-4)


def test_a_threshold_survives_the_way_there_and_back(profile_of: Callable[..., Profile]) -> None:
    for threshold, distance, tau in product([0.05, 0.85, 1.0], [0, 1, 3], [0.7, 1.0]):
        config = {
            "model_family": "wan",
            "crepa_enabled": True,
            "crepa_similarity_threshold": threshold,
            "crepa_adjacent_distance": distance,
            "crepa_adjacent_tau": tau,
        }
        profile = profile_of(config)
        here = profile.crepa.similarity_threshold
        assert here == pytest.approx(threshold / summed_weights(LATENT_FRAMES, distance, tau, False), rel=1e-12)
        back = export_crepa(profile, config, lambda: LATENT_FRAMES).config
        assert profile_of(back).crepa.similarity_threshold == pytest.approx(here, abs=1e-9)
        if not back.get("crepa_normalize_neighbour_sum"):
            assert back["crepa_similarity_threshold"] == pytest.approx(threshold, abs=1e-9)


def test_a_threshold_beyond_the_other_scale_is_written_with_a_normalized_sum(
    profile_of: Callable[..., Profile],
) -> None:
    profile = profile_of({"model_family": "wan", "crepa_enabled": True})
    crepa = profile.crepa.model_copy(update={"similarity_threshold": 0.9, "lambda_": 0.3})
    written = export_crepa(profile.model_copy(update={"crepa": crepa}), {}, lambda: LATENT_FRAMES).config
    assert written["crepa_normalize_neighbour_sum"] is True
    assert written["crepa_similarity_threshold"] == 0.9
    again = profile_of({"model_family": "wan", **written}).crepa
    assert again.similarity_threshold == 0.9
    assert again.lambda_ == pytest.approx(0.3, rel=1e-12)


def test_a_normalized_sum_converts_the_strength_over_the_whole_run(profile_of: Callable[..., Profile]) -> None:
    config = {
        "model_family": "wan",
        "max_train_steps": 60,
        "crepa_enabled": True,
        "crepa_normalize_neighbour_sum": True,
        "crepa_scheduler": "cosine",
        "crepa_lambda": 0.4,
        "crepa_lambda_end": 0.1,
        "crepa_warmup_steps": 10,
        "crepa_adjacent_distance": 2,
        "crepa_similarity_threshold": 0.85,
    }
    profile = profile_of(config)
    weight = summed_weights(LATENT_FRAMES, 2, 1.0, False)
    expected = [simpletuner_weight(step, 60, config) / weight for step in range(60)]
    assert coefficients(profile) == pytest.approx(expected, abs=1e-12)
    assert profile.crepa.similarity_threshold == 0.85


def test_a_distance_beyond_the_clip_is_cut_as_it_is_there() -> None:
    config = {"model_family": "wan", "crepa_enabled": True, "crepa_adjacent_distance": 9}
    found = imported(config, frames=5)
    assert {one.key: one.value for one in found.settings}["adjacent_distance"] == 4
    assert "crepa_adjacent_distance = 9 is 4" in found.notes[0]
    assert imported(config).notes == []


def musubi_weight(step: int, arguments: dict[str, Any]) -> float:
    """The coefficient in musubi-tuner's forks."""
    peak, warmup, last = arguments["lambda_crepa"], arguments.get("warmup_steps", 0), arguments["max_steps"]
    schedule = arguments.get("schedule", "constant").lower()
    if schedule == "constant":
        return float(peak)
    if step < warmup:
        return float(peak * step / warmup)
    if last <= 0:
        return float(peak)
    progress = min((step - warmup) / max(last - warmup, 1), 1.0)
    return float(peak * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2))


def musubi_loss(similarity: torch.Tensor, neighbors: int, tau: float) -> float:
    """The loss in musubi-tuner's forks of the similarities of every frame with every frame's features `[T, T]`."""
    frames, loss, terms = len(similarity), 0.0, 0
    for frame in range(frames):
        for other in range(max(0, frame - neighbors), min(frames, frame + neighbors + 1)):
            loss -= math.exp(-abs(frame - other) / tau) * float(similarity[frame, other])
            terms += 1
    return loss / max(terms / frames, 1.0)


@pytest.mark.parametrize("schedule", ["constant", "Linear", "cosine"])
@pytest.mark.parametrize("in_one_text", [False, True])
def test_the_alignment_of_musubi_weighs_the_same_at_every_step(
    schedule: str, in_one_text: bool, profile_of: Callable[..., Profile]
) -> None:
    similarity = torch.rand(LATENT_FRAMES, LATENT_FRAMES, generator=torch.Generator().manual_seed(0)).double()
    for warmup, last in product([0, 7], [None, 0, 5, 40]):
        arguments: dict[str, Any] = {"lambda_crepa": 0.1, "schedule": schedule, "warmup_steps": warmup}
        arguments |= {} if last is None else {"max_steps": last}
        texts = [f"{name}={value}" for name, value in arguments.items()]
        config = {"crepa": True, "crepa_args": " ".join(texts) if in_one_text else texts, "max_train_steps": 60}
        profile = profile_of(config, family="wan")
        crepa = profile.crepa
        assert (crepa.use_backbone_features, crepa.block_index, crepa.teacher_block_index) == (True, 16, 32)
        weights = neighbor_weights(
            LATENT_FRAMES, crepa.adjacent_distance, crepa.adjacent_tau, crepa.cumulative_neighbors
        )
        ours = -float((weights * similarity).sum()) / LATENT_FRAMES
        theirs = musubi_loss(similarity, 2, 1.0)
        expected = [musubi_weight(step, {"max_steps": 60, **arguments}) * theirs / ours for step in range(60)]
        assert coefficients(profile) == pytest.approx(expected, abs=1e-12), (warmup, last)


def test_a_lambda_of_musubi_at_21_latent_frames(profile_of: Callable[..., Profile]) -> None:
    config = {
        "crepa": True,
        "crepa_args": ["mode=dino", "similarity_threshold=0.6", "crepa_threshold_mode=Recoverable"],
    }
    crepa = profile_of(config, family="wan").crepa
    assert crepa.lambda_ == pytest.approx(0.446, abs=1e-3)
    assert (crepa.encoder, crepa.spatial_align, crepa.adjacent_distance) == ("dinov2_vitb14", True, 2)
    assert (crepa.similarity_threshold, crepa.threshold_mode) == (0.6, "recoverable")
    assert "lambda_crepa = 0.1 becomes 0.4455" in imported(config).notes[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["lamda_crepa=0.1"], "did you mean lambda_crepa?"),
        (["mode=clip"], "must be one of backbone, dino"),
        (["normalize=false"], "unit vectors"),
        (["tau"], "crepa_args"),
    ],
)
def test_arguments_of_musubi_without_a_counterpart_are_refused(arguments: list[str], reason: str) -> None:
    assert reason in refusal({"crepa": True, "crepa_args": arguments})


def test_a_configuration_of_takenoko_in_toml(profile_of: Callable[..., Profile]) -> None:
    text = """
    learning_rate = 2e-5
    crepa_enabled = true
    crepa_block_index = 6
    crepa_adjacency = 2
    crepa_temperature = 3.0
    crepa_lambda = 0.25
    crepa_encoder = "dinov2-vitb14"
    crepa_encoder_frame_chunk_size = 8
    [network]
    network_dim = 24
    """
    config = read_config(text, "takenoko.toml")
    profile = profile_of(config, family="wan")
    crepa = profile.crepa
    assert (crepa.adjacent_distance, crepa.adjacent_tau, crepa.block_index) == (2, 3.0, 6)
    assert (crepa.encoder, profile.adapter.rank, profile.train.learning_rate) == ("dinov2_vitb14", 24, 2e-5)
    assert set(coefficients(profile)) == {0.25}
    assert imported(config).without_counterpart == {}
    newer = imported({**config, "crepa_adjacent_distance": 1})
    assert {one.key: one.value for one in newer.settings}["adjacent_distance"] == 1
    assert newer.without_counterpart == {"crepa_adjacency": 2}


def test_values_that_change_nothing_are_not_listed_as_lost() -> None:
    nothing = {
        "crepa_use_tae": False,
        "crepa_self_flow": False,
        "crepa_self_flow_mask_ratio": 0.1,
        "crepa_encoder_frames_batch_size": 4,
        "crepa_normalize_neighbour_sum": False,
        "irepa_enabled": "false",
        "base_model_precision": "no_change",
        "lora_type": "standard",
        "vae_enable_tiling": True,
        "ramtorch_target_modules": "blocks.*",
        "validation_negative_prompt": "",
    }
    changes = {"crepa_use_tae": True, "base_model_precision": "int8-torchao"}
    assert imported({"model_family": "wan", **nothing}).without_counterpart == {}
    assert imported({"model_family": "wan", **nothing, **changes}).without_counterpart == changes


def test_gradients_clipped_by_value_are_not_clipped_by_norm_here() -> None:
    found = imported({"model_family": "wan", "max_grad_norm": 0.1})
    assert "max_grad_norm" not in {one.key for one in found.settings}
    assert found.notes[0].startswith("max_grad_norm = 0.1 bounds each value of a gradient there")
    by_norm = imported({"model_family": "wan", "max_grad_norm": 0.1, "grad_clip_method": "norm"})
    assert {one.key: one.value for one in by_norm.settings}["max_grad_norm"] == 0.1


SIMPLETUNER_OPTIONS = """
    enabled block_index lambda adjacent_distance adjacent_tau encoder encoder_frames_batch_size use_backbone_features
    feature_source self_flow teacher_block_index self_flow_mask_ratio encoder_image_size drop_vae_encoder
    normalize_by_frames normalize_neighbour_sum spatial_align use_tae scheduler warmup_steps decay_steps lambda_end
    power cutoff_step similarity_threshold similarity_ema_decay threshold_mode
"""
"""The options of SimpleTuner's command line that start with `crepa_`; it refuses any other."""


def test_only_options_of_the_command_line_are_written(profile_of: Callable[..., Profile]) -> None:
    profile = profile_of({"model_family": "wan", "crepa_enabled": True})
    changes = {"cumulative_neighbors": True, "adjacent_distance": 2, "encoder_image_size": "grid", "encoder": "a/b"}
    changes |= {"warmup_steps": "5%", "cutoff_step": "40%", "teacher_cache": False}
    changed = profile.model_copy(update={"crepa": profile.crepa.model_copy(update=changes)})
    old = {"crepa_teacher_cache": True, "crepa_cumulative_neighbors": True, "crepa_feature_source": "backbone"}
    written, notes = export_crepa(changed, old, lambda: LATENT_FRAMES)
    assert {name.removeprefix("crepa_") for name in written} <= set(SIMPLETUNER_OPTIONS.split())
    assert (written["crepa_warmup_steps"], written["crepa_cutoff_step"]) == (100, 800)
    assert written["crepa_feature_source"] == "encoder"
    lost = [note.split(" = ")[0] for note in notes if "no counterpart" in note]
    assert lost == ["crepa.cumulative_neighbors", "crepa.encoder_image_size", "crepa.encoder"]
    json.dumps(written)


@pytest.mark.parametrize(
    ("given", "name"),
    [("dinov2-vitg14", "dinov2_vitg14"), ("dino_v2_s", "dinov2_vits14"), ("DINOv2_vitl14_reg", "dinov2_vitl14_reg")],
)
def test_the_names_that_other_trainers_give_encoders_are_understood(given: str, name: str) -> None:
    assert CrepaSettings(block_index=8, encoder=given).encoder == name


def test_irepa_goes_there_and_back_and_half_of_it_is_named(profile_of: Callable[..., Profile]) -> None:
    config = {"model_family": "wan", "crepa_enabled": True, "irepa_enabled": True}
    assert profile_of(config).crepa.spatial_norm == 0.6
    profile = profile_of({**config, "irepa_spatial_norm_alpha": 1, "irepa_projector_kernel_size": 3})
    assert (profile.crepa.projector, profile.crepa.spatial_norm) == ("conv", 1.0)
    back, notes = export_crepa(profile, {}, lambda: LATENT_FRAMES)
    assert (back["irepa_enabled"], back["irepa_spatial_norm_alpha"], back["irepa_projector_kernel_size"]) == (
        True,
        1,
        3,
    )
    assert notes == []
    half = profile.crepa.model_copy(update={"spatial_norm": None, "objective": "relation", "similarity_threshold": 0.5})
    back, notes = export_crepa(profile.model_copy(update={"crepa": half}), back, lambda: LATENT_FRAMES)
    assert back["irepa_enabled"] is False
    lost = ['crepa.objective = "relation"', 'crepa.projector = "conv"', "crepa.similarity_threshold = 0.5"]
    assert [note.split(" has no ")[0] for note in notes] == lost
    assert back.get("crepa_similarity_threshold") is None


def test_an_unknown_encoder_is_refused_with_the_one_that_was_probably_meant(
    profile_of: Callable[..., Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"model_family": "wan", "crepa_enabled": True, "crepa_encoder": "dinov2_vitq14"}
    with pytest.raises(UserError, match="or a local folder; did you mean dinov2_vit"):
        profile_of(config)
    assert profile_of({**config, "crepa_enabled": False}).crepa.encoder == "dinov2_vitq14"
    (tmp_path / "dinov2_vitq14").mkdir()
    assert profile_of(config).crepa.encoder == "dinov2_vitq14"
    assert set(ENCODERS) == set(dinov2.ENCODERS)
