"""Profiles: settings and their ranges, layers and their order, presets, files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crepa_cli.errors import UserError
from crepa_cli.models import FAMILIES, load_family
from crepa_cli.models import family_defaults as real_defaults
from crepa_cli.models.flavours import FLAVOURS
from crepa_cli.profile import (
    Profile,
    ResolvedProfile,
    SourceSettings,
    allowed_values,
    description,
    dump_toml,
    json_schema,
    known_keys,
    preset_purpose,
    presets,
    resolve_profile,
)
from crepa_cli.profile.describe import family_keys
from crepa_cli.profile.layers import Setting, complete
from crepa_cli.profile.project import commented_toml, project_settings, write_project
from crepa_cli.profile.settings import TABLES
from crepa_cli.profile.simpletuner import COUNTERPARTS, import_config

# The keys that flags, scripts and other trainers' files rely on, and the defaults that are promised.
CREPA_DEFAULTS = {
    "enabled": True,
    "lambda": 0.5,
    "adjacent_distance": 1,
    "adjacent_tau": 1.0,
    "cumulative_neighbors": False,
    "normalize_by_frames": True,
    "spatial_align": True,
    "encoder": "dinov2_vitg14",
    "encoder_revision": None,
    "encoder_image_size": 518,
    "use_backbone_features": False,
    "teacher_block_index": None,
    "drop_vae_encoder": False,
    "teacher_cache": True,
    "scheduler": "constant",
    "warmup_steps": 0,
    "decay_steps": 0,
    "cutoff_step": 0,
    "lambda_end": 0.0,
    "power": 1.0,
    "similarity_threshold": None,
    "similarity_ema_decay": 0.99,
    "threshold_mode": "permanent",
    "teacher_frame": "last",
    "objective": "cosine",
    "projector": "linear",
    "spatial_norm": None,
    "adjacent_tau_seconds": None,
}
KEYS = {
    "model": "family task checkpoint components revision variant dtype vae_dtype vae_tiling audio",
    "memory": "stream_weights offload_idle_expert offload_activations finer_recompute keep keep_blocks quantize_base",
    "adapter": "kind rank alpha dropout target_modules init_from export export_dtype",
    "data": "path sources caption_lines width height frames fps sampling windows overlap split_scenes repeats "
    " caption_dropout cache feature_dtype validation_share validation_path",
    "train": "steps batch_size gradient_accumulation learning_rate optimizer beta1 beta2 eps weight_decay "
    "lr_scheduler lr_warmup_steps lr_floor max_grad_norm max_skipped_steps sharding activation_checkpointing "
    "attention compile ema timestep_sampling timestep_shift loss_weighting seed output",
    "validation": "every prompts negative_prompt images motion_score steps guidance_scale frames",
    "checkpoints": "every keep",
    "report": "every trackers",
    "crepa": "block_index " + " ".join(CREPA_DEFAULTS),
    "layersync": "enabled student_block teacher_block lambda",
}
OUT_OF_RANGE = [
    "model.task=v2v",
    "model.dtype=int8",
    "memory.quantize_base=int4",
    "adapter.kind=dora",
    "adapter.rank=0",
    "adapter.alpha=0",
    "adapter.dropout=1.0",
    "adapter.export=['safetensors']",
    "adapter.export=[]",
    "data.width=0",
    "data.frames=0",
    "data.fps=0",
    "data.repeats=0",
    "data.caption_dropout=1.1",
    "data.feature_dtype=int4",
    "train.steps=0",
    "train.steps=1.5",
    "train.steps=true",
    "train.steps=99999999999999999999",
    "train.batch_size=0",
    "train.learning_rate=0",
    "train.learning_rate=nan",
    "train.optimizer=sgd",
    "train.beta1=1.0",
    "train.beta2=-0.1",
    "train.eps=0",
    "train.lr_floor=1.1",
    "train.compile=1",
    "train.ema=1",
    "train.seed=-1",
    "train.lr_scheduler=step",
    "train.loss_weighting=min_snr",
    "validation.every=-1",
    "validation.prompts=[1]",
    "checkpoints.keep=0",
    "report.trackers=['excel']",
    "crepa.block_index=-1",
    "crepa.lambda=-0.1",
    "crepa.lambda=inf",
    "crepa.adjacent_distance=-1",
    "crepa.adjacent_tau=0",
    "crepa.adjacent_tau_seconds=0",
    "crepa.objective=mse",
    "crepa.projector=mlp",
    "crepa.spatial_norm=1.1",
    "crepa.cumulative_neighbors='yes'",
    "crepa.encoder_image_size=500",
    "crepa.encoder_image_size=0",
    "crepa.encoder_image_size=square",
    "crepa.teacher_block_index=-1",
    "crepa.scheduler=step",
    "crepa.warmup_steps=-1",
    "crepa.decay_steps=-1",
    "crepa.cutoff_step=101%",
    "crepa.cutoff_step='40'",
    "crepa.cutoff_step=-1",
    "crepa.lambda_end=-1",
    "crepa.power=0",
    "crepa.similarity_threshold=0",
    "crepa.similarity_threshold=1.01",
    "crepa.similarity_ema_decay=1",
    "crepa.threshold_mode=never",
    "layersync.lambda=-1",
]


def family_defaults(family: str, task: str, _kind: str, _checkpoint: str | None) -> dict[str, dict[str, Any]]:
    if family != "wan":
        raise UserError("the families with CREPA support are wan and ltxvideo")
    defaults = {
        "model": {"checkpoint": "org/wan"},
        "adapter": {"rank": 32, "target_modules": ["to_q"], "export": ["diffusers"]},
        "data": {"width": 832, "height": 480, "frames": 81 if task == "t2v" else 49, "fps": 16.0},
        "train": {"learning_rate": 1e-4, "timestep_shift": 3.0},
        "validation": {"guidance_scale": 5.0},
        "crepa": {"block_index": 8},
    }
    return {"family wan": defaults}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "project" / "sub"
    folder.mkdir(parents=True)
    return folder


def resolve(folder: Path, *sets: str, **arguments: Any) -> ResolvedProfile:
    defaults = {"profile": None, "flags": {"model.family": "wan"}, "family_defaults": family_defaults}
    return resolve_profile(folder=folder, sets=sets, **{**defaults, **arguments})


def mistakes(folder: Path, *sets: str, **arguments: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        resolve(folder, *sets, **arguments)
    return str(error.value).splitlines()


def test_the_tables_have_the_promised_keys_and_no_others():
    assert {table: set(keys) for table, keys in known_keys().items()} == {
        table: set(keys.split()) for table, keys in KEYS.items()
    }


def test_the_alignment_defaults_are_the_promised_ones(folder: Path):
    profile = resolve(folder).profile
    assert profile.model_dump()["crepa"] == {"block_index": 8, **CREPA_DEFAULTS}
    assert profile.crepa.lambda_ == 0.5
    assert profile.model.task == "t2v"


def test_every_key_has_a_description_and_allowed_values():
    for table, keys in known_keys().items():
        for key in keys:
            assert description(table, key).endswith(".")
            assert allowed_values(table, key)
    assert allowed_values("crepa", "similarity_threshold") == "a number > 0 and <= 1, or none"
    assert allowed_values("crepa", "encoder_image_size") == 'a whole number >= 1, or "grid"'
    assert allowed_values("crepa", "block_index") == "a whole number >= 0, or none"
    assert allowed_values("model", "task") == "one of t2v, i2v"


@pytest.mark.parametrize("setting", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_its_key_and_what_is_allowed(folder: Path, setting: str):
    (message,) = mistakes(folder, setting)
    assert message.startswith("--set: " + setting.partition("=")[0] + " = ")
    assert " must " in message


@pytest.mark.parametrize(
    "setting",
    [
        "crepa.lambda=0",
        "crepa.similarity_threshold=1",
        "crepa.similarity_ema_decay=0",
        "crepa.encoder_image_size=224",
        "crepa.encoder_image_size=grid",
        "crepa.spatial_norm=0",
        "adapter.export=comfyui",
        "adapter.target_modules=['to_q', 'to_k']",
        "validation.prompts=a cat, walking",
        "train.max_grad_norm=0",
        "model.checkpoint=org/name",
    ],
)
def test_the_edges_of_the_ranges_are_taken(folder: Path, setting: str):
    assert resolve(folder, setting)


def test_a_profile_cannot_be_changed(folder: Path):
    with pytest.raises(ValueError, match="frozen"):
        resolve(folder).profile.train.steps = 3


def test_later_layers_win_and_every_value_knows_its_source(folder: Path):
    (folder / "given.toml").write_text(
        "[crepa]\nlambda = 0.1\npower = 2.0\nblock_index = 3\nadjacent_tau = 3.0\n[train]\nsteps = 1\nseed = 1\n"
    )
    (folder / "crepa.toml").write_text(
        "[crepa]\nlambda = 0.2\npower = 3.0\nadjacent_tau = 4.0\n[train]\nsteps = 2\nseed = 2\n"
    )
    resolved = resolve(
        folder,
        "train.steps=5",
        profile="given.toml",
        flags={"model.family": "wan", "train.steps": 4, "train.seed": 4, "data.path": "clips", "train.output": None},
        demo=lambda *_: {"crepa": {"lambda": 0.3}, "train": {"steps": 3, "seed": 3}},
    )
    found = {
        (table, key): (value, source) for table, key, value, source in resolved.rows() if source != "built-in default"
    }
    assert found == {
        ("model", "family"): ('"wan"', "--model"),
        ("data", "path"): ('"clips"', "--data"),
        ("data", "width"): ("832", "family wan"),
        ("data", "height"): ("480", "family wan"),
        ("data", "frames"): ("81", "family wan"),
        ("data", "fps"): ("16.0", "family wan"),
        ("model", "checkpoint"): ('"org/wan"', "family wan"),
        ("adapter", "rank"): ("32", "family wan"),
        ("adapter", "alpha"): ("32.0", "family wan"),
        ("adapter", "target_modules"): ('["to_q"]', "family wan"),
        ("adapter", "export"): ('["diffusers"]', "family wan"),
        ("train", "learning_rate"): ("0.0001", "family wan"),
        ("train", "timestep_shift"): ("3.0", "family wan"),
        ("validation", "guidance_scale"): ("5.0", "family wan"),
        ("crepa", "block_index"): ("3", "given.toml"),
        ("crepa", "adjacent_tau"): ("4.0", "crepa.toml"),
        ("crepa", "power"): ("3.0", "crepa.toml"),
        ("crepa", "lambda"): ("0.3", "--demo"),
        ("train", "seed"): ("4", "--seed"),
        ("train", "steps"): ("5", "--set"),
    }
    assert resolved.profile.train.steps == 5
    assert set(resolved.sources) == {f"{table}.{key}" for table, keys in known_keys().items() for key in keys}


def test_the_family_may_be_named_in_any_layer_and_its_defaults_follow_the_resolved_task(folder: Path):
    (folder / "crepa.toml").write_text('[model]\nfamily = "wan"\n')
    resolved = resolve(folder, profile="i2v", flags={})
    assert resolved.sources["model.family"] == "crepa.toml"
    assert resolved.sources["model.task"] == "preset i2v"
    assert resolved.profile.data.frames == 49


def test_a_preset_wins_over_the_family_and_loses_against_crepa_toml(folder: Path):
    (folder / "crepa.toml").write_text("[crepa]\nlambda_end = 0.2\n")
    resolved = resolve(folder, profile="t2v")
    assert resolved.sources["crepa.scheduler"] == "preset t2v"
    assert (resolved.profile.crepa.lambda_end, resolved.sources["crepa.lambda_end"]) == (0.2, "crepa.toml")


def test_crepa_toml_of_a_parent_counts_and_its_paths_start_there(folder: Path):
    (folder.parent / "crepa.toml").write_text(
        '[model]\ncheckpoint = "weights"\n[crepa]\nencoder = "dinov2_vits14"\n'
        '[data]\npath = "clips"\ncache = "/cache"\n[validation]\nprompts = ["a"]\nimages = ["a.png"]\n'
    )
    (folder.parent / "weights").mkdir()
    resolved = resolve(folder)
    assert resolved.profile.data.path == str(Path("../clips"))
    assert resolved.profile.data.cache == "/cache"
    assert resolved.profile.validation.images == (str(Path("../a.png")),)
    assert resolved.profile.model.checkpoint == str(Path("../weights"))
    assert resolved.profile.crepa.encoder == "dinov2_vits14"
    assert resolved.sources["data.path"] == str(Path("../crepa.toml"))


def test_the_nearest_crepa_toml_is_the_only_one(folder: Path):
    (folder.parent / "crepa.toml").write_text("[train]\nsteps = 1\nseed = 1\n")
    (folder / "crepa.toml").write_text("[train]\nsteps = 2\n")
    assert (resolve(folder).profile.train.steps, resolve(folder).profile.train.seed) == (2, 42)


def test_none_takes_back_what_a_lower_layer_has_set(folder: Path):
    resolved = resolve(folder, "crepa.similarity_threshold=none", "train.loss_weighting=none", profile="t2v")
    assert resolved.profile.crepa.similarity_threshold is None
    assert resolved.profile.train.loss_weighting == "none"


@pytest.mark.parametrize("name", ["i2v", "t2v", "solid-background"])
def test_each_preset_resolves_and_says_what_it_is_for(folder: Path, name: str):
    resolved = resolve(folder, profile=name)
    crepa = resolved.profile.crepa
    assert resolved.profile.model.task == ("i2v" if name == "i2v" else "t2v")
    assert crepa.lambda_ == 0.5
    if name == "i2v":
        assert (crepa.scheduler, crepa.similarity_threshold) == ("constant", None)
    else:
        assert (crepa.scheduler, crepa.warmup_steps, crepa.decay_steps, crepa.lambda_end) == ("cosine", 100, 0, 0.1)
        assert (crepa.similarity_threshold, crepa.threshold_mode) == (0.5, "permanent")
    assert crepa.cutoff_step == ("40%" if name == "solid-background" else 0)
    assert len(preset_purpose(presets()[name])) > 20


def test_another_preset_replaces_that_of_crepa_toml_and_does_not_mix_with_it(folder: Path):
    (folder / "crepa.toml").write_text('preset = "i2v"\n[crepa]\nadjacent_tau = 2.0\n')
    own, other = resolve(folder), resolve(folder, profile="t2v")
    assert own.sources["model.task"] == "preset i2v"
    assert (own.profile.model.task, own.profile.crepa.scheduler) == ("i2v", "constant")
    assert other.profile.model.task == "t2v"
    assert other.profile.crepa.adjacent_tau == own.profile.crepa.adjacent_tau == 2.0
    (folder / "crepa.toml").write_text("[crepa]\nadjacent_tau = 2.0\n")
    assert resolve(folder, profile="t2v").profile == other.profile


def test_a_crepa_toml_without_a_preset_stays_above_the_one_on_the_command_line(folder: Path):
    (folder / "crepa.toml").write_text('[model]\ntask = "i2v"\n')
    resolved = resolve(folder, profile="t2v")
    assert (resolved.profile.model.task, resolved.profile.crepa.scheduler) == ("i2v", "cosine")


def test_a_file_may_name_its_preset_too(folder: Path):
    (folder / "mine.toml").write_text('preset = "solid-background"\n[crepa]\ncutoff_step = 9\n')
    (folder / "crepa.toml").write_text('preset = "i2v"\n')
    resolved = resolve(folder, profile="mine.toml")
    assert (resolved.profile.model.task, resolved.profile.crepa.cutoff_step) == ("t2v", 9)


@pytest.mark.parametrize("value", ['"solid"', "3", "[]"])
def test_an_unknown_preset_of_a_file_is_refused(folder: Path, value: str):
    (folder / "crepa.toml").write_text(f"preset = {value}\n")
    (message,) = mistakes(folder)
    assert message.startswith("crepa.toml: preset = ")
    assert "must be one of i2v, solid-background, t2v" in message


def test_a_new_crepa_toml_has_only_what_differs_from_its_preset(folder: Path):
    imported = [
        Setting("crepa", "scheduler", "constant", "config.json"),
        Setting("crepa", "similarity_threshold", None, "config.json"),
        Setting("crepa", "lambda", 0.5, "config.json"),
    ]
    written = project_settings(
        profile="t2v", imported=imported, flags={"model.family": "wan"}, folder=folder, families=["wan"]
    )
    assert written == {
        "preset": "t2v",
        "model": {"family": "wan"},
        "crepa": {"scheduler": "constant", "similarity_threshold": "none"},
    }
    write_project(written, complete(written, real_defaults), folder)
    resolved = resolve(folder, flags={})
    assert (resolved.profile.crepa.scheduler, resolved.profile.crepa.similarity_threshold) == ("constant", None)
    assert resolved.profile.crepa.warmup_steps == 100


def test_there_are_three_presets():
    assert list(presets()) == ["i2v", "solid-background", "t2v"]


def test_all_mistakes_are_listed_at_once_each_with_its_place(folder: Path):
    (folder / "given.toml").write_text(
        "[crepp]\nx = 1\n[crepa]\nadjacent_distnace = 2\nlambda = -1\nuse_backbone_features = true\n"
    )
    (folder / "crepa.toml").write_text(
        'steps = 3\ntrain = 4\n[data]\nfamily = "wan"\n[layersync]\nenabled = true\n'
        "student_block = 5\nteacher_block = 4\n"
    )
    heading, *found = mistakes(
        folder,
        "crepa.threshold_mode=off",
        "lambda=1",
        "no equals sign",
        profile="given.toml",
        flags={"model.family": "hunyuan", "train.steps": 0},
    )
    assert heading == f"{len(found)} mistakes in the settings:"
    expected = [
        "given.toml: unknown table [crepp]; did you mean [crepa]?",
        "given.toml: unknown key crepa.adjacent_distnace; did you mean crepa.adjacent_distance?",
        "given.toml: crepa.lambda = -1: must be a number >= 0",
        "given.toml: crepa.use_backbone_features = true: needs crepa.teacher_block_index, the teacher block",
        "crepa.toml: 'steps' is not a table; it is a key of [train] and of [validation]",
        "crepa.toml: train = 4: must be a table, [train]",
        "crepa.toml: unknown key data.family; did you mean model.family?",
        "crepa.toml: layersync.teacher_block = 4: must be deeper than layersync.student_block, which is 5",
        '--model: model.family = "hunyuan": the families with CREPA support are wan and ltxvideo',
        "--steps: train.steps = 0: must be a whole number >= 1",
        '--set: crepa.threshold_mode = "off": must be one of permanent, recoverable',
        "--set lambda=1: must be table.key=value, for example --set crepa.lambda=0.3",
        "--set no equals sign: must be table.key=value, for example --set crepa.lambda=0.3",
    ]
    assert sorted(line.strip() for line in found) == sorted(expected)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["use_backbone_features=true"], "needs crepa.teacher_block_index"),
        (
            ["use_backbone_features=true", "teacher_block_index=8"],
            "must differ from crepa.block_index, which is also 8",
        ),
        (["encoder_image_size=100"], "must be a multiple of 14, the patch size of dinov2_vitg14, such as 98"),
        (["adjacent_tau=2.0", "adjacent_tau_seconds=0.5"], "replaces crepa.adjacent_tau, which is set to 2"),
        (["spatial_align=false", "objective=relation"], "leaves one patch per frame"),
        (["spatial_align=false", "projector=conv"], "leaves one patch per frame"),
        (["spatial_align=false", "spatial_norm=0.6"], "leaves one patch per frame"),
    ],
)
def test_broken_rules_of_alignment_are_explained(folder: Path, sets: list[str], message: str):
    assert message in mistakes(folder, *(f"crepa.{one}" for one in sets))[0]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["layersync.enabled=true", "layersync.student_block=1"], "needs layersync.student_block and"),
        (["validation.images=a.png"], "needs one image per prompt: 1 images, 0 prompts"),
    ],
)
def test_broken_rules_of_other_tables_are_explained(folder: Path, sets: list[str], message: str):
    assert message in mistakes(folder, *sets)[0]


def test_another_encoder_may_have_another_patch_size(folder: Path):
    assert resolve(folder, "crepa.encoder=org/teacher", "crepa.encoder_image_size=256")


def test_a_missing_family_points_to_its_flag(folder: Path):
    assert mistakes(folder, flags={}) == ["no model family is set: choose one with --model; `crepa init` lists them"]


def test_an_unknown_profile_names_the_presets_and_the_nearest(folder: Path):
    (message,) = mistakes(folder, profile="solid-backgruond")
    assert "did you mean solid-background?" in message
    assert "i2v, solid-background, t2v" in message


@pytest.mark.parametrize("name", ["", "a\0b", "a" * 5000, ".", "/dev/zero", "missing.toml"])
def test_a_profile_that_is_no_file_is_refused(folder: Path, name: str):
    assert len(mistakes(folder, profile=name)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[crepa]\nlambda = \n", "crepa.toml: not valid TOML: Invalid value (at line 2, column 10)"),
        (b"[crepa]\nlambda = 1\nlambda = 2\n", "at line 3"),
        (
            b'[data]\npath = "C:\\Users\\me\\clips"',
            "at line 2, column 13); in double quotes a backslash starts an escape",
        ),
        (b'[data]\npath = "D:\\new\\train"', 'crepa.toml: data.path = "D:\\new\\train" is not a path; in double'),
        (b'[validation]\nimages = ["a.png", "b\\two.png"]', "single quotes ('D:\\clips')"),
        (b"\xff\xfe\x00", "crepa.toml: is not UTF-8 text"),
        (b"#" * (10**6 + 1), "crepa.toml: is larger than 1 MB"),
        (b"x = " + b"[" * 10_000, "too deeply nested"),
        (b"x = " + b"9" * 5000, "not valid TOML"),
        (b"[data]\nwidth = 0x" + b"f" * 5000, "must have at most 64 bits"),
    ],
)
def test_an_unreadable_crepa_toml_is_explained_without_blaming_the_missing_family(
    folder: Path, content: bytes, message: str
):
    (folder / "crepa.toml").write_bytes(content)
    assert message in mistakes(folder)[0]
    assert len(mistakes(folder)) == 1


@pytest.mark.parametrize("path", ["'D:\\new\\train'", '"D:/new/train"', '"D:\\\\new\\\\train"'])
def test_a_path_of_windows_is_taken_in_single_quotes_with_slashes_or_escaped(folder: Path, path: str):
    (folder / "crepa.toml").write_text(f"[data]\npath = {path}\n[validation]\nprompts = ['a\\b']")
    assert str(resolve(folder).profile.data.path).replace("\\", "/").endswith("D:/new/train")


def test_a_folder_named_crepa_toml_is_explained(folder: Path):
    (folder / "crepa.toml").mkdir()
    assert mistakes(folder) == ["crepa.toml: is not a file"]


def test_a_dumped_profile_loads_back_equal_and_needs_nothing_else(folder: Path):
    first = resolve(folder, "validation.prompts=['Ein \"Zitat\" — naïve']", "data.frames=none", profile="t2v").profile
    (folder / "profile.toml").write_text(dump_toml(first), encoding="utf-8")
    (folder / "crepa.toml").write_text("[crepa]\nlambda = 0.9\n")
    again = resolve(folder, profile="profile.toml", flags={})
    assert again.profile == first
    assert again.sources["crepa.lambda"] == "profile.toml"
    assert resolve(folder, "train.steps=7", profile="profile.toml", flags={}).profile.train.steps == 7


def test_a_resolved_profile_of_an_older_version_takes_what_it_lacks_from_the_family(folder: Path):
    text = dump_toml(resolve(folder, "train.timestep_shift=none").profile)
    for line in ("guidance_scale = 5.0\n", "alpha = 32.0\n", 'checkpoint = "org/wan"\n'):
        assert line in text
        text = text.replace(line, "")
    (folder / "profile.toml").write_text(text, encoding="utf-8")
    resolved = resolve(folder, profile="profile.toml", flags={})
    assert (resolved.profile.validation.guidance_scale, resolved.profile.model.checkpoint) == (5.0, "org/wan")
    assert resolved.sources["validation.guidance_scale"] == "family wan"
    assert resolved.profile.adapter.alpha == 32
    assert resolved.profile.train.timestep_shift is None  # an optional setting: the file alone decides


def test_alpha_follows_the_rank_unless_it_is_set(folder: Path):
    follows = resolve(folder, "adapter.rank=8", "adapter.alpha=none")
    assert (follows.profile.adapter.alpha, follows.sources["adapter.alpha"]) == (8, "--set")
    assert resolve(folder, "adapter.rank=8", "adapter.alpha=4").profile.adapter.alpha == 4


def family_settings(family: str, task: str) -> dict[str, object]:
    """The family's value of each setting that depends on the family, by "table.key"."""
    defaults = real_defaults(family, task, "lora", None)[f"family {family}"]
    return {f"{table}.{key}": defaults[table][key] for table, key in family_keys()}


