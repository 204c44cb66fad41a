"""`crepa init`: its questions, files and errors, and SimpleTuner's JSON in both directions."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import WITH_IMAGES, OpenTiny, RunCrepa
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from crepa_cli.cli.init import init
from crepa_cli.cli.terminal import NOTEBOOK_VARIABLES
from crepa_cli.errors import UserError
from crepa_cli.models import FAMILIES
from crepa_cli.models.flavours import FLAVOURS
from crepa_cli.profile import Profile, ResolvedProfile, description, json_schema, known_keys, resolve_profile
from crepa_cli.profile.layers import complete
from crepa_cli.profile.project import commented_toml, lighter_clips, project_settings
from crepa_cli.profile.simpletuner import COUNTERPARTS, export_crepa, import_config, read_config

DEFAULTS: dict[str, dict[str, object]] = {
    "model": {"checkpoint": "org/wan"},
    "adapter": {"rank": 32, "target_modules": ["to_q"], "export": ["diffusers"]},
    "data": {"width": 832, "height": 480, "frames": 81, "fps": 16.0},
    "train": {"learning_rate": 1e-4},
    "validation": {"guidance_scale": 5.0},
    "crepa": {"block_index": 8},
}
SCRIPT = f"""
import sys, typer
from crepa_cli.cli.init import init
from crepa_cli.profile.layers import complete
checks = sys.modules["crepa_cli.cli.init"]
defaults = lambda *_: {{'family wan': {DEFAULTS!r}}}
checks._checked = lambda settings, *_, **__: (settings, complete(settings, defaults), [])
typer.run(init)
"""
"""The checks against the checkpoint, which load torch, have tests of their own."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(init)
    return CliRunner().invoke(app, arguments)


def succeed(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: str) -> str:
    error = run(*arguments).exception
    assert isinstance(error, UserError)
    return str(error)


def written(folder: Path) -> dict[str, Any]:
    """The settings in crepa.toml, without tables that hold comments alone."""
    tables = tomllib.loads((folder / "crepa.toml").read_text(encoding="utf-8"))
    return {name: table for name, table in tables.items() if table}


def as_toml(tables: dict[str, dict[str, Any]]) -> str:
    return commented_toml(tables, complete(tables, lambda *_: {"family wan": DEFAULTS}))


def resolved(folder: Path) -> ResolvedProfile:
    return resolve_profile(
        profile=None, flags={}, sets=[], folder=folder, family_defaults=lambda *_: {"family wan": DEFAULTS}
    )


def imported(config: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, object]]:
    """The settings that a configuration leads to, and its options without a counterpart."""
    text = json.dumps({"model_family": "wan", **config})
    result = import_config(read_config(text, "config.json"), "config.json", FLAVOURS, lambda _: 21)
    settings = project_settings(
        profile=None, imported=result.settings, flags={}, folder=Path(), families=("wan", "ltxvideo")
    )
    return settings, result.without_counterpart


def test_presets_are_listed_with_their_purpose(folder: Path):
    lines = succeed("--list").splitlines()
    assert [line.split()[0] for line in lines[: lines.index("")]] == ["i2v", "solid-background", "t2v"]
    assert "Image to video" in lines[0]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("preset", ["i2v", "t2v", "solid-background"])
def test_flags_alone_write_a_file_that_means_the_preset(folder: Path, preset: str):
    output = succeed("--model", "wan", "--profile", preset, "--data", "clips")
    assert "Wrote crepa.toml and crepa.schema.json." in output
    assert "The folder clips does not exist yet" in output
    expected = resolve_profile(
        profile=preset,
        flags={"model.family": "wan", "data.path": "clips"},
        sets=[],
        folder=folder.parent,
        family_defaults=lambda *_: {"family wan": DEFAULTS},
    )
    assert resolved(folder).profile == expected.profile
    sources = {"built-in default", f"preset {preset}", "crepa.toml", "family wan"}
    assert set(resolved(folder).sources.values()) == sources


