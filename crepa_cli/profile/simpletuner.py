"""Import of SimpleTuner's configuration, and export of the alignment settings to it.

The configurations of takenoko and of musubi-tuner's forks, in TOML or JSON, share many of its options.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

from crepa_cli.errors import UserError
from crepa_cli.profile.conversion import LatentFrames, read_alignment, written_alignment
from crepa_cli.profile.describe import known_keys, shown
from crepa_cli.profile.files import parse_toml
from crepa_cli.profile.layers import Setting
from crepa_cli.profile.musubi import read_musubi
from crepa_cli.profile.options import Findings, Found, Options, coerced, meant, taken_flag, unset, word
from crepa_cli.profile.settings import TABLES, Profile, Tracker

COUNTERPARTS = {
    **{f"crepa_{key}": f"crepa.{key}" for key in known_keys()["crepa"]},
    "layersync_enabled": "layersync.enabled",
    "layersync_lambda": "layersync.lambda",
    "revision": "model.revision",
    "ltx_train_mode": "model.task",
    "mixed_precision": "model.dtype",
    "model_type": "adapter.kind",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "network_dim": "adapter.rank",
    "network_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_format": "adapter.export",
    "framerate": "data.fps",
    "caption_dropout_probability": "data.caption_dropout",
    "max_train_steps": "train.steps",
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "learning_rate": "train.learning_rate",
    "optimizer": "train.optimizer",
    "adam_weight_decay": "train.weight_decay",
    "lr_scheduler": "train.lr_scheduler",
    "lr_warmup_steps": "train.lr_warmup_steps",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_checkpointing": "train.activation_checkpointing",
    "flow_use_uniform_schedule": "train.timestep_sampling",
    "flow_schedule_shift": "train.timestep_shift",
    "seed": "train.seed",
    "output_dir": "train.output",
    "validation_step_interval": "validation.every",
    "validation_steps": "validation.every",
    "validation_prompt": "validation.prompts",
    "validation_negative_prompt": "validation.negative_prompt",
    "validation_num_inference_steps": "validation.steps",
    "validation_guidance": "validation.guidance_scale",
    "validation_num_video_frames": "validation.frames",
    "checkpoint_step_interval": "checkpoints.every",
    "checkpointing_steps": "checkpoints.every",
    "checkpoints_total_limit": "checkpoints.keep",
}
WORDS: dict[str, dict[str, str]] = {
    "mixed_precision": {"bf16": "bfloat16", "no": "float32"},
    "optimizer": {
        **dict.fromkeys(("adamw", "adamw_bf16", "optimi-adamw", "bnb-adamw"), "adamw"),
        **dict.fromkeys(("adamw8bit", "ao-adamw8bit", "bnb-adamw8bit", "bnb-adamw8bit-paged"), "adamw8bit"),
    },
    "lr_scheduler": {
        name: name
        for name in ("constant", "linear", "cosine", "polynomial", "constant_with_warmup", "cosine_with_restarts")
    },
    "flow_use_uniform_schedule": {"true": "uniform", "false": "logit_normal"},
}
"""Options whose values have different names here; unlisted values have no counterpart."""
ANOTHER_METHOD: dict[str, tuple[str, ...]] = {
    "lora_type": ("", "standard"),
    "distillation_method": ("", "none"),
    "controlnet": ("", "false"),
    "control": ("", "false"),
}
"""Options that choose another method of training, and their values that do not."""
NEUTRAL: dict[str, tuple[str, ...]] = {
    "base_model_precision": ("no_change",),
    "crepa_use_tae": ("false",),
    "delete_problematic_images": ("false",),
    "grad_clip_method": ("norm",),
    "minimum_image_size": ("0",),
    "num_train_epochs": ("0",),
    "strict_epoch_limit": ("false",),
    "validation_prompt_library": ("false",),
}
"""Options without a counterpart, and their values that change nothing."""
NO_EFFECT = frozenset(
    (
        *("attention_mechanism", "compress_disk_cache", "disable_benchmark", "gradient_checkpointing_backend"),
        *("crepa_encoder_frame_chunk_size", "crepa_encoder_frames_batch_size", "crepa_self_flow_mask_ratio"),
        *("gradient_checkpointing_interval", "gradient_checkpointing_segment_stride", "hub_model_id"),
        *("irepa_projector_kernel_size", "irepa_spatial_norm_alpha", "num_processes", "offload_during_startup"),
        *("push_checkpoints_to_hub", "push_to_hub", "push_to_hub_background", "quantize_via"),
        *("resume_from_checkpoint", "text_encoder_batch_size", "tracker_project_name", "tracker_run_name"),
        *("trust_remote_code", "vae_batch_size", "vae_enable_slicing", "vae_enable_tiling"),
    )
)
"""Options that change memory, speed and bookkeeping, not what is trained; so do those of `NO_EFFECT_PREFIXES`."""
NO_EFFECT_PREFIXES = ("ramtorch", "context_parallel")
Flavours = Mapping[str, Mapping[str, Mapping[str, str] | str]]
SIZE_STEP = 32
DEFAULT_EMA_DECAY = 0.995


class Imported(NamedTuple):
    """The settings from a configuration.

    Attributes:
        settings: in our terms.
        without_counterpart: options that stand for nothing here, with their values.
        notes: on values that are others here.
    """

    settings: list[Setting]
    without_counterpart: dict[str, object]
    notes: list[str]


class Exported(NamedTuple):
    """A configuration with the alignment settings, and notes on values that are others there or are missing."""

    config: dict[str, Any]
    notes: list[str]


def read_config(text: str, label: str) -> dict[str, Any]:
    """The options of a configuration, with their names as written.

    Raises:
        UserError: if the text is not a JSON object or contains an option twice. The message starts with `label`.
    """
    if label.lower().endswith(".toml"):
        return _flat(parse_toml(text, label))
    try:
        config = json.loads(text, object_pairs_hook=_unique)
        json.dumps(config, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{label}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{label}: must be a JSON object of options")
    names = [_name(spelling) for spelling in config]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{label}: given both with and without dashes: {', '.join(twice)}")
    return config


def _flat(tables: Mapping[str, object]) -> dict[str, Any]:
    """The keys of a TOML file; those of its tables count as if they stood above them."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    options = dict(pairs)
    if len(options) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"given twice: {next(name for name in names if names.count(name) > 1)}")
    return options


