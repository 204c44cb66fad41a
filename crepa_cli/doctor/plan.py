"""The plan of a training run: profile, checkpoint, teacher, clips, disk and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.filesize import decimal

from crepa_cli.data.cache import cache_folder, check_writable
from crepa_cli.data.clips import clips_folder
from crepa_cli.data.encoder import encoder_config, encoder_need
from crepa_cli.data.held_out import divided, scan_all
from crepa_cli.data.scan import PreparedClip
from crepa_cli.data.sources import clips_here, dataset_needs
from crepa_cli.demo import write_demo
from crepa_cli.doctor.cache_size import cache_bytes
from crepa_cli.doctor.clips import describe_buckets, describe_held_out, describe_sources, enlarged
from crepa_cli.doctor.contact_sheet import add_contact_sheet
from crepa_cli.doctor.disk import check_folder
from crepa_cli.doctor.findings import BucketCount, Plan
from crepa_cli.doctor.fit import Target, check_fit, check_memory
from crepa_cli.doctor.hub import check_hub, check_need
from crepa_cli.doctor.looks import check_looks
from crepa_cli.errors import counted
from crepa_cli.events import ClipSkipped, Event, Notice, drained
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.profile import CrepaSettings, DataSettings, Profile, ResolvedProfile
from crepa_cli.runs.checks import missing_optimizer, missing_trackers, open_family
from crepa_cli.runs.folder import RunFolder
from crepa_cli.runs.prompts import negative_prompt, sampled_texts
from crepa_cli.runs.sources import needs
from crepa_cli.runs.warnings import neighbor_warnings, setting_warnings

Listener = Callable[[Event], None]


def check_plan(
    resolve: Callable[[], ResolvedProfile],
    *,
    demo: bool,
    target: Target,
    fit: bool = False,
    contact_sheet: Path | None = None,
    listener: Listener,
    report: Callable[[str], None],
) -> Plan:
    """Check everything that training needs, in the same order, continuing after a mistake as far as possible.

    Args:
        resolve: returns the settings.
        demo: write the demo's files first.
        target: the device that trains.
        fit: search for settings with which the run fits it.
        contact_sheet: the PNG file that shows the clips; None for none.
        listener: receives the events of scanning the clips.
        report: receives a line of text on what is being predicted.
    """
    plan = Plan(fit_asked=fit)
    resolved = plan.attempt("profile", resolve)
    if resolved is None:
        return plan
    profile = resolved.profile
    plan.profile = profile.model_dump(mode="json", by_alias=True)
    plan.add("profile", "fine", f"{profile.model.family} {profile.model.task}, {counted(profile.train.steps, 'step')}")
    for warning in setting_warnings(profile):
        plan.add("settings", "warning", warning)
    if demo:
        plan.attempt("demo", lambda: write_demo(profile))
    teacher = _teacher(profile.crepa)
    plan.checks += check_hub([(profile.model.repository, profile.model.revision), *_encoder(teacher)])
    family = plan.attempt("checkpoint", lambda: open_family(profile))
    if family:
        _check_checkpoint(plan, family, profile)
    teacher_known = teacher is None or _check_teacher(plan, teacher)
    optimizer_known = _check_packages(plan, profile)
    _check_run_folder(plan, profile)
    cache_known = _check_cache_folder(plan, profile)
    clips = _check_clips(plan, family, profile, contact_sheet, listener)
    if family and teacher_known and clips and cache_known:
        _check_cache(plan, family, profile, clips)
    if family and teacher_known and optimizer_known:
        (check_fit if fit else check_memory)(plan, family, profile, target, report)
    return plan


def _check_checkpoint(plan: Plan, family: Family, profile: Profile) -> None:
    aligned = f"; block {profile.crepa.block_index} is aligned" if profile.crepa.enabled else ""
    name, blocks = family.base.file or family.base.name, counted(family.block_count, "block")
    message = f"{name}: {blocks} of width {family.hidden_size}{aligned}"
    plan.add("checkpoint", "fine", message)
    check = plan.attempt("weights", lambda: check_need("weights", needs(profile, family)[0]))
    if check:
        plan.checks.append(check)


def _encoder(crepa: CrepaSettings | None) -> list[tuple[str, str | None]]:
    """Name and revision of the teacher, if there is one."""
    need = encoder_need(crepa) if crepa else None
    return [(need.name, need.revision)] if need else []


def _teacher(crepa: CrepaSettings) -> CrepaSettings | None:
    """The settings of the encoder if it is the teacher."""
    return crepa if crepa.encoder_teaches else None


def _check_teacher(plan: Plan, crepa: CrepaSettings) -> bool:
    """Whether the encoder's configuration can be read."""
    config = plan.attempt("teacher", lambda: encoder_config(crepa))
    if config is None:
        return False
    check = plan.attempt("teacher", lambda: check_need("teacher", encoder_need(crepa)))
    if check:
        plan.checks.append(check)
    return True


