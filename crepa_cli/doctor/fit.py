"""Whether training fits a device, and what to change if it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

import psutil
import torch
from rich.filesize import decimal

from crepa_cli.data.buckets import Bucket
from crepa_cli.doctor.findings import BucketCount, Memory, Plan
from crepa_cli.memory.fit import fastest_fit, lightest
from crepa_cli.memory.prediction import Prediction, pinned_memory, predict
from crepa_cli.memory.savings import Fitting, Saving, largest_that_fits, last_that_holds, savings
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.memory.shortage import host_shortage
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.runs.checks import configured


class Target(NamedTuple):
    """The device that trains, and the bytes that it has free; None if they are unknown."""

    device: torch.device
    free: int | None


def check_memory(plan: Plan, family: Family, profile: Profile, target: Target, report: Callable[[str], None]) -> None:
    """Predict the memory of the plan's largest bucket, and compare it with the memory of the device.

    Args:
        plan: receives the check and the figures.
        family: of the checkpoint.
        profile: the resolved settings.
        target: the device that trains.
        report: receives a line of text on what is being predicted.
    """
    bucket = largest_bucket(plan.buckets) or form_bucket(profile, family)
    report("predicting memory")
    prediction = plan.attempt("memory", lambda: predict(profile, family, bucket, target.device))
    if prediction is None:
        return
    saved = savings(profile, family, bucket, target.device, lambda setting: report(f"predicting memory with {setting}"))
    # The prediction is for one process; sharding reduces it by an amount that is not known here.
    limit = None if profile.train.sharding else target.free
    fits = limit is None or prediction.peak <= limit
    fitting = None
    if limit is not None and not fits:
        fitting = largest_that_fits(
            profile,
            family,
            bucket,
            target.device,
            limit,
            lambda shape: report(f"searching for what fits: {shape}"),
        )
    plan.memory = Memory(**asdict(prediction), peak=prediction.peak, limit=limit, savings=saved, fitting=fitting)
    message = _message(prediction, bucket, limit)
    if profile.train.sharding:
        message += " in a single process; train.sharding lowers it by an amount that is not predicted"
    elif limit is not None and fits and (frames := longest_that_fits(profile, family, bucket, target, report)):
        message += f"; clips of up to {frames} frames fit at this size"
    plan.add("memory", "fine" if fits else "failure", message, _advice(prediction, limit, saved, fitting))
    _check_host(plan, family, profile, bucket, target.device)


def check_fit(plan: Plan, family: Family, profile: Profile, target: Target, report: Callable[[str], None]) -> None:
    """Search for the settings that cost the least time and fit the device, whose size is known; see `check_memory`."""
    plan.attempt("memory", lambda: _add_fit(plan, family, profile, target, report))


def _add_fit(plan: Plan, family: Family, profile: Profile, target: Target, report: Callable[[str], None]) -> None:
    bucket, device, limit = largest_bucket(plan.buckets) or form_bucket(profile, family), target.device, target.free
    assert limit is not None, "it is given"
    fit = fastest_fit(profile, family, bucket, device, limit, lambda tried: report(f"predicting memory with {tried}"))
    chosen = fit.profile if fit else lightest(profile, device)
    family = configured(family, chosen)
    prediction = predict(chosen, family, bucket, device)
    message, fitting = _message(prediction, bucket, limit), None
    if fit is None:
        fitting = largest_that_fits(
            chosen, family, bucket, device, limit, lambda shape: report(f"searching for what fits: {shape}")
        )
        advice = _advice(prediction, limit, [], fitting)
        plan.add("memory", "failure", f"{message}, with all settings that reduce it", advice)
    elif not fit.settings:
        plan.add("memory", "fine", f"{message}, with the settings as they are")
    else:
        plan.add("memory", "fine", f"{message}, with {fit}; {fit.price}")
    if fit:
        _check_host(plan, family, chosen, bucket, device)
    plan.fit = fit
    plan.memory = Memory(**asdict(prediction), peak=prediction.peak, limit=limit, savings=[], fitting=fitting)


def _check_host(plan: Plan, family: Family, profile: Profile, bucket: Bucket, device: torch.device) -> None:
    """Say how much memory of the host the settings pin; whether this one has it, if it has the GPU that trains."""
    pinned = pinned_memory(profile, family, bucket, device)
    shortage = host_shortage(profile, pinned) if torch.cuda.is_available() else ""
    if pinned:
        plan.add("host", "warning" if shortage else "fine", shortage or f"{decimal(pinned)} of its memory are pinned")


def longest_that_fits(
    profile: Profile, family: Family, bucket: Bucket, target: Target, report: Callable[[str], None]
) -> int | None:
    """The most frames beyond those of a bucket that fits, up to four times as many; None if no more fit.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        bucket: a shape that fits.
        target: the device that trains, with known memory.
        report: receives a line of text on what is being predicted.
    """

    def fits(frames: int) -> bool:
        report(f"searching for the longest clips that fit: {frames} frames")
        longer = Bucket(frames, bucket.height, bucket.width)
        return target.free is None or predict(profile, family, longer, target.device).peak <= target.free

    step = family.frame_multiple
    lengths = range(bucket.frames + step, 4 * bucket.frames, step)
    # A few lengths are enough for advice, and each takes a few seconds.
    return last_that_holds(lengths[:: max(1, len(lengths) // 7)], fits)


def largest_bucket(buckets: Sequence[BucketCount]) -> Bucket | None:
    """The shape with the most pixels; None without buckets."""
    if not buckets:
        return None
    largest = max(buckets, key=lambda one: one.frames * one.height * one.width)
    return Bucket(largest.frames, largest.height, largest.width)


def training_target(gpu_bytes: int | None) -> Target:
    """The device that would train.

    Args:
        gpu_bytes: memory of a GPU to plan for; None for this machine: its first GPU, or its CPU.
    """
    if gpu_bytes is not None:
        return Target(torch.device("cuda"), gpu_bytes)
    if not torch.cuda.is_available():
        return Target(torch.device("cpu"), psutil.virtual_memory().available)
    try:
        return Target(torch.device("cuda"), torch.cuda.mem_get_info(0)[0])
    except RuntimeError:
        return Target(torch.device("cuda"), None)


def _message(prediction: Prediction, bucket: Bucket, limit: int | None) -> str:
    shape = f"{bucket.width}x{bucket.height}, {bucket.frames} frames"
    if prediction.validation == prediction.peak:
        shape = "validation videos"
    taken = f"peak of {decimal(prediction.peak)} for {shape}"
    return taken if limit is None else f"{taken}; {decimal(limit)} available"


def _advice(prediction: Prediction, limit: int | None, saved: Sequence[Saving], fitting: Fitting | None) -> str:
    if fitting is None or limit is None:
        return ""
    lines = []
    if prediction.validation > limit:
        lines.append(f"--set validation.every=0 turns off the validation, which takes {decimal(prediction.validation)}")
    if fitting.validation_frames:
        lines.append(f"--set validation.frames={fitting.validation_frames} fits a validation")
    training_fits = prediction.without_validation <= limit
    if not training_fits:
        lines += [f"--set {one.setting} saves {decimal(one.saved)} in training" for one in saved[:3]]
    if fitting.frames:
        lines.append(f"with no other change, --set data.frames={fitting.frames} fits")
    if fitting.width:
        size = f"--set data.width={fitting.width} --set data.height={fitting.height}"
        lines.append(f"with no other change, {size} fits")
    if not training_fits and not fitting.frames and not fitting.width:
        lines.append("no length and no size fits with no other change: combine settings, or use a smaller checkpoint")
    return "\n".join(lines)
