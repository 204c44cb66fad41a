"""The alignment settings of SimpleTuner and takenoko in our terms, and back.

Both add up the similarities of a frame and its neighbors as we do. SimpleTuner compares its threshold with that sum,
which reaches 1.74 at distance 1, and counts the end of its decay from the start of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from crepa_cli.profile.alignment import ENCODERS, CrepaSettings, step_count
from crepa_cli.profile.describe import shown
from crepa_cli.profile.options import Findings, Found, Options, coerced, meant, number, taken_flag, unset, word
from crepa_cli.profile.settings import Profile

ENCODER_KEYS = ("crepa_model", "crepa_encoder")
"""Two names of one option; if both are given, the first one is used."""
OLD_NAMES = {"crepa_adjacency": "crepa_adjacent_distance", "crepa_temperature": "crepa_adjacent_tau"}
"""Names in takenoko that count only if the newer one is not given."""
SOURCES = {
    "encoder": "encoder",
    "external": "encoder",
    "backbone": "backbone",
    "internal": "backbone",
    "self_flow": "self_flow",
    "selfflow": "self_flow",
}
DEFAULT_BLOCK = 8
IREPA_KERNEL = 3
IREPA_STRENGTH = 0.6
"""SimpleTuner's defaults, as its authors published them."""
KNOWN_KEYS = (
    *("enabled", "block_index", "lambda", "adjacent_distance", "adjacent_tau", "encoder", "encoder_image_size"),
    *("use_backbone_features", "teacher_block_index", "drop_vae_encoder", "normalize_by_frames", "spatial_align"),
    *("scheduler", "warmup_steps", "decay_steps", "lambda_end", "power", "cutoff_step"),
    *("similarity_threshold", "similarity_ema_decay", "threshold_mode"),
)
"""Keys of `[crepa]` that SimpleTuner's command line has as `crepa_<key>`; it refuses any other."""
LatentFrames = Callable[[], int]
"""Tells the latent frames of the clips, if they are needed."""


def mean_weight(frames: int, distance: int, tau: float, cumulative: bool) -> float:
    """The sum of the weights in S(f), 1 for the frame and exp(-d / tau) for each neighbor, as the mean over a clip."""
    nearest = 1 if cumulative else distance
    distances = range(nearest, min(distance, frames - 1) + 1) if distance else ()
    return 1 + sum(2 * (frames - d) * math.exp(-d / tau) for d in distances) / frames


def read_alignment(options: Options, latent_frames: LatentFrames) -> Findings:
    """Our alignment settings from options of SimpleTuner or takenoko.

    Args:
        options: what needs no conversion is left there, and so are values of a wrong type.
        latent_frames: of the clips.
    """
    findings = Findings()
    enabled = taken_flag(options, "crepa_enabled")
    if enabled is None and unset(options.get("crepa_enabled")):
        options.pop("crepa_enabled", None)
        enabled = False
    if enabled is not None:
        findings.settings.append(Found("crepa_enabled", "crepa.enabled", enabled))
    for old, new in OLD_NAMES.items():
        if old in options and unset(options.get(new)):
            options[new] = options.pop(old)
    for name in {"crepa_scheduler", "crepa_threshold_mode"} & options.keys():
        options[name] = word(options[name]) or options[name]
    _read_teacher(options, findings)
    _read_neighbors(options, latent_frames, findings)
    _read_decay(options, findings)
    if enabled is False:
        return Findings(findings.settings, ["CREPA is off: crepa_enabled is not true there; see [crepa] enabled"])
    if unset(options.get("crepa_block_index")):
        findings.settings.append(Found("crepa_block_index, by default", "crepa.block_index", DEFAULT_BLOCK))
    return findings