def _check_packages(plan: Plan, profile: Profile) -> bool:
    """Whether the optimizer is installed; the trackers are checked as well."""
    optimizer = missing_optimizer(profile)
    for name, missing in {"optimizer": optimizer, "tracker": missing_trackers(profile)}.items():
        for message, command in missing.items():
            plan.add(name, "failure", message, command)
    return not optimizer


def _check_run_folder(plan: Plan, profile: Profile) -> None:
    folder = plan.attempt("run folder", lambda: RunFolder.next(profile))
    if folder:
        plan.checks.append(check_folder("run folder", folder.path))


def _check_cache_folder(plan: Plan, profile: Profile) -> bool:
    """Whether the cache can be written."""
    data, failures = profile.data, len(plan.checks)
    if data.all_sources:
        plan.attempt("cache", lambda: check_writable(cache_folder(data), clips_folder(data)))
    return len(plan.checks) == failures


def _check_datasets(plan: Plan, data: DataSettings) -> bool:
    """Whether the datasets of the Hub are on this machine."""
    here = True
    for need in dataset_needs(data):
        check = plan.attempt("clips", partial(check_need, "clips", need))
        plan.checks += [check] if check else []
        here = here and check is not None and check.status == "fine"
    return here


def _check_clips(
    plan: Plan, family: Family | None, profile: Profile, contact_sheet: Path | None, listener: Listener
) -> list[PreparedClip] | None:
    """The usable clips, those that are held out among them; the plan names the skipped ones."""
    if plan.attempt("clips", lambda: clips_folder(profile.data)) is None or not _check_datasets(plan, profile.data):
        return None
    if family is None:
        plan.attempt("clips", lambda: clips_here(profile.data))
        return None

    def listen(event: Event) -> None:
        listener(event)
        if isinstance(event, ClipSkipped):
            plan.skipped[event.name] = event.reason
            plan.add("clip", "warning", f"skipped {event.name}: {event.reason}")
        elif isinstance(event, Notice):
            plan.add("clips", "warning", event.message)

    found = plan.attempt("clips", lambda: drained(scan_all(family, profile), listen))
    if found:
        clips, held_out = divided(found, profile)
        counts = Counter(clip.bucket for clip in clips)
        plan.buckets = [BucketCount(key.frames, key.height, key.width, counts[key]) for key in sorted(counts)]
        plan.add("clips", "fine", describe_buckets(plan.buckets, profile.data, family))
        if profile.data.sources:
            plan.add("sources", "fine", describe_sources(clips, profile.data))
        if message := enlarged(clips):
            advice = "use larger clips, or lower data.width and data.height"
            plan.add("clips", "warning", message, advice)
        for warning in neighbor_warnings(profile.crepa, family, (clip.bucket.frames for clip in clips)):
            plan.add("clips", "warning", warning)
        if held_out:
            plan.add("held-out clips", "fine", describe_held_out(len(held_out), len(found), profile.data))
        check_looks(plan, found, profile.data, listen)
        if contact_sheet is not None:
            add_contact_sheet(plan, contact_sheet, found, profile.data, listen)
    return found


def _check_cache(plan: Plan, family: Family, profile: Profile, clips: list[PreparedClip]) -> None:
    captions = {caption for clip in clips for caption in clip.clip.captions}
    texts = captions | {*sampled_texts(profile.validation, family), ""}
    prompts = len(texts) + bool(negative_prompt(profile.validation, family))
    stored = _teacher(profile.crepa) if profile.crepa.teacher_cache else None
    buckets = [clip.bucket for clip in clips]
    dtype = torch_dtype(profile.model.dtype)
    feature_dtype = profile.data.feature_dtype
    parts = plan.attempt("cache", lambda: cache_bytes(family, buckets, prompts, dtype, stored, feature_dtype))
    if parts is None:
        return
    plan.cache_bytes = parts
    folder = cache_folder(profile.data)
    by_part = ", ".join(f"{name} {decimal(size)}" for name, size in parts.items())
    total = sum(parts.values())
    contents = f"{decimal(total)} for these clips, {decimal(total // len(clips))} for each ({by_part}); "
    plan.checks.append(check_folder("cache", folder, total, contents))