def values_and_sources(resolved: ResolvedProfile) -> dict[str, tuple[object, str]]:
    """Value and source of each setting that depends on the family, by "table.key"."""
    tables = json.loads(resolved.profile.model_dump_json())
    return {f"{t}.{k}": (tables[t][k], resolved.sources[f"{t}.{k}"]) for t, k in family_keys()}


def test_every_setting_that_needs_the_family_is_marked():
    required = {
        (name, field.alias or key)
        for name, table in TABLES.items()
        for key, field in table.model_fields.items()
        if field.is_required()
    }
    assert family_keys() == required - {("model", "family"), ("adapter", "alpha")}
    assert len(family_keys()) > 9


@pytest.mark.parametrize(
    ("family", "task"), [(name, task) for name in FAMILIES for task in load_family(name).pipelines]
)
def test_none_gives_the_default_of_every_family(folder: Path, family: str, task: str):
    expected = {name: (value, f"family {family}") for name, value in family_settings(family, task).items()}
    flags = {"model.family": family, "model.task": task}
    nones: dict[str, dict[str, str]] = {}
    for table, key in family_keys():
        nones.setdefault(table, {})[key] = "none"

    def resolved(*sets: str, **arguments: Any) -> dict[str, tuple[object, str]]:
        arguments = {"flags": flags, "family_defaults": real_defaults, **arguments}
        return values_and_sources(resolve(folder, *sets, **arguments))

    assert resolved() == expected
    demo = {"data": {"frames": 17, "width": 96}, "adapter": {"rank": 8}}
    assert resolved(*(f"{name}=none" for name in expected), demo=lambda *_: demo) == expected
    lower = {"data": {"frames": 17}, "crepa": {"block_index": 3}, "model": {"checkpoint": "org/other"}}
    (folder / "lower.toml").write_text(tomli_w.dumps(lower))
    (folder / "crepa.toml").write_text(tomli_w.dumps(nones))
    assert resolved(profile="lower.toml") == expected

    imported = [Setting(table, key, None, "config.json") for table, key in family_keys()]
    written = project_settings(profile="lower.toml", imported=imported, flags=flags, folder=folder, families=FAMILIES)
    write_project(written, complete(written, real_defaults), folder)
    assert resolved(flags={}) == expected


