"""The cheapest settings that fit a GPU: the search, `crepa doctor --fit`, and training under the limit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import psutil
import pytest
import torch
from conftest import OpenTiny, RunCrepa
from steps import Plan, measure

from crepa_cli.data.buckets import Bucket
from crepa_cli.doctor.findings import BucketCount
from crepa_cli.doctor.findings import Plan as DoctorPlan
from crepa_cli.doctor.fit import Target, _check_host, check_fit
from crepa_cli.memory.fit import INT8, TILING, VAE_BFLOAT16, Fit, Work, _cheapest_first, cheapest_fit, lightest
from crepa_cli.memory.prediction import pinned_memory, predict, preparation_memory, training_memory, validation_memory
from crepa_cli.memory.savings import Setting, lossless_settings, with_setting, with_settings
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.profile.files import parse_toml
from crepa_cli.runs.checks import configured, memory_mistakes, open_family
from crepa_cli.settings import resolve

GPU = torch.device("cuda")
CHECKPOINTING = Setting("train", "activation_checkpointing", True)
OFFLOADING = Setting("memory", "offload_activations", True)
FINER = Setting("memory", "finer_recompute", True)
STREAMING = Setting("memory", "stream_weights", True)
PEAK_OF_WAN_14B = 56.4e9
"""Predicted bytes of training it at 832x480 with 81 frames, without settings that save memory (docs/memory.md)."""
HEAVY = {"train": {"batch_size": 16, "activation_checkpointing": False}}


@pytest.fixture
def plan(open_tiny: OpenTiny, tiny_dinov2: Path, tmp_path: Path) -> Plan:
    """LTX-Video with two blocks and a batch that takes far more than the preparation."""
    shutil.copytree(open_tiny("ltxvideo", "t2v").base.name, tmp_path / "ltxvideo-t2v")
    shutil.copytree(tiny_dinov2, tmp_path / "dinov2")
    bench = gpu.Bench(torch.device("cpu"), tmp_path, tmp_path)
    return bench.plan("ltxvideo", "", HEAVY, blocks=2)


def opened(plan: Plan) -> tuple[Profile, Family, Bucket]:
    profile = plan.profile()
    family = plan.open_family(profile, torch.device("cpu"))
    return profile, family, form_bucket(profile, family)


def test_what_is_kept_for_speed_is_given_up_for_memory(plan: Plan) -> None:
    kept = with_settings(plan.profile(), [CHECKPOINTING, Setting("memory", "keep", "all")])
    fitted = lightest(kept, GPU)
    assert fitted.memory.keep == "nothing"
    assert fitted.memory.stream_weights
    assert fitted.memory.offload_activations


@pytest.mark.slow
def test_the_cheapest_of_all_combinations_that_fit_is_chosen(plan: Plan) -> None:
    """Held against every combination there is, of a profile that has some of the settings already."""
    profile, family, bucket = opened(plan)
    profile = with_settings(profile, [FINER, INT8])
    combinations = [
        [],
        [CHECKPOINTING],
        [CHECKPOINTING, OFFLOADING],
        [CHECKPOINTING, STREAMING],
        [CHECKPOINTING, OFFLOADING, STREAMING],
    ]
    work = Work.of(profile, family, bucket)
    found = [with_settings(profile, one) for one in combinations]
    peaks = [sum(training_memory(one, family, bucket, GPU).values()) for one in found]
    assert min(peaks) > max(preparation_memory(profile, family, bucket, GPU).values())
    seconds = [work.seconds(one) for one in found]
    assert min(seconds) == seconds[0]
    for limit in [*peaks, min(peaks) - 1]:
        fit = cheapest_fit(profile, family, bucket, GPU, limit)
        fitting = [one for one, peak in zip(seconds, peaks, strict=True) if peak <= limit]
        assert (fit is None) == (not fitting)
        if fit is not None:
            assert fit.peak == peaks[combinations.index(list(fit.settings))] <= limit
            assert fit.slowdown == pytest.approx(min(fitting) / seconds[0], rel=0.02)
            assert fit.profile == with_settings(profile, fit.settings)
    assert lightest(profile, GPU) == found[-1]


def test_recomputation_and_copies_cost_what_their_flops_and_bytes_take(plan: Plan) -> None:
    profile = plan.profile()
    recomputing = with_setting(profile, *CHECKPOINTING)
    both = with_settings(recomputing, [OFFLOADING, STREAMING])
    # Hidden by the computation, and ten times too slow for it.
    hidden, slow = Work(80e12, weights=10**9, states=10**9), Work(80e12, weights=10**9, states=10 * 20 * 10**9)
    assert [hidden.seconds(one) for one in (profile, recomputing, both)] == [2, 3, 3]
    assert slow.seconds(both) == 10 + 10.05
    assert hidden.seconds(with_setting(both, *FINER)) == 4
    assert slow.seconds(with_setting(both, *INT8)) == 10 + 10.025
    full = with_setting(recomputing, "adapter", "kind", "full")
    assert hidden.seconds(full) == 4


def test_what_costs_less_is_tried_first_and_int8_last(plan: Plan) -> None:
    profile = plan.profile()
    order = _cheapest_first(profile, GPU, Work(80e12, weights=10**9, states=10**9))
    assert len(order) == len(set(order)) == 20
    assert [INT8 in one for one in order] == [False] * 10 + [True] * 10
    assert order[:3] == [(), (CHECKPOINTING,), (FINER,)]
    assert order[9] == (CHECKPOINTING, OFFLOADING, STREAMING, FINER)


def test_nothing_that_is_invalid_is_tried(plan: Plan) -> None:
    """Full tuning cannot stream, and the CPU has no other memory to move anything to."""
    profile = plan.profile()
    for tried in (with_setting(profile, "adapter", "kind", "full"), with_setting(profile, "train", "sharding", True)):
        assert not memory_mistakes(lightest(tried, GPU))
        assert not lightest(tried, GPU).memory.stream_weights
        assert lightest(tried, GPU).memory.offload_activations
    assert lossless_settings(profile, torch.device("cpu")) == [CHECKPOINTING, FINER]


def test_tiles_and_then_bfloat16_are_added_for_the_vae(plan: Plan) -> None:
    profile, family, _ = opened(plan)
    light = lightest(with_setting(profile, "train", "batch_size", 1), GPU)
    bucket = Bucket(1, 544, 544)
    tiled, both = [TILING], [TILING, VAE_BFLOAT16]
    peaks = [vae_memory(light, family, bucket, changed) for changed in ([], tiled, both)]
    assert peaks[0] > peaks[1] > peaks[2] > sum(training_memory(light, family, bucket, GPU).values())
    for limit, addition in (peaks[1], tiled), (peaks[2], both):
        fit = cheapest_fit(light, family, bucket, GPU, limit)
        assert fit is not None
        settings = {one.name: one.value for one in addition}
        assert fit.to_json() == {"settings": settings, "peak_bytes": limit, "limit_bytes": limit}
        assert ("latents are rounded to bfloat16" in fit.price) == (addition == both)


def vae_memory(profile: Profile, family: Family, bucket: Bucket, changed: list[Setting]) -> int:
    """The peak of the preparation under other settings of the VAE."""
    profile = with_settings(profile, changed)
    return max(preparation_memory(profile, configured(family, profile), bucket, GPU).values())


@pytest.mark.slow
def test_validations_are_turned_off_only_if_nothing_else_makes_them_fit(plan: Plan) -> None:
    profile, family, bucket = opened(plan)
    light = lightest(
        with_settings(profile, [Setting("validation", "every", 5), Setting("validation", "frames", 65)]), GPU
    )
    without = with_setting(light, "validation", "every", 0)
    training = sum(training_memory(light, family, bucket, GPU).values())
    assert training < validation_memory(light, family, GPU) < 10 * training
    tiled = configured(family, with_setting(without, "model", "vae_tiling", True))
    assert validation_memory(with_setting(light, "model", "vae_tiling", True), tiled, GPU) > training
    limit = validation_memory(light, family, GPU)
    with_validations = cheapest_fit(light, family, bucket, GPU, limit)
    assert with_validations is not None
    assert with_validations.settings == []
    assert with_validations.peak == predict(light, family, bucket, GPU).peak == limit, "of all phases"
    fit = cheapest_fit(light, family, bucket, GPU, training)
    assert fit is not None
    assert fit.profile == without


class Found:
    """Stands in for the search, which has its own tests and takes seconds."""

    fit: Fit | None = None

    def __call__(self, plan: DoctorPlan, _family: Family, profile: Profile, target: Target, _report: Any) -> None:
        """Find the same settings for every GPU of 10 GB and more."""
        assert target.device.type == "cuda"
        assert target.free is not None
        settings = [STREAMING, Setting("model", "vae_tiling", True)]
        if target.free >= 10 * 10**9:
            plan.fit = Fit(settings, 9 * 10**9, target.free, 1.1, with_settings(profile, settings))


@pytest.fixture
def project(open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a crepa.toml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("crepa_cli.doctor.plan.check_fit", Found())
    checkpoint = open_tiny("ltxvideo", "t2v").base.name
    model = f"[model] # the model\nfamily = 'ltxvideo'\ncheckpoint = '{checkpoint}'\n"
    text = f"# mine\npreset = 't2v'\n{model}\n[crepa]\nlambda = 0.3 # low\n"
    (tmp_path / "crepa.toml").write_text(text, encoding="utf-8")
    return tmp_path / "crepa.toml"


def test_doctor_prints_the_settings_as_json_and_writes_them(
    project: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    before = project.read_text(encoding="utf-8")
    flags = "doctor", "--set", "crepa.enabled=false", "--json", "--fit"
    run_crepa(*flags, "5", "--write")
    assert json.loads(capsys.readouterr().out)["fit"] is None
    run_crepa(*flags, "10")
    printed = json.loads(capsys.readouterr().out)
    settings = {"memory.stream_weights": True, "model.vae_tiling": True}
    assert printed["fit"] == {"settings": settings, "peak_bytes": 9 * 10**9, "limit_bytes": 10**10}
    assert "fit" not in printed["plan"]
    assert project.read_text(encoding="utf-8") == before
    run_crepa(*flags, "10", "--write")
    assert "Wrote memory.stream_weights = true to crepa.toml" in capsys.readouterr().err
    after = project.read_text(encoding="utf-8")
    assert (
        after == before.replace("the model\n", "the model\nvae_tiling = true\n") + "\n[memory]\nstream_weights = true\n"
    )
    assert parse_toml(after, "")["memory"] == {"stream_weights": True}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--write"], "--write needs --fit GB"),
        (["--fit", "24"], "name a family with --model"),
        (["--model", "ltxvideo", "--fit", "24", "--write"], "there is no crepa.toml here"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str],
    message: str,
    tmp_path: Path,
    run_crepa: RunCrepa,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_crepa("doctor", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_crepa_toml_of_another_family_is_left_alone(
    project: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    before = project.read_text(encoding="utf-8")
    assert run_crepa("doctor", "--model", "wan", "--fit", "24", "--write") == 2
    assert "'ltxvideo'" in capsys.readouterr().err
    assert project.read_text(encoding="utf-8") == before


def test_doctor_says_what_the_host_needs_and_lacks(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, family, bucket = opened(plan)
    streamed = lightest(profile, GPU)
    pinned = pinned_memory(streamed, family, bucket, GPU)

    def checks(profile: Profile, free: int) -> list[tuple[str, str]]:
        memory = psutil.virtual_memory()._replace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        found = DoctorPlan()
        _check_host(found, family, profile, bucket, GPU)
        return [(one.status, one.message) for one in found.checks]

    assert checks(profile, 0) == []
    (elsewhere,) = checks(streamed, pinned - 1)
    assert elsewhere[0] == "fine", "this machine has no GPU, so another one trains"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checks(streamed, pinned) == [elsewhere]
    (lacking,) = checks(streamed, pinned - 1)
    assert lacking[0] == "warning"
    assert "memory.stream_weights and memory.offload_activations pin" in lacking[1]
    assert "int8 halves" in lacking[1]


@pytest.mark.slow
def test_wan_1_3b_fits_5_gb_in_all_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 832x480 with 81 frames and CREPA: the VAE encodes clips and decodes the videos of validations in tiles."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    profile = resolve("t2v", {"model.family": "wan", "model.checkpoint": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}).profile
    family = open_family(profile)
    bucket = form_bucket(profile, family)
    assert (bucket, profile.adapter.rank, profile.crepa.enabled) == (Bucket(81, 480, 832), 32, True)
    assert profile.validation.every
    light = lightest(profile, GPU)  # the settings that the search would come to, after half a minute
    fit = cheapest_fit(light, configured(family, light), bucket, GPU, 5 * 10**9)
    assert fit is not None
    assert fit.settings == [TILING]
    prediction = predict(fit.profile, configured(family, fit.profile), bucket, GPU)
    phases = [sum(prediction.training.values()), *prediction.preparation.values(), prediction.validation]
    assert fit.peak == max(phases) <= 5 * 10**9


@pytest.mark.slow
def test_doctor_says_what_fits_and_what_remains_if_nothing_does(plan: Plan) -> None:
    profile, family, bucket = opened(plan)
    peaks = [sum(training_memory(one, family, bucket, GPU).values()) for one in (profile, lightest(profile, GPU))]
    fine = DoctorPlan()
    check_fit(fine, family, profile, Target(GPU, peaks[0] - 1), lambda _: None)
    assert [one.status for one in fine.checks] == ["fine"]
    assert "with --set train.activation_checkpointing=true" in fine.checks[0].message
    assert fine.memory is not None
    assert fine.memory.peak <= peaks[0] - 1
    as_it_is = DoctorPlan()
    check_fit(as_it_is, family, profile, Target(GPU, peaks[0]), lambda _: None)
    assert "with the settings as they are" in as_it_is.checks[0].message
    none = DoctorPlan(buckets=[BucketCount(17, 64, 96, clips=1)])
    check_fit(none, family, profile, Target(GPU, peaks[1]), lambda _: None)
    (check,) = none.checks
    assert check.status == "failure"
    assert none.fit is None
    assert "with all settings that reduce it" in check.message
    assert "--set data.frames=9 fits" in check.advice


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("batch_size", [1, 8])
def test_features_made_in_every_step_are_predicted(batch_size: int, plan: Plan, tmp_path: Path) -> None:
    """Beside a small step, the decoding of a clip is the peak."""
    tables = {**plan.settings, "train": {"batch_size": batch_size}}
    tables["crepa"] = {**plan.settings["crepa"], "teacher_cache": False}
    (measured,) = measure(replace(plan, settings=tables), torch.device("cpu"), tmp_path)
    assert measured.predicted == pytest.approx(measured.peak, rel=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_settings_for_small_cards_train_in_proportion(
    open_tiny: OpenTiny, tiny_dinov2: Path, tmp_path: Path
) -> None:
    """A small Wan under limits that are to its peak as cards of 24, 16 and 12 GB are to that of Wan 14B.

    As many blocks as Wan 14B, long clips and a low rank give its parts about the same shares: about half of the peak is
    weights, and the rest activations. Tensors on the host's buffers are not counted.
    """
    tables: dict[str, dict[str, object]] = {
        "model": {"dtype": "float32"},
        "adapter": {"rank": 1, "alpha": 1.0},
        "crepa": {"encoder": str(tiny_dinov2), "encoder_image_size": 56, "block_index": 8},
        "data": {"width": 128, "height": 96, "frames": 25},
        "train": {"batch_size": 4},
    }
    sizes = {"num_layers": 40, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512}
    plan = Plan("wan", open_tiny("wan", "t2v").base.name, tables, sizes, timed=1)
    profile, family, bucket = opened(plan)
    peak = sum(training_memory(profile, family, bucket, GPU).values())
    found: dict[int, Sequence[Setting]] = {}
    measured: dict[str, int] = {}
    for card in (24, 16, 12):
        limit = int(peak * card * 10**9 / PEAK_OF_WAN_14B)
        fit = cheapest_fit(profile, family, bucket, GPU, limit)
        assert fit is not None, card
        found[card] = fit.settings
        if str(fit) not in measured:
            memory = {key: value for _, key, value in fit.settings}
            (one,) = measure(replace(plan, settings=tables | {"memory": memory}), torch.device("cpu"), tmp_path)
            measured[str(fit)] = one.peak
        assert measured[str(fit)] <= limit, card
    all_three = [OFFLOADING, STREAMING, FINER]
    assert found == {24: all_three[:2], 16: all_three, 12: all_three}, "as for Wan 14B, but for the VAE"


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("setting", [(), (CHECKPOINTING, OFFLOADING, STREAMING)])
def test_what_fits_trains_below_the_limit(setting: tuple[Setting, ...], plan: Plan, tmp_path: Path) -> None:
    """The bytes of tensors outside the host's buffers, counted in steps of the trainer."""
    profile, family, bucket = opened(plan)
    limit = sum(training_memory(with_settings(profile, setting), family, bucket, GPU).values())
    fit = cheapest_fit(profile, family, bucket, GPU, limit)
    assert fit is not None
    tables = dict(plan.settings)
    for table, key, value in fit.settings:
        tables[table] = {**tables.get(table, {}), key: value}
    (measured,) = measure(replace(plan, settings=tables), torch.device("cpu"), tmp_path)
    assert measured.peak <= limit
    assert measured.peak == pytest.approx(fit.peak, rel=0.05)
