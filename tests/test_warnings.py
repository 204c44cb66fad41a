"""Settings that are valid and do nothing are named, and shares of the run become steps."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from conftest import OpenTiny, RunCrepa

from crepa_cli import api
from crepa_cli.profile import Profile, step_count
from crepa_cli.report.metrics import read_metrics
from crepa_cli.runs.warnings import neighbor_warnings, setting_warnings
from crepa_cli.training.build import coefficient_schedule


def profile(*sets: str, preset: str = "t2v", steps: int = 1000) -> Profile:
    return api.resolve(preset, {"model.family": "wan", "train.steps": steps}, sets).profile


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("steps", "total", "expected"),
    [
        ("40%", 60, 24),
        ("40%", 5000, 2000),
        ("100%", 7, 7),
        ("12.5%", 80, 10),
        ("1%", 20, 1),
        ("0%", 20, 0),
        (24, 60, 24),
    ],
)
def test_a_share_of_the_run_is_a_number_of_steps(steps: int | str, total: int, expected: int) -> None:
    assert step_count(steps, total) == expected


def coefficients(chosen: Profile) -> list[float]:
    schedule = coefficient_schedule(chosen)
    return [schedule.coefficient(step) for step in range(chosen.train.steps)]


def test_the_preset_for_solid_backgrounds_ends_alignment_at_40_percent_and_t2v_does_not() -> None:
    solid, plain = (
        coefficients(api.resolve(preset, {"model.family": "wan"}, demo=True).profile)
        for preset in ("solid-background", "t2v")
    )
    assert len(solid) == len(plain) == 60
    assert solid[:24] == plain[:24]
    assert solid[24:] == [0.0] * 36
    assert min(plain[24:]) > 0.1
    by_number = api.resolve("t2v", {"model.family": "wan"}, ["crepa.cutoff_step=24"], demo=True).profile
    by_share = api.resolve("t2v", {"model.family": "wan"}, ["crepa.cutoff_step=40%"], demo=True).profile
    assert coefficients(by_number) == coefficients(by_share) == solid


@pytest.mark.slow
def test_a_run_with_solid_backgrounds_ends_alignment_at_40_percent(run_crepa: RunCrepa) -> None:
    command = ["train", "--profile", "solid-background", "--model", "wan", "--demo", "--plain"]
    command += ["--set", "validation.every=0", "--set", "train.batch_size=1", "--output", "run"]
    assert run_crepa(*command) == 0
    metrics = read_metrics(Path("run/metrics.jsonl"))
    assert [line["step"] for line in metrics if line["crepa_coefficient"] == 0] == [0, *range(24, 60)]
    assert [line["step"] for line in metrics if line["crepa_cutoff"]] == [*range(24, 60)]


@pytest.mark.parametrize(
    ("sets", "steps", "expected"),
    [
        (
            ["crepa.cutoff_step=2000"],
            2000,
            ["crepa.cutoff_step = 2000: the run has 2,000 steps, so alignment is never"],
        ),
        (["crepa.cutoff_step=1999"], 2000, []),
        (["crepa.cutoff_step=100%"], 2000, ["crepa.cutoff_step = 100%: the run has"]),
        ([], 100, ["crepa.warmup_steps = 100: the run has 100 steps, so the coefficient never reaches crepa.lambda"]),
        ([], 101, []),
        (
            ["crepa.decay_steps=901"],
            1000,
            ["crepa.decay_steps = 901: the run has 1,000 steps, so the coefficient does"],
        ),
        (["crepa.decay_steps=900"], 1000, []),
        (["crepa.scheduler=constant", "crepa.decay_steps=9"], 1000, ["has no effect, because the constant scheduler"]),
        (
            ["train.lr_warmup_steps=9"],
            1000,
            ['train.lr_warmup_steps = 9: has no effect with train.lr_scheduler = "const'],
        ),
        (
            ["train.lr_warmup_steps=1000", "train.lr_scheduler=linear"],
            1000,
            ["the learning rate never reaches train.lear"],
        ),
        (
            ["crepa.use_backbone_features=true", "crepa.teacher_block_index=3"],
            1000,
            ["is shallower than the student, cre"],
        ),
        (["crepa.use_backbone_features=true", "crepa.teacher_block_index=20"], 1000, []),
        (["crepa.drop_vae_encoder=true"], 1000, ["crepa.drop_vae_encoder = true: has no effect"]),
        (["crepa.drop_vae_encoder=true", "crepa.teacher_cache=false"], 1000, []),
        (
            ["crepa.objective=relation"],
            1000,
            ['crepa.similarity_threshold = 0.5: with crepa.objective = "relation" the similarity is a correlation'],
        ),
        (["crepa.objective=relation", "crepa.similarity_threshold=none"], 1000, []),
        (["crepa.objective=relation", "crepa.enabled=false"], 1000, []),
        (["crepa.enabled=false", "crepa.cutoff_step=9999"], 1000, []),
    ],
)
def test_settings_without_effect_are_named(sets: list[str], steps: int, expected: list[str]) -> None:
    found = setting_warnings(profile(*sets, steps=steps))
    assert len(found) == len(expected)
    assert all(part in one for part, one in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ([], ["2 clips of 1 frame (1 latent frame) get no neighbors"]),
        (["crepa.adjacent_distance=0"], []),
        (["crepa.adjacent_distance=4"], ["2 clips of 1 frame", "1 clip of 13 frames (4 latent frames) get"]),
        (["crepa.adjacent_distance=4", "crepa.cumulative_neighbors=true"], ["2 clips of 1 frame"]),
        (["crepa.enabled=false"], []),
    ],
)
def test_clips_too_short_for_any_neighbor_are_named_with_their_frames(
    sets: list[str], expected: list[str], open_tiny: OpenTiny
) -> None:
    found = neighbor_warnings(profile(*sets).crepa, open_tiny("wan", "t2v"), [1, 1, 13, 17])
    assert len(found) == len(expected)
    assert all(part in one for part, one in zip(expected, found, strict=True))


def test_a_run_and_doctor_give_the_warnings(
    demo: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    monkeypatch.setattr("crepa_cli.doctor.plan.check_memory", lambda *_: None)
    little = psutil.virtual_memory()._replace(available=10**5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    common = ["--profile", "t2v", "--model", "wan", "--demo", "--set", "crepa.adjacent_distance=5"]
    common += ["--set", "crepa.cutoff_step=5"]
    streamed = ["--set", "memory.stream_weights=true"]
    run_crepa("train", *common, *streamed, "--set", "train.steps=1", "--plain", "--output", tmp_path / "run")
    trained = capsys.readouterr().out
    assert "memory.stream_weights pin " in trained
    run_crepa("doctor", *common, "--set", "train.steps=1", "--json")
    checked = capsys.readouterr().out
    for output in (trained, checked):
        assert "crepa.cutoff_step = 5: the run has 1 step, so alignment is never switched off" in output
        assert "(5 latent frames) get no neighbors" in output