@pytest.mark.parametrize("none", ["none", None])
def test_none_in_a_json_configuration_gives_the_default_of_the_family(folder: Path, none: str | None):
    by_setting = {setting: option for option, setting in COUNTERPARTS.items()}
    names = {f"{table}.{key}" for table, key in family_keys()} & by_setting.keys()
    assert "crepa.block_index" in names
    config = {"model_family": "wan", **{by_setting[name]: none for name in names}}
    imported = import_config(config, "config.json", FLAVOURS, lambda _: 21).settings
    written = project_settings(profile=None, imported=imported, flags={}, folder=folder, families=FAMILIES)
    write_project(written, complete(written, real_defaults), folder)
    found = values_and_sources(resolve(folder, flags={}, family_defaults=real_defaults))
    del found["model.checkpoint"]  # The import names the checkpoint: SimpleTuner's default need not be ours.
    expected = {name: (value, "family wan") for name, value in family_settings("wan", "t2v").items()}
    assert found == {name: expected[name] for name in found}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ('path = "a"\nweight = 0', "in table 1, weight must be a number > 0, or none"),
        ('path = "a"\n[[data.sources]]\nfolder = "b"', "in table 2, the keys are path, hub, revision, weight"),
        ('path = "a"\nhub = "b/c"', "each source needs either a path or a hub"),
        ('path = "a"\nweight = 1\n[[data.sources]]\npath = "b"', "give each source a weight, or none of them"),
        ('path = "a\\tb"', "is not a path"),
    ],
)
def test_mistakes_in_sources_are_named(folder: Path, sources: str, message: str):
    (folder / "crepa.toml").write_text(f"[[data.sources]]\n{sources}\n")
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(folder)
    (folder / "crepa.toml").write_text('[[data.sources]]\npath = "a"\n')
    with pytest.raises(UserError, match="choose one: path is one folder, sources are several"):
        resolve(folder, "data.path=b")