def _name(spelling: str) -> str:
    return spelling.lstrip("-")


def import_config(
    config: Mapping[str, Any],
    label: str,
    flavours: Flavours,
    latent_frames: Callable[[Mapping[str, object]], int],
) -> Imported:
    """Our settings from a configuration, for the same run.

    Args:
        config: its options.
        label: of the configuration; the source of a setting reads "`label` (option)".
        flavours: settings of `[model]` by family and flavour, or why a flavour is not trained here.
        latent_frames: of the clips, from the settings of the model by "table.key".

    Raises:
        UserError: lists what has no counterpart here and would train another run.
    """
    options = {_name(spelling): value for spelling, value in config.items()}
    findings = Findings()
    _method(options, findings)
    _model(options, flavours, findings)
    model = {one.setting: one.value for one in findings.settings}
    read = read_musubi if {"crepa", "crepa_args"} & options.keys() else read_alignment
    alignment = read(options, lambda: latent_frames(model))
    if refused := findings.refused + alignment.refused:
        raise UserError("\n".join(f"{label}: {one}" for one in refused))
    found = findings.settings + alignment.settings
    special = (_size, _ema, _validation, _trackers, _layersync)
    found += [one for take in special for one in take(options)]
    found += _counterparts(options, taken={one.setting for one in found})
    settings = []
    for option, setting, value in found:
        table, _, key = setting.partition(".")
        settings.append(Setting(table, key, _coerced(table, key, value), f"{label} ({option})"))
    lost = {name: value for name, value in options.items() if not _changes_nothing(name, value)}
    return Imported(settings, lost, findings.notes + alignment.notes)


def _changes_nothing(option: str, value: object) -> bool:
    if unset(value) or option in NO_EFFECT or option.startswith(NO_EFFECT_PREFIXES):
        return True
    return option in NEUTRAL and str(value).lower() in NEUTRAL[option]


def _method(options: Options, findings: Findings) -> None:
    """Refuse other methods of training, and clipping that only looks like ours."""
    for option, ours in ANOTHER_METHOD.items():
        if word(options.get(option)) not in ours:
            findings.refused.append(f"{option} = {shown(options[option])}: crepa does not train with this method")
        options.pop(option, None)
    by_value = "model_family" in options and word(options.get("grad_clip_method")) != "norm"
    if by_value and not unset(options.get("max_grad_norm")):
        bound = options.pop("max_grad_norm")
        options.pop("grad_clip_method", None)
        findings.notes.append(
            f"max_grad_norm = {shown(bound)} bounds each value of a gradient there (grad_clip_method), and "
            "train.max_grad_norm bounds its norm: it keeps its default"
        )


def export_crepa(profile: Profile, config: Mapping[str, Any], latent_frames: LatentFrames) -> Exported:
    """A copy of `config` with the alignment settings of `profile`.

    Other options and all spellings stay the same. Options that SimpleTuner refuses, which earlier versions of this
    package wrote, are removed.

    Args:
        profile: the resolved settings.
        config: the options of an existing configuration.
        latent_frames: of the clips.
    """
    values, notes = written_alignment(profile, latent_frames)
    source = "backbone" if profile.crepa.use_backbone_features else "encoder"
    replaced = {"crepa_feature_source": source, "crepa_self_flow": False, "crepa_normalize_neighbour_sum": False}
    replaced["irepa_enabled"] = False
    refused = {"crepa_model", *(f"crepa_{key}" for key in known_keys()["crepa"])} - values.keys()
    exported = {}
    for spelling, value in config.items():
        name = _name(spelling)
        if name not in refused:
            new = values[name] if values.get(name) is not None else replaced.get(name)
            exported[spelling] = new if name in values or name in replaced else value
    present = {_name(spelling) for spelling in exported}
    added = {name: value for name, value in values.items() if name not in present and value is not None}
    return Exported(exported | added, notes)