def _read_teacher(options: Options, findings: Findings) -> None:
    backbone = taken_flag(options, "crepa_use_backbone_features")
    self_flow = taken_flag(options, "crepa_self_flow")
    given = options.pop("crepa_feature_source", None)
    source = SOURCES.get(word(given))
    if source is None and not unset(given):
        findings.refused.append(f"crepa_feature_source = {shown(given)}: {meant(word(given), SOURCES)}")
    if self_flow or source == "self_flow":
        findings.refused.append(
            "crepa_feature_source = self_flow: its teacher is a moving average of the model itself; here it is an "
            "encoder or a deeper block"
        )
    if backbone and source == "encoder":
        findings.refused.append(f"crepa_use_backbone_features = true contradicts crepa_feature_source = {given}")
    if backbone is not None or source is not None:
        option = "crepa_use_backbone_features" if source is None else "crepa_feature_source"
        backbone = bool(backbone) or source == "backbone"
        findings.settings.append(Found(option, "crepa.use_backbone_features", backbone))
    if backbone and coerced(bool, options.get("crepa_spatial_align")) is False:
        del options["crepa_spatial_align"]
        findings.notes.append("crepa_spatial_align = false has no effect there if a block is the teacher: left out")
    _read_encoder(options, findings, teaches=not backbone)
    _read_irepa(options, findings)


def _read_irepa(options: Options, findings: Findings) -> None:
    """The projector and the spatial norm, which SimpleTuner has together or not at all."""
    if not taken_flag(options, "irepa_enabled"):
        return
    kernel, strength = options.pop("irepa_projector_kernel_size", None), options.pop("irepa_spatial_norm_alpha", None)
    if not unset(kernel) and coerced(int, kernel) != IREPA_KERNEL:
        findings.refused.append(f"irepa_projector_kernel_size = {shown(kernel)}: here it is {IREPA_KERNEL}")
    findings.settings += [
        Found("irepa_enabled", "crepa.projector", "conv"),
        Found("irepa_spatial_norm_alpha", "crepa.spatial_norm", IREPA_STRENGTH if unset(strength) else strength),
    ]


def _read_encoder(options: Options, findings: Findings, *, teaches: bool) -> None:
    given = [name for name in ENCODER_KEYS if not unset(options.get(name))]
    for name in given[:1]:
        encoder = options.pop(name)
        if teaches and "qwen" in word(encoder) and "vl" in word(encoder):
            findings.refused.append(f"{name} = {shown(encoder)}: the teachers here are DINOv2 encoders")
        elif teaches:
            findings.settings.append(Found(name, "crepa.encoder", encoder))


def _read_neighbors(options: Options, latent_frames: LatentFrames, findings: Findings) -> None:
    """Convert the strength and the threshold by the mean sum of weights, and cut the distance to the clip."""
    distance, tau = int(number(options, "crepa_adjacent_distance", 1)), number(options, "crepa_adjacent_tau", 1)
    cumulative = coerced(bool, options.get("crepa_cumulative_neighbors")) is True
    normalized = taken_flag(options, "crepa_normalize_neighbour_sum")
    threshold = number(options, "crepa_similarity_threshold", 0)
    if distance < 0 or tau <= 0:
        return
    if distance > 1 and not cumulative and distance >= (frames := latent_frames()):
        options["crepa_adjacent_distance"] = frames - 1
        findings.notes.append(
            f"crepa_adjacent_distance = {distance} is {frames - 1} in clips of {frames} latent frames, where no frame "
            "is farther away"
        )
        distance = frames - 1
    if not normalized and not threshold:
        return
    weight = mean_weight(frames := latent_frames(), distance, tau, cumulative)
    clip = f"at {frames} latent frames, where the weights of a frame and its neighbors add up to {weight:.4f}"
    if normalized:
        peak, end = number(options, "crepa_lambda", 0.5), number(options, "crepa_lambda_end", 0)
        options["crepa_lambda"], options["crepa_lambda_end"] = peak / weight, end / weight
        findings.notes.append(
            f"crepa_normalize_neighbour_sum = true: the loss there is a mean and here a sum, so lambda {peak:g} "
            f"becomes {peak / weight:.4g} {clip}"
        )
    else:
        options["crepa_similarity_threshold"] = threshold / weight
        findings.notes.append(
            f"crepa_similarity_threshold = {threshold:g} becomes {threshold / weight:.4g}: the similarity there is a "
            f"sum and here a mean, {clip}"
        )