def test_sources_are_anchored_written_and_read_back(folder: Path):
    (folder / "sub").mkdir()
    clips = '[[data.sources]]\npath = "clips"\nweight = 2\n[[data.sources]]\nhub = "owner/clips"\nweight = 1.5\n'
    (folder / "crepa.toml").write_text(clips)
    resolved = resolve(folder / "sub")
    one, other = resolved.profile.data.sources
    assert (one.path, one.weight, other.hub) == (str(Path("../clips")), 2.0, "owner/clips")
    written = project_settings(
        profile="crepa.toml", imported=[], flags={"model.family": "wan"}, folder=folder, families=FAMILIES
    )
    text = commented_toml(written, complete(written, real_defaults))
    assert tomllib.loads(text)["data"]["sources"] == tomllib.loads(clips)["data"]["sources"]


def test_the_schema_follows_the_settings():
    schema = json_schema()
    crepa = schema["$defs"]["CrepaSettings"]["properties"]
    assert crepa["lambda"]["minimum"] == 0
    assert crepa["similarity_threshold"]["anyOf"][1] == {"const": "none"}
    assert crepa["block_index"]["anyOf"] == [{"type": "integer", "minimum": 0}, {"const": "none"}]
    assert crepa["block_index"]["description"].endswith("none: the family's default.")
    assert set(schema["properties"]) == {"preset", *KEYS}
    assert "null" not in json.dumps(schema)
    assert all(definition["additionalProperties"] is False for definition in schema["$defs"].values())