def test_the_file_has_comments_a_schema_and_nothing_that_is_a_default(folder: Path):
    succeed("--model", "wan", "--task", "i2v", "--data", "clips")
    text = (folder / "crepa.toml").read_text(encoding="utf-8")
    assert text.startswith("#:schema ./crepa.schema.json\n")
    assert written(folder) == {"preset": "i2v", "model": {"family": "wan"}, "data": {"path": "clips"}}
    assert f"# {description('model', 'family')}\nfamily = " in text
    assert json.loads((folder / "crepa.schema.json").read_text(encoding="utf-8")) == json_schema()
    assert {path.name for path in folder.iterdir()} == {"crepa.toml", "crepa.schema.json"}


def test_the_task_chooses_the_preset(folder: Path):
    succeed("--model", "wan")
    assert written(folder)["preset"] == "t2v"


@pytest.fixture
def _fits_with_streamed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the prediction, which takes half a minute: some clips fit, with streamed weights."""
    needed = {81: 20.0, 49: 10.0, 33: 6.0}

    def fitted(settings: dict[str, Any], profile: Profile, _family: object, vram: float) -> tuple[Any, list[str]]:
        if needed[profile.data.frames] > vram:
            return None, ["These settings need more"]
        return {**settings, "memory": {"stream_weights": True}}, ["For these GB: --set memory.stream_weights=true"]

    monkeypatch.setattr(sys.modules["crepa_cli.cli.init"], "_fitted", fitted)


@pytest.mark.usefixtures("_fits_with_streamed_weights")
def test_settings_that_fit_the_gpu_are_written_and_clips_are_shortened_only_if_none_do(folder: Path):
    flags = "--model", "wan", "--force", "--vram"
    assert "For these GB: --set memory.stream_weights=true" in succeed(*flags, "24")
    assert written(folder)["memory"] == {"stream_weights": True}
    assert "data" not in written(folder)
    succeed(*flags, "12")
    assert written(folder)["data"] == {"frames": 49}
    assert written(folder)["memory"] == {"stream_weights": True}
    assert "These settings need more" in succeed(*flags, "5")
    assert written(folder)["data"] == {"frames": 33}
    assert written(folder)["crepa"]["encoder"] == "dinov2_vits14"
    assert "memory" not in written(folder)
    (folder / "config.json").write_text(json.dumps({"model_family": "wan", "crepa_enabled": True}))
    assert "These settings need more" in succeed("--from", "config.json", "--force", "--vram", "12")
    assert "data" not in written(folder), "it is converted for the length that it had"


@pytest.mark.slow
def test_settings_that_do_not_fit_the_gpu_are_written_with_a_warning(
    open_tiny: OpenTiny, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "predictions"))
    (folder / "large.toml").write_text(
        "[data]\nwidth = 1664\nheight = 960\nframes = 17\n[validation]\nevery = 0\n[train]\nbatch_size = 64\n"
        "[memory]\nstream_weights = true\noffload_activations = true\nfiner_recompute = true\nquantize_base = 'int8'\n"
    )
    flags = ["--model", "wan", "--profile", "large.toml", "--checkpoint", open_tiny("wan", "t2v").base.name]
    assert "GPU memory" not in succeed(*flags, "--vram", "1000")
    output = succeed(*flags, "--vram", "1", "--force")
    needed = r"These settings need [\d.]+ GB of GPU memory, and there are 1 GB. What would fit: "
    assert re.search(rf"{needed}crepa doctor --fit 1\n", output)
    assert written(folder)["model"]["checkpoint"] == flags[-1]


def test_a_block_that_the_checkpoint_does_not_have_is_refused_before_anything_is_written(folder: Path):
    config = {"model_family": "wan", "crepa_enabled": True, "crepa_block_index": 30}
    (folder / "config.json").write_text(json.dumps(config))
    assert "30 blocks; choose one of 0 to 29" in refusal("--from", "config.json")
    assert not (folder / "crepa.toml").exists()


def test_the_settings_that_are_changed_most_stand_in_comments_at_their_defaults(folder: Path):
    succeed("--model", "wan", "--profile", "i2v")
    text = (folder / "crepa.toml").read_text(encoding="utf-8")
    assert "# block_index = 8\n" in text
    assert "takes more memory. none: the\n# family's default.\n# rank = 32\n" in text
    before = resolved(folder).profile
    names = ("block_index", "lambda", "encoder", "rank", "steps", "prompts")
    uncommented = re.sub(rf"^# ({'|'.join(names)}) = ", r"\1 = ", text, flags=re.MULTILINE)
    (folder / "crepa.toml").write_text(uncommented, encoding="utf-8")
    assert resolved(folder).profile == before
    assert {name for name, source in resolved(folder).sources.items() if source == "crepa.toml"} >= {
        *("crepa.block_index", "crepa.lambda", "crepa.encoder", "adapter.rank", "train.steps", "validation.prompts")
    }


def test_two_folders_of_clips_are_refused(folder: Path):
    assert "--data is given 2 times (a, b)" in refusal("--model", "wan", "--data", "a", "--data", "b")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("command", ["train", "init", "doctor", "probe-blocks"])
def test_help_lists_families_and_presets(
    command: str, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    assert run_crepa(command, "--help") == 0
    text = capsys.readouterr().out
    assert ", ".join(FAMILIES) in text
    assert "i2v, solid-background, t2v" in text


def test_lighter_clips_are_valid_settings():
    assert [lighter_clips(size) for size in (80.0, 24.0)] == [{}, {}]
    assert lighter_clips(float("nan")) == lighter_clips(4)
    for size in (4, 16):
        tables = {"model": {"family": "wan"}, **lighter_clips(size)}
        assert complete(tables, lambda *_: {"family wan": DEFAULTS}).data.frames < 81


def test_nothing_is_overwritten_without_force(folder: Path):
    (folder / "crepa.toml").write_text("mine")
    assert "crepa.toml: already exists; use --force" in refusal("--model", "wan")
    assert (folder / "crepa.toml").read_text() == "mine"
    assert not (folder / "crepa.schema.json").exists()
    succeed("--model", "wan", "--force")
    assert written(folder)["model"]["family"] == "wan"


def test_another_schema_is_not_overwritten_either_but_the_same_one_may_stay(folder: Path):
    (folder / "crepa.schema.json").write_text("{}")
    assert "crepa.schema.json: already exists" in refusal("--model", "wan")
    assert not (folder / "crepa.toml").exists()
    succeed("--model", "wan", "--force")
    (folder / "crepa.toml").unlink()
    succeed("--model", "wan")


def test_the_same_schema_with_the_line_ends_of_windows_may_stay(folder: Path):
    succeed("--model", "wan")
    schema = folder / "crepa.schema.json"
    schema.write_bytes(schema.read_bytes().replace(b"\n", b"\r\n"))
    (folder / "crepa.toml").unlink()
    succeed("--model", "wan")


def test_mistakes_of_flags_are_listed_at_once_and_write_nothing(folder: Path):
    message = refusal("--model", "hunyuan", "--task", "v2v", "--profile", "t2v")
    assert '--model: model.family = "hunyuan": must be one of wan' in message
    assert '--task: model.task = "v2v": must be one of t2v, i2v' in message
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose one with --model"),
        (["--model", "wan", "--profile", "t3v"], "did you mean t2v?"),
        (["--model", "wan", "--from", "missing.json"], "missing.json: is not a file"),
        (["--to", "config.json"], "no model family is set"),
    ],
)
def test_without_a_terminal_what_is_missing_is_said(folder: Path, arguments: list[str], message: str):
    assert message in refusal(*arguments)
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_written_is_explained(folder: Path):
    (folder / "crepa.toml").mkdir()
    assert "crepa.toml cannot be written" in refusal("--model", "wan", "--force")
    assert {path.name for path in folder.iterdir()} == {"crepa.toml", "crepa.schema.json"}


def terminal(folder: Path, answers: str, *arguments: str, **extra: str) -> tuple[int, str]:
    """Exit code and screen of `crepa init` in a pseudo-terminal in which these lines are typed.

    `extra` adds environment variables.
    """
    ours, theirs = pytest.importorskip("pty").openpty()
    environment = {name: value for name, value in os.environ.items() if name not in {"CI", *NOTEBOOK_VARIABLES}}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env={**environment, "PATH": os.fspath(folder), "TERM": "dumb", "COLUMNS": "100", **extra},
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, answers.encode())
    screen = b""
    try:
        while chunk := os.read(ours, 4096):
            screen += chunk
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    return process.wait(timeout=60), screen.decode()


def test_a_terminal_is_asked_with_defaults(folder: Path):
    code, screen = terminal(folder, "\n\n\n\n\n\n")
    assert code == 0, screen
    for question in ("Model family", "Text to video", "Preset", "Folder of clips", "GPU memory", "Prompt to sample"):
        assert question in screen
    assert "no NVIDIA GPU found" in screen
    assert written(folder)["model"] == {"family": "wan"}
    assert written(folder)["data"] == {"path": "clips"}
    assert written(folder)["preset"] == "t2v"


def test_a_terminal_is_asked_again_after_a_wrong_answer_and_shows_the_gpu(folder: Path):
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Tiny GPU, 10240'\n")
    smi.chmod(0o755)
    code, screen = terminal(folder, "wann\nwan\ni2v\n\nmy clips\n\na fox, running\nfox.png\n\n")
    assert code == 0, screen
    assert "Tiny GPU" in screen
    assert (written(folder)["preset"], written(folder)["model"]) == ("i2v", {"family": "wan"})
    assert written(folder)["data"] == {"path": "my clips"}
    assert written(folder)["validation"] == {"prompts": ["a fox, running"], "images": ["fox.png"]}


def test_a_terminal_is_asked_only_for_what_no_flag_has_said(folder: Path):
    flags = ["--model", "wan", "--profile", "solid-background", "--data", "clips", "--vram", "24"]
    code, screen = terminal(folder, "", *flags)
    assert code == 0, screen
    assert "Model family" not in screen
    assert written(folder) == {"preset": "solid-background", "model": {"family": "wan"}, "data": {"path": "clips"}}


def test_a_terminal_is_not_asked_when_the_file_is_there(folder: Path):
    (folder / "crepa.toml").write_text("mine")
    code, screen = terminal(folder, "")
    assert code != 0
    assert "Model family" not in screen
    assert (folder / "crepa.toml").read_text() == "mine"


@pytest.mark.parametrize("variable", ["CI", *NOTEBOOK_VARIABLES])
def test_nobody_is_asked_in_a_notebook_or_ci(folder: Path, variable: str):
    code, screen = terminal(folder, "\x04", "--model", "wan", **{variable: "1"})
    assert code == 0, screen
    assert "Text to video" not in screen
    assert written(folder)["preset"] == "t2v"


def test_the_end_of_input_writes_nothing(folder: Path):
    code, screen = terminal(folder, "wan\n\x04")
    assert code != 0
    assert "not all questions were answered" in screen
    assert not list(folder.iterdir())


def test_a_configuration_of_simpletuner_is_read_and_what_is_left_out_is_named(folder: Path):
    config = {
        "crepa_enabled": True,
        "--crepa_lambda": "0.7",
        "--crepa_model": "dinov2_vitb14",
        "crepa_use_tae": True,
        "--model_family": "wan",
        "--model_flavour": "i2v-14b-2.1",
        "learning_rate": "6e-5",
        "lora_rank": 16,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "resolution": 480,
        "resolution_type": "pixel",
        "max_train_steps": 300.0,
        "mixed_precision": "bf16",
        "gradient_checkpointing": "false",
        "checkpoint_step_interval": 100,
        "checkpoints_total_limit": 5,
        "validation_prompt": "a cat",
        "validation_steps": 50,
        "report_to": "wandb,tensorboard",
        "optimizer": "prodigy",
        "base_model_precision": "int8-quanto",
    }
    (folder / "config.json").write_text(json.dumps(config))
    output = succeed("--from", "config.json")
    left_out = [line.split(" = ")[0].strip() for line in output.splitlines() if line.startswith("  ")]
    assert left_out == ["crepa_use_tae", "optimizer", "base_model_precision"]
    assert written(folder) == {
        "model": {"family": "wan", "task": "i2v", "checkpoint": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"},
        "adapter": {"rank": 16},
        "data": {"width": 832, "height": 480},
        "train": {
            "steps": 300,
            "batch_size": 2,
            "gradient_accumulation": 4,
            "learning_rate": 6e-5,
            "activation_checkpointing": False,
        },
        "validation": {"every": 50, "prompts": ["a cat"]},
        "checkpoints": {"every": 100, "keep": 5},
        "report": {"trackers": ["wandb", "tensorboard"]},
        "crepa": {"block_index": 8, "lambda": 0.7, "encoder": "dinov2_vitb14"},
    }


def test_flags_win_over_an_imported_configuration(folder: Path):
    (folder / "config.json").write_text('{"model_family": "sdxl", "output_dir": "there"}')
    succeed("--from", "config.json", "--model", "wan", "--data", "clips")
    assert written(folder)["model"]["family"] == "wan"
    assert written(folder)["train"] == {"output": "there"}


@pytest.mark.parametrize(
    ("config", "setting", "value"),
    [
        ({"use_ema": True}, "train.ema", 0.995),
        ({"use_ema": "true", "ema_decay": 0.99}, "train.ema", 0.99),
        ({"use_ema": False, "ema_decay": 0.99}, "train.ema", 0.0),
        ({"validation_disable": True, "validation_steps": 5}, "validation.every", 0),
        ({"flow_use_uniform_schedule": True}, "train.timestep_sampling", "uniform"),
        ({"flow_schedule_shift": 3}, "train.timestep_shift", 3.0),
        ({"report_to": "none"}, "report.trackers", []),
        ({"optimizer": "bnb-adamw8bit"}, "train.optimizer", "adamw8bit"),
        ({"resolution": 512, "resolution_type": "pixel_area"}, "data.width", 512),
        ({"resolution": 0.25, "resolution_type": "area"}, "data.height", 512),
        ({"model_flavour": "t2v-480p-14b-2.1"}, "model.checkpoint", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ({"model_flavour": "t2v-480p-14b-2.1", "pretrained_model_name_or_path": "./w"}, "model.checkpoint", "./w"),
        ({"layersync_student_block": 8, "layersync_teacher_block": 16}, "layersync.student_block", 7),
        ({"validation_prompt": ""}, "validation.prompts", []),
        ({"crepa_similarity_threshold": None}, "crepa.similarity_threshold", None),
        ({"seed": 1}, "train.seed", 1),
    ],
)
def test_options_have_their_counterparts(folder: Path, config: dict[str, Any], setting: str, value: object):
    settings, left_out = imported(config)
    (folder / "crepa.toml").write_text(as_toml(settings))
    table, key = setting.split(".")
    assert json.loads(resolved(folder).profile.model_dump_json())[table][key] == value
    assert left_out == {}


@pytest.mark.parametrize(
    "config",
    [
        {"max_train_steps": 0},
        {"lr_scheduler": "sine"},
        {"mixed_precision": "fp8"},
        {"report_to": "all"},
        {"use_ema": "maybe", "ema_decay": 0.99},
        {"validation_disable": "maybe"},
        {"resolution": "large"},
        {"resolution": float("nan")},
        {"optimizer": ["adamw"]},
        {"webhook_config": {"a": 1}},
    ],
)
def test_what_has_no_counterpart_is_kept_by_name(config: dict[str, Any]):
    _, left_out = imported(config)
    assert list(left_out) == list(config)


def test_of_two_names_of_one_setting_the_other_is_named():
    settings, left_out = imported({"crepa_encoder": "dinov2_vits14", "crepa_model": "dinov2_vitb14"})
    assert settings["crepa"]["encoder"] == "dinov2_vitb14"
    assert left_out == {"crepa_encoder": "dinov2_vits14"}


def test_every_counterpart_is_a_setting():
    assert set(COUNTERPARTS.values()) <= {f"{table}.{key}" for table, keys in known_keys().items() for key in keys}


def test_wrong_values_of_a_configuration_are_listed_with_their_option():
    with pytest.raises(UserError) as error:
        imported({"crepa_lambda": -1, "learning_rate": "fast", "model_family": "sdxl"})
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        'config.json (model_family): model.family = "sdxl": must be one of wan, ltxvideo, which support CREPA',
        'config.json (learning_rate): train.learning_rate = "fast": must be a number > 0, or none',
        "config.json (crepa_lambda): crepa.lambda = -1.0: must be a number >= 0",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": 1, "a": 2}', "given twice: a"),
        ('{"a": 1, "--a": 2}', "given both with and without dashes: a"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_malformed_json_is_explained(folder: Path, text: str, message: str):
    (folder / "config.json").write_text(text)
    assert refusal("--from", "config.json").startswith("config.json: ")
    assert message in refusal("--from", "config.json")
    assert not (folder / "crepa.toml").exists()


@pytest.fixture
def light_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crepa_cli.models.family_defaults", lambda *_: {"family wan": DEFAULTS})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("light_family")
def test_the_alignment_settings_are_written_as_json(folder: Path):
    succeed("--model", "wan", "--profile", "t2v")
    succeed("--to", "config.json")
    config = json.loads((folder / "config.json").read_text())
    assert config["crepa_block_index"] == 8
    assert config["crepa_similarity_threshold"] == pytest.approx(0.5 * (1 + 2 * 20 / 21 / math.e))
    assert "crepa_teacher_block_index" not in config
    assert all(name.startswith("crepa_") for name in config)


@pytest.mark.usefixtures("light_family")
def test_writing_back_keeps_the_other_options_and_the_spelling(folder: Path):
    before = {"--seed": 1, "--crepa_lambda": 0.1, "crepa_model": "x", "crepa_similarity_threshold": 0.5, "prompt": "日"}
    (folder / "config.json").write_text(json.dumps(before))
    (folder / "crepa.toml").write_text('[model]\nfamily = "wan"\n[crepa]\nlambda = 0.3\n')
    assert "config.json: already exists" in refusal("--to", "config.json")
    assert json.loads((folder / "config.json").read_text()) == before
    before["crepa_teacher_cache"] = True  # as earlier versions wrote, which SimpleTuner refuses
    (folder / "config.json").write_text(json.dumps(before))
    succeed("--to", "config.json", "--force")
    after = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert list(after)[:4] == ["--seed", "--crepa_lambda", "crepa_similarity_threshold", "prompt"]
    assert (after["--seed"], after["prompt"]) == (1, "日")
    assert (after["--crepa_lambda"], after["crepa_encoder"]) == (0.3, "dinov2_vitg14")
    assert after["crepa_similarity_threshold"] is None
    assert not {"crepa_lambda", "crepa_model", "crepa_teacher_cache"} & set(after)


@pytest.mark.usefixtures("light_family")
def test_a_file_that_is_no_json_is_not_written_over(folder: Path):
    (folder / "config.json").write_text("mine")
    (folder / "crepa.toml").write_text('[model]\nfamily = "wan"\n')
    assert "not valid JSON" in refusal("--to", "config.json", "--force")
    assert (folder / "config.json").read_text() == "mine"


numbers = partial(st.floats, allow_nan=False, allow_infinity=False)
CREPA = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "block_index": st.integers(0, 63),
        "lambda": numbers(0, 1e6),
        "adjacent_distance": st.integers(0, 99),
        "adjacent_tau": numbers(1e-6, 1e6),
        "cumulative_neighbors": st.just(False),
        "normalize_by_frames": st.booleans(),
        "spatial_align": st.booleans(),
        "encoder": st.sampled_from(["dinov2_vits14", "dinov2_vitg14_reg", "DINOv2-ViTB14"]),
        "encoder_image_size": st.integers(1, 90).map(lambda patches: 14 * patches),
        "teacher_block_index": st.integers(64, 99),
        "drop_vae_encoder": st.booleans(),
        "scheduler": st.sampled_from(["constant", "linear", "cosine", "polynomial"]),
        "warmup_steps": st.integers(0, 2**40),
        "decay_steps": st.integers(0, 2**40),
        "cutoff_step": st.integers(0, 2**40),
        "lambda_end": numbers(0, 1e6),
        "power": numbers(1e-6, 1e6),
        "similarity_threshold": st.floats(1e-6, 1),
        "similarity_ema_decay": st.floats(0, 1, exclude_max=True),
        "threshold_mode": st.sampled_from(["permanent", "recoverable"]),
    },
)
FUZZ = settings(
    deadline=None,
    max_examples=150,
    phases=set(Phase) - {Phase.shrink},
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(values=CREPA, dashes=st.booleans())
def test_the_round_trip_loses_nothing(folder: Path, values: dict[str, object], dashes: bool):
    first = {f"{'--' if dashes else ''}crepa_{key}": value for key, value in values.items()}
    settings, left_out = imported(first)
    assert left_out == {}
    (folder / "crepa.toml").write_text(as_toml(settings), encoding="utf-8")
    read_back = resolved(folder).profile
    second = export_crepa(read_back, first, lambda: 21).config
    settings, left_out = imported(second)
    assert left_out == {}
    (folder / "crepa.toml").write_text(as_toml(settings), encoding="utf-8")
    expected, found = (profile.crepa.model_dump() for profile in (read_back, resolved(folder).profile))
    for crepa in (expected, found):
        crepa["similarity_threshold"] = crepa["similarity_threshold"] or 0.0
    for converted in ("lambda", "lambda_end", "similarity_threshold"):
        assert found.pop(converted) == pytest.approx(expected.pop(converted), rel=1e-12)
    assert found == expected


OPTIONS = st.one_of(
    st.sampled_from(
        [
            *COUNTERPARTS,
            *("model_family", "model_flavour", "resolution", "resolution_type", "use_ema", "ema_decay", "report_to"),
            *("pretrained_model_name_or_path", "validation_disable", "layersync_student_block"),
        ]
    ),
    st.text(max_size=8),
)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["true", "wan", "1e-4"]),
    ),
    lambda children: st.one_of(
        st.lists(children, max_size=3), st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
    max_leaves=5,
)


@FUZZ
@given(config=st.dictionaries(OPTIONS, JSON, max_size=8))
@example(config={"lora_rank": 2**70})
@example(config={"resolution": 1e308, "resolution_type": "area"})
@example(config={"optimizer": [[]], "resolution_type": [], "report_to": {}, "model_flavour": []})
def test_no_configuration_ends_in_a_traceback(config: dict[str, Any]):
    names = [name.lstrip("-") for name in config]
    try:
        settings, left_out = imported(config)
        text = as_toml(settings)
    except UserError:
        return
    assert set(left_out) <= set(names)
    assert tomllib.loads(text)["model"]["family"]


@FUZZ
@given(text=st.one_of(st.text(), st.binary().map(lambda content: content.decode("latin-1"))))
def test_no_text_ends_in_a_traceback(text: str):
    try:
        config = read_config(text, "config.json")
    except UserError:
        return
    assert isinstance(config, dict)


@pytest.mark.parametrize("depth", [200, 400, 600, 800, 900, 950, 975, 985, 990])
def test_deep_nesting_ends_in_no_traceback(depth: int):
    text = '{"model_family": "wan", "optimizer": ' + "[" * depth + "]" * depth + "}"
    try:
        config = read_config(text, "config.json")
    except UserError:
        return
    assert "optimizer" in import_config(config, "config.json", FLAVOURS, lambda _: 21).without_counterpart


@pytest.mark.parametrize("in_terminal", [False, True])
@pytest.mark.parametrize(
    ("family", "preset"),
    [
        (name, preset)
        for name in FAMILIES
        for preset in ("t2v", "i2v", "solid-background")
        if preset != "i2v" or name in WITH_IMAGES
    ],
)
def test_every_preset_of_every_family_makes_a_profile(
    family: str,
    preset: str,
    in_terminal: bool,
    folder: Path,
    run_crepa: RunCrepa,
    capsys: pytest.CaptureFixture[str],
):
    task = "i2v" if preset == "i2v" else "t2v"
    if in_terminal:
        assert terminal(folder, f"{family}\n{task}\n{preset}\nclips\n24\n\n")[0] == 0
    else:
        succeed("--model", family, "--task", task, "--profile", preset, "--data", "clips")
    assert run_crepa("train", "--print-profile") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert f'"{family}"' in lines["model.family"]
    assert "crepa.toml" in lines["model.family"]
    assert f"preset {preset}" in lines["model.task"]
    assert ("cosine" if task == "t2v" else "constant") in lines["crepa.scheduler"]
    assert ("40%" if preset == "solid-background" else " 0 ") in lines["crepa.cutoff_step"]
    assert f"family {family}" in lines["crepa.block_index"]