def _counterparts(options: dict[str, Any], taken: set[str]) -> Iterator[Found]:
    for option, setting in COUNTERPARTS.items():
        if option not in options or setting in taken:
            continue
        value = options[option]
        words = WORDS.get(option)
        if words and not unset(value) and word(value) not in words:
            continue
        if option == "max_train_steps" and value == 0:  # SimpleTuner then counts the length in epochs
            continue
        del options[option]
        if not unset(value):
            taken.add(setting)
            yield Found(option, setting, words[word(value)] if words else value)


def _model(options: Options, flavours: Flavours, findings: Findings) -> None:
    family = options.pop("model_family", None)
    if not unset(family):
        family = family.replace("-", "_").lower() if isinstance(family, str) else family
        findings.settings.append(Found("model_family", "model.family", family))
    path = options.pop("pretrained_model_name_or_path", None)
    known = flavours.get(word(family), {})
    if known:
        settings = _flavour(options, known, findings, needed=unset(path))
        findings.settings += [Found("model_flavour", f"model.{key}", value) for key, value in settings.items()]
    if not unset(path):
        findings.settings.append(Found("pretrained_model_name_or_path", "model.checkpoint", path))


def _flavour(
    options: Options, known: Mapping[str, Mapping[str, str] | str], findings: Findings, *, needed: bool
) -> Mapping[str, str]:
    """The settings of `[model]` that the flavour stands for; the default one if it is needed and not given."""
    given = options.pop("model_flavour", None)
    if unset(given) and not needed:
        return {}
    name = next(iter(known)) if unset(given) else word(given)
    flavour = known.get(name)
    if isinstance(flavour, Mapping):
        return flavour
    reason = flavour or meant(name, [one for one, settings in known.items() if isinstance(settings, Mapping)])
    findings.refused.append(f"model_flavour = {shown(given)}: {reason}")
    return {}


def _size(options: dict[str, Any]) -> Iterator[Found]:
    """Width and height for a resolution: of a square of that area, or of 16:9 if `pixel` gives the shorter side."""
    resolution = coerced(float, options.get("resolution"))
    kind = options.get("resolution_type") or "pixel_area"
    if not isinstance(resolution, float) or not 0 < resolution < 2**16 or kind not in ("pixel_area", "area", "pixel"):
        return
    options.pop("resolution")
    options.pop("resolution_type", None)
    height = 1024 * math.sqrt(resolution) if kind == "area" else resolution
    width = height * 16 / 9 if kind == "pixel" else height
    for key, side in (("width", width), ("height", height)):
        yield Found("resolution", f"data.{key}", max(1, int(side) // SIZE_STEP) * SIZE_STEP)


def _ema(options: dict[str, Any]) -> Iterator[Found]:
    used = taken_flag(options, "use_ema")
    if used is not None:
        decay = options.pop("ema_decay", None)
        if used:
            yield Found("ema_decay", "train.ema", DEFAULT_EMA_DECAY if unset(decay) else decay)


def _validation(options: dict[str, Any]) -> Iterator[Found]:
    if taken_flag(options, "validation_disable"):
        for option in ("validation_step_interval", "validation_steps"):
            options.pop(option, None)
        yield Found("validation_disable", "validation.every", 0)


def _trackers(options: dict[str, Any]) -> Iterator[Found]:
    names = [name.strip() for name in word(options.get("report_to")).split(",")]
    if names == ["none"] or all(name in get_args(Tracker) for name in names):
        del options["report_to"]
        yield Found("report_to", "report.trackers", [name for name in names if name != "none"])


def _layersync(options: dict[str, Any]) -> Iterator[Found]:
    """Blocks of LayerSync, which SimpleTuner counts from 1."""
    for key in ("student_block", "teacher_block"):
        block = coerced(int, options.pop(f"layersync_{key}", None))
        if not unset(block):
            yield Found(f"layersync_{key}", f"layersync.{key}", max(block - 1, 0) if isinstance(block, int) else block)


def _coerced(table: str, key: str, value: object) -> object:
    """The value converted to the type of the setting if possible, such as "1e-4" to a number."""
    fields = TABLES[table].model_fields
    field = next(field for name, field in fields.items() if key in (field.alias, name))
    return coerced(field.annotation, value)