def test_importing_the_profiles_loads_no_heavy_library():
    heavy = "{'torch', 'diffusers', 'transformers', 'peft'}"
    script = f"import sys, crepa_cli.profile; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"


# Values near what people write: every known key, with values of every TOML type.
SCALARS = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.text(max_size=10), st.sampled_from(["none", "grid", "t2v", "cosine"])
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))
SOURCE_KEYS = st.sampled_from([*SourceSettings.model_fields]) | st.text(max_size=3)
SOURCE_VALUES = st.one_of(SCALARS, st.floats(0.1, 10), st.integers(8, 1000))
SOURCES = st.lists(
    st.builds(
        lambda path, more: {"path": path, **more},
        st.text(max_size=5),
        st.dictionaries(SOURCE_KEYS, SOURCE_VALUES, max_size=3),
    ),
    max_size=3,
)
NAMES = st.one_of(st.sampled_from(sorted(f"{t}.{k}" for t, keys in known_keys().items() for k in keys)), st.text())
FUZZ = settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(folder: Path, *sets: str, **arguments: Any) -> None:
    """The only outcomes are a resolved profile that can be written and read again, and a UserError."""
    try:
        resolved = resolve(folder, *sets, **arguments)
    except UserError:
        return
    assert Profile.model_validate(tomllib.loads(dump_toml(resolved.profile))) == resolved.profile
    assert list(resolved.rows())


