"""The alignment settings of musubi-tuner's forks, `crepa` and `crepa_args`, in our terms."""

from __future__ import annotations

import re
from collections.abc import Iterator

from crepa_cli.profile.conversion import LatentFrames
from crepa_cli.profile.describe import shown
from crepa_cli.profile.options import Findings, Found, Options, coerced, meant, number, taken_flag, word

DEFAULTS: Options = {
    "mode": "backbone",
    "student_block_idx": 16,
    "teacher_block_idx": 32,
    "dino_model": "dinov2_vitb14",
    "lambda_crepa": 0.1,
    "tau": 1.0,
    "num_neighbors": 2,
    "schedule": "constant",
    "warmup_steps": 0,
    "max_steps": None,
    "normalize": True,
    "cutoff_step": 0,
    "similarity_threshold": None,
    "similarity_ema_decay": 0.99,
    "threshold_mode": "permanent",
}
OTHER_NAMES = {
    "crepa_lambda": "lambda_crepa",
    "crepa_scheduler": "schedule",
    "crepa_decay_steps": "max_steps",
    **{f"crepa_{name}": name for name in DEFAULTS},
}
NO_THRESHOLD = ("", "off", "none", "false", "disabled")


def read_musubi(options: Options, latent_frames: LatentFrames) -> Findings:
    """Our alignment settings from `crepa` and `crepa_args`, which are taken out of the options.

    Its loss is ours times T over the number of comparisons, for T latent frames; its threshold is on our scale.
    """
    findings = Findings()
    enabled = bool(taken_flag(options, "crepa"))
    given = dict(_pairs(options.pop("crepa_args", None), findings))
    arguments = DEFAULTS | given
    if "max_steps" not in given and number(options, "max_train_steps", 0) > 0:
        arguments["max_steps"] = options["max_train_steps"]
    findings.settings += [
        Found(f"crepa_args {name}", f"crepa.{key}", value)
        for name, key, value in (*_loss(arguments, latent_frames, findings), *_schedule(arguments))
    ]
    findings.settings.append(Found("crepa", "crepa.enabled", enabled))
    if not enabled:
        return Findings(findings.settings, ["CREPA is off: crepa is not true there; see [crepa] enabled"])
    return findings


def _pairs(arguments: object, findings: Findings) -> Iterator[tuple[str, object]]:
    """The arguments, which are `key=value` each, in a list or in one text."""
    texts = re.split(r"\s+", arguments.strip()) if isinstance(arguments, str) else arguments
    for text in texts if isinstance(texts, list) else []:
        name, equals, value = str(text).partition("=")
        name = OTHER_NAMES.get(name.strip(), name.strip())
        if not equals or name not in DEFAULTS:
            findings.refused.append(f"crepa_args {shown(text)}: {meant(name, DEFAULTS)}")
        else:
            yield name, value.strip()


def _loss(arguments: Options, latent_frames: LatentFrames, findings: Findings) -> Iterator[tuple[str, str, object]]:
    """Argument, key and value of everything that the loss depends on."""
    mode = word(arguments["mode"])
    if mode not in ("backbone", "dino"):
        findings.refused.append(f"crepa_args mode = {shown(arguments['mode'])}: {meant(mode, ('backbone', 'dino'))}")
    if coerced(bool, arguments["normalize"]) is False:
        findings.refused.append("crepa_args normalize = false: the similarity here is always that of unit vectors")
    yield "mode", "use_backbone_features", mode == "backbone"
    yield "mode", "spatial_align", mode == "dino"
    yield "student_block_idx", "block_index", arguments["student_block_idx"]
    if mode == "backbone":
        yield "teacher_block_idx", "teacher_block_index", arguments["teacher_block_idx"]
    else:
        yield "dino_model", "encoder", arguments["dino_model"]
    yield "num_neighbors", "cumulative_neighbors", True
    yield "num_neighbors", "adjacent_distance", arguments["num_neighbors"]
    yield "tau", "adjacent_tau", arguments["tau"]
    strength, distance = number(arguments, "lambda_crepa", 0.1), int(number(arguments, "num_neighbors", 2))
    frames = latent_frames()
    comparisons = frames + 2 * sum(frames - d for d in range(1, min(distance, frames - 1) + 1))
    converted = strength * frames**2 / comparisons
    yield "lambda_crepa", "lambda", converted
    findings.notes.append(
        f"lambda_crepa = {strength:g} becomes {converted:.4g}: the loss there is divided by its {comparisons} "
        f"comparisons at {frames} latent frames"
    )
    findings.notes.append(
        "its projector has two linear layers and no normalization; here it is LayerNorm and one layer"
    )


def _schedule(arguments: Options) -> Iterator[tuple[str, str, object]]:
    """Argument, key and value of everything that the coefficient depends on.

    A constant coefficient has no warmup there. The others decay to 0 at `max_steps`, by default the last step of the
    run; they do not if it is 0.
    """
    schedule = word(arguments["schedule"]) or arguments["schedule"]
    end = arguments["max_steps"]
    if schedule != "constant":
        warmup, last = number(arguments, "warmup_steps", 0), number(arguments, "max_steps", 0)
        yield "warmup_steps", "warmup_steps", arguments["warmup_steps"]
        yield "max_steps", "decay_steps", max(last - warmup, 1) if last > 0 else 0
        schedule = "constant" if end is not None and last <= 0 else schedule
    yield "schedule", "scheduler", schedule
    yield "cutoff_step", "cutoff_step", arguments["cutoff_step"]
    threshold = arguments["similarity_threshold"]
    off = threshold is None or word(threshold) in NO_THRESHOLD
    yield "similarity_threshold", "similarity_threshold", None if off else threshold
    yield "similarity_ema_decay", "similarity_ema_decay", arguments["similarity_ema_decay"]
    yield "threshold_mode", "threshold_mode", word(arguments["threshold_mode"]) or arguments["threshold_mode"]
