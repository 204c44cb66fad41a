"""Import of SimpleTuner's JSON configuration, and export of the alignment settings to it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from crepa_cli.errors import UserError
from crepa_cli.profile.describe import known_keys
from crepa_cli.profile.layers import Setting
from crepa_cli.profile.settings import TABLES, Profile, Tracker

ENCODER_KEYS = ("crepa_model", "crepa_encoder")
"""Two names of one option; if both are given, the first one is used."""
COUNTERPARTS = {
    "crepa_model": "crepa.encoder",
    **{f"crepa_{key}": f"crepa.{key}" for key in known_keys()["crepa"]},
    "layersync_enabled": "layersync.enabled",
    "layersync_lambda": "layersync.lambda",
    "revision": "model.revision",
    "ltx_train_mode": "model.task",
    "mixed_precision": "model.dtype",
    "model_type": "adapter.kind",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
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
Flavours = Mapping[str, Mapping[str, str]]
SIZE_STEP = 32
DEFAULT_EMA_DECAY = 0.995


class Found(NamedTuple):
    """An option, the setting it stands for, and the value of that setting."""

    option: str
    setting: str
    value: object


class Imported(NamedTuple):
    """The settings from a configuration, and the options without a counterpart with their values."""

    settings: list[Setting]
    without_counterpart: dict[str, object]


def read_config(text: str, label: str) -> dict[str, Any]:
    """The options of a configuration, with their names as written.

    Raises:
        UserError: if the text is not a JSON object or contains an option twice. The message starts with `label`.
    """
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    options = dict(pairs)
    if len(options) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"given twice: {next(name for name in names if names.count(name) > 1)}")
    return options


def _name(spelling: str) -> str:
    return spelling.lstrip("-")


def import_config(config: Mapping[str, Any], label: str, flavours: Flavours) -> Imported:
    """Our settings from a configuration.

    Args:
        config: its options.
        label: of the configuration; the source of a setting reads "`label` (option)".
        flavours: base models by family and flavour.
    """
    options = {_name(spelling): value for spelling, value in config.items()}
    found = list(_model(options, flavours))
    special = (_size, _ema, _validation, _trackers, _layersync)
    found += [one for take in special for one in take(options)]
    found += _counterparts(options, taken={one.setting for one in found})
    settings = []
    for option, setting, value in found:
        table, _, key = setting.partition(".")
        settings.append(Setting(table, key, _coerced(table, key, value), f"{label} ({option})"))
    return Imported(settings, options)


def export_crepa(profile: Profile, config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with the alignment settings of `profile`; other options and all spellings stay the same."""
    values = {f"crepa_{key}": value for key, value in profile.model_dump()["crepa"].items()}
    exported = dict(config)
    present = set()
    for spelling in config:
        name = "crepa_encoder" if _name(spelling) in ENCODER_KEYS else _name(spelling)
        if name in values:
            exported[spelling] = values[name]
            present.add(name)
    return exported | {name: value for name, value in values.items() if name not in present and value is not None}


def _counterparts(options: dict[str, Any], taken: set[str]) -> Iterator[Found]:
    for option, setting in COUNTERPARTS.items():
        if option not in options or setting in taken:
            continue
        value = options[option]
        words = WORDS.get(option)
        if words and not _unset(value) and _word(value) not in words:
            continue
        if option == "max_train_steps" and value == 0:  # SimpleTuner then counts the length in epochs
            continue
        del options[option]
        if not _unset(value):
            taken.add(setting)
            yield Found(option, setting, words[_word(value)] if words else value)


def _model(options: dict[str, Any], flavours: Flavours) -> Iterator[Found]:
    family = options.pop("model_family", None)
    if not _unset(family):
        family = family.replace("-", "_") if isinstance(family, str) else family
        yield Found("model_family", "model.family", family)
    flavour = _word(options.get("model_flavour"))
    checkpoint = flavours.get(_word(family), {}).get(flavour)
    if checkpoint is not None:
        del options["model_flavour"]
        if flavour.startswith("i2v"):
            yield Found("model_flavour", "model.task", "i2v")
    path = options.pop("pretrained_model_name_or_path", None)
    if not _unset(path):
        yield Found("pretrained_model_name_or_path", "model.checkpoint", path)
    elif checkpoint is not None:
        yield Found("model_flavour", "model.checkpoint", checkpoint)


def _size(options: dict[str, Any]) -> Iterator[Found]:
    """Width and height for a resolution: of a square of that area, or of 16:9 if `pixel` gives the shorter side."""
    resolution = _coerced_to(float, options.get("resolution"))
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
    used = _taken_flag(options, "use_ema")
    if used is not None:
        decay = options.pop("ema_decay", None)
        if used:
            yield Found("ema_decay", "train.ema", DEFAULT_EMA_DECAY if _unset(decay) else decay)


def _validation(options: dict[str, Any]) -> Iterator[Found]:
    if _taken_flag(options, "validation_disable"):
        for option in ("validation_step_interval", "validation_steps"):
            options.pop(option, None)
        yield Found("validation_disable", "validation.every", 0)


def _trackers(options: dict[str, Any]) -> Iterator[Found]:
    names = [name.strip() for name in _word(options.get("report_to")).split(",")]
    if names == ["none"] or all(name in get_args(Tracker) for name in names):
        del options["report_to"]
        yield Found("report_to", "report.trackers", [name for name in names if name != "none"])


def _layersync(options: dict[str, Any]) -> Iterator[Found]:
    """Blocks of LayerSync, which SimpleTuner counts from 1."""
    for key in ("student_block", "teacher_block"):
        block = _coerced_to(int, options.pop(f"layersync_{key}", None))
        if not _unset(block):
            yield Found(f"layersync_{key}", f"layersync.{key}", max(block - 1, 0) if isinstance(block, int) else block)


def _taken_flag(options: dict[str, Any], option: str) -> bool | None:
    """Remove a boolean option from `options` and return it; None, without removing it, if it is not boolean."""
    flag = _coerced_to(bool, options.get(option))
    if not isinstance(flag, bool):
        return None
    del options[option]
    return flag


def _unset(value: object) -> bool:
    return value is None or value == ""


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, (str, bool)) else ""


def _coerced(table: str, key: str, value: object) -> object:
    """The value converted to the type of the setting if possible, such as "1e-4" to a number."""
    fields = TABLES[table].model_fields
    field = next(field for name, field in fields.items() if key in (field.alias, name))
    return _coerced_to(field.annotation, value)


def _coerced_to(type_: Any, value: object) -> Any:
    try:
        return TypeAdapter(type_).validate_python(value)
    except ValidationError:
        return value