@FUZZ
@given(st.lists(st.builds(lambda name, value: f"{name}={value}", NAMES, st.one_of(st.text(), VALUES.map(str)))))
@example(["data.path=\ud800"])
@example(["data.width=0x" + "f" * 5000])
@example(["data.path=" + "[" * 5000])
@example(["data.path=1\n[crepa]\nx=2"])
@example(["train.learning_rate=1e-400"])
def test_no_set_string_ends_in_a_traceback(folder: Path, sets: list[str]):
    survives(folder, *sets)


def test_no_depth_of_nesting_ends_in_a_traceback(folder: Path):
    for depth in range(100, 1100, 20):
        survives(folder, "crepa.lambda=" + "[" * depth + "]" * depth)


@FUZZ
@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_no_values_end_in_a_traceback(folder: Path, values: dict[str, object]):
    survives(folder, flags={"model.family": "wan", **values})


@FUZZ
@given(SOURCES)
@example([{"path": "clips", "weight": 2}, {"hub": "owner/clips", "weight": 0.5, "revision": "none"}])
@example([{"path": "clips", "width": 2**70}])
def test_no_sources_end_in_a_traceback(folder: Path, sources: list[dict[str, object]]):
    survives(folder, flags={"model.family": "wan", "data.sources": sources})


@FUZZ
@given(
    st.one_of(st.text(), st.lists(st.sampled_from([*"[]=\"'\n{},. \\#", "crepa", "lambda", "0x1", "nan"])).map("".join))
)
def test_no_toml_text_ends_in_a_traceback(folder: Path, text: str):
    (folder / "crepa.toml").write_text(text, encoding="utf-8", newline="")
    survives(folder, profile="crepa.toml")


@FUZZ
@given(st.binary())
def test_no_bytes_end_in_a_traceback(folder: Path, content: bytes):
    (folder / "crepa.toml").write_bytes(content)
    survives(folder)