def _read_decay(options: Options, findings: Findings) -> None:
    """Count the decay from the end of the warmup, no longer from the start of the run."""
    warmup, end = number(options, "crepa_warmup_steps", 0), number(options, "crepa_decay_steps", 0)
    if warmup <= 0 or end <= 0 or word(options.get("crepa_scheduler")) in ("", "constant"):
        return
    options["crepa_decay_steps"] = max(end - warmup, 1)
    findings.notes.append(
        f"crepa_decay_steps = {end:g} becomes {max(end - warmup, 1):g}: the decay is counted from step 0 there, and "
        "from the end of the warmup here"
    )


def written_alignment(profile: Profile, latent_frames: LatentFrames) -> tuple[dict[str, Any], list[str]]:
    """The alignment settings as options of SimpleTuner, None for those to leave out, and notes for the user."""
    crepa, total = profile.crepa, profile.train.steps
    values = profile.model_dump()["crepa"]
    warmup, decay = step_count(crepa.warmup_steps, total), step_count(crepa.decay_steps, total)
    values |= {"warmup_steps": warmup, "cutoff_step": step_count(crepa.cutoff_step, total)}
    values["decay_steps"] = decay
    notes = _lost(crepa, values)
    if warmup and decay and crepa.scheduler != "constant":
        values["decay_steps"] = warmup + decay
        notes.append(
            f"crepa.decay_steps = {crepa.decay_steps} becomes {warmup + decay}: there it is counted from step 0"
        )
    normalized = False
    if threshold := values["similarity_threshold"]:
        frames, cumulative = latent_frames(), bool(values["cumulative_neighbors"])
        weight = mean_weight(frames, crepa.adjacent_distance, crepa.adjacent_tau, cumulative)
        normalized = threshold * weight > 1
        if normalized:  # SimpleTuner takes thresholds of at most 1.
            values |= {"lambda": crepa.lambda_ * weight, "lambda_end": crepa.lambda_end * weight}
            notes.append(f"crepa.lambda = {crepa.lambda_:g} becomes {values['lambda']:.4g}, with the sum normalized")
        else:
            values["similarity_threshold"] = threshold * weight
            notes.append(
                f"crepa.similarity_threshold = {threshold:g} becomes {threshold * weight:.4g}: there the similarity is "
                f"a sum, at {frames} latent frames {weight:.4f} times the mean"
            )
    options = {f"crepa_{key}": values[key] for key in KNOWN_KEYS}
    options |= {"crepa_normalize_neighbour_sum": normalized or None, "irepa_enabled": _is_irepa(crepa) or None}
    if _is_irepa(crepa):
        options |= {"irepa_spatial_norm_alpha": crepa.spatial_norm, "irepa_projector_kernel_size": IREPA_KERNEL}
    return options, notes


def _is_irepa(crepa: CrepaSettings) -> bool:
    return crepa.projector == "conv" and crepa.spatial_norm is not None


def _lost(crepa: CrepaSettings, values: dict[str, Any]) -> list[str]:
    """Name the settings that SimpleTuner's command line cannot express, and set their `values` to None."""
    lost = [
        key
        for key, default in CrepaSettings(block_index=0).model_dump().items()
        if key not in (*KNOWN_KEYS, "teacher_cache", "cumulative_neighbors") and values[key] != default
    ]
    if _is_irepa(crepa):
        lost = [key for key in lost if key not in ("projector", "spatial_norm")]
    # There it is compared with a sum of cosines, here with a correlation.
    lost += ["similarity_threshold"] * (crepa.objective == "relation" and crepa.similarity_threshold is not None)
    lost += ["cumulative_neighbors"] * (crepa.cumulative_neighbors and crepa.adjacent_distance > 1)
    lost += ["encoder_image_size"] * isinstance(crepa.encoder_image_size, str)
    lost += ["encoder"] * (crepa.encoder_teaches and crepa.encoder not in ENCODERS)
    notes = [f"crepa.{key} = {shown(values[key])} has no counterpart in SimpleTuner and was left out" for key in lost]
    values |= dict.fromkeys(lost)
    return notes
