"""One run from Python: from resolved settings to model card.

```python
from crepa_cli import api

profile = api.resolve("t2v", {"model.family": "wan", "data.path": "clips"}).profile
run = api.train(profile, listeners=[print])
print(run.weights)
```
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from crepa_cli.data.cache import Cache, cache_folder
from crepa_cli.data.clips import clips_folder
from crepa_cli.data.dataset import ClipDataset
from crepa_cli.data.encoder import encoder_config
from crepa_cli.data.healing import Healing
from crepa_cli.data.held_out import divided, scan_all
from crepa_cli.data.online import OnlineTeacher
from crepa_cli.data.prepare import prepare
from crepa_cli.data.prompts import prompt_key
from crepa_cli.data.scan import ClipForm, PreparedClip
from crepa_cli.data.sources import dataset_needs
from crepa_cli.errors import UserError
from crepa_cli.events import Event, Notice, Progress, RunOpened, TrainingEnded, TrainingStarted
from crepa_cli.follow import Listener, StopRequest, follow
from crepa_cli.hub.download import download as download_needs
from crepa_cli.hub.question import ask_anew, unreachable
from crepa_cli.memory.out_of_memory import advice_on_memory
from crepa_cli.memory.savings import with_setting
from crepa_cli.memory.shapes import largest_attention
from crepa_cli.memory.shortage import shortage_of_run
from crepa_cli.models.attention import described, fastest
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.family import Family
from crepa_cli.processes import PRECISION, from_all, from_main, start_processes
from crepa_cli.profile import Profile
from crepa_cli.publish import push
from crepa_cli.report.card import write_model_card
from crepa_cli.report.events_file import EventsFile
from crepa_cli.report.loading import loading_lines
from crepa_cli.report.metrics import MetricsFile
from crepa_cli.report.plot import CurvesFile
from crepa_cli.report.trackers import Trackers
from crepa_cli.requests import Requests
from crepa_cli.runs.capabilities import (
    attention_mistakes,
    compile_mistakes,
    dtype_mistakes,
    kernel_mistakes,
    process_mistakes,
)
from crepa_cli.runs.checks import attempt, open_family, open_run
from crepa_cli.runs.facts import write_facts
from crepa_cli.runs.folder import RunFolder
from crepa_cli.runs.prompts import Prompts, negative_prompt, read_prompts, sampled_texts, with_prompts, with_prompts_of
from crepa_cli.runs.resume import resume_mistakes
from crepa_cli.runs.sources import at_commits, commits, keep_commits, needs
from crepa_cli.runs.warnings import neighbor_warnings, setting_warnings
from crepa_cli.settings import resolve
from crepa_cli.training.batches import Batches
from crepa_cli.training.build import coefficient_schedule
from crepa_cli.training.checkpointer import Checkpointer
from crepa_cli.training.checkpoints import checkpoint_to_resume, read_progress
from crepa_cli.training.experts import build_experts
from crepa_cli.training.held_out import HeldOutLoss
from crepa_cli.training.peak import device_memory, device_name
from crepa_cli.training.sheets import reference_clip
from crepa_cli.training.skipped import RUN, SkippedSteps
from crepa_cli.training.trainer import Trainer
from crepa_cli.training.validator import Validator

__all__ = ["Requests", "check", "download", "fill_cache", "push", "resolve", "train"]

Events = Generator[Event, None, None]


def check(profile: Profile, *, resume: bool = False) -> Family:
    """Find the mistakes in the settings that can be found before any work: clips, checkpoint, run folder.

    Args:
        profile: the resolved settings.
        resume: whether they are to resume the run in `train.output`.

    Returns:
        The family with its checkpoint.

    Raises:
        UserError: says what is wrong and what to do.
    """
    family = open_run(profile, resumes=resume)
    if resume:
        _run_to_resume(profile)
    else:
        RunFolder.next(profile)
    return family


def _run_to_resume(profile: Profile) -> RunFolder:
    """The run in `train.output`, which can be resumed with these settings."""
    run = RunFolder.to_resume(profile.train.output)
    if mistakes := resume_mistakes(resolve(str(run.profile)).profile, profile):
        raise UserError("\n".join(mistakes))
    return run


def train(
    profile: Profile,
    *,
    output: Path | str | None = None,
    resume: bool = False,
    verify_cache: bool = False,
    listeners: Sequence[Listener] = (),
    should_stop: StopRequest = lambda: False,
    requests: Requests | None = None,
) -> RunFolder:
    """Prepare the clips, train, and write weights and model card.

    Metrics, curves and trackers are written by the main process, beside what the `listeners` do.

    Args:
        profile: the resolved settings, from `resolve`.
        output: the run's folder, in place of `train.output`.
        resume: resume the run in that folder from its newest checkpoint.
        verify_cache: verify every entry of the cache first, rather than each when it is read.
        listeners: called with every event, in order.
        should_stop: asked between micro-batches, between steps of a sampler, and between items of the preparation;
            once it is true, a checkpoint is saved and the run ends early.
        requests: asks for a checkpoint or a validation between two steps.

    Returns:
        The run's folder. A run that was stopped has no weights yet.

    Raises:
        UserError: a mistake in the settings or clips.
        RunError: the training failed; a message about memory says what would lower it.
        Stopped: a signal such as Ctrl-C asked the run to stop, and a checkpoint is saved; a KeyboardInterrupt.
    """
    profile = _with_output(profile, output)
    state = start_processes()
    profile, family = _opened(profile, resume=resume)
    if mistakes := [
        *dtype_mistakes(profile, state.device),
        *compile_mistakes(profile, state.device),
        *attention_mistakes(profile, family, state.device),
        *kernel_mistakes(profile, family, state.device),
        *process_mistakes(profile, family, state.num_processes),
    ]:
        raise UserError("\n".join(mistakes))
    # One process decides: once it has made the folder, the others would find a run in it.
    run = from_main(lambda: _run_to_resume(profile) if resume else RunFolder.claim(profile))
    if resume:
        profile = with_prompts_of(resolve(str(run.profile)).profile, profile)
    accelerator = _accelerator(profile)
    with ExitStack() as stack:
        stack.enter_context(advice_on_memory(profile, family, accelerator.device))
        if state.is_main_process and not resume:
            listeners = [stack.enter_context(_removed_unless_started(run)), *listeners]
        if state.is_main_process:
            if resume:
                run.write_profile(profile)
            curves = CurvesFile(run, profile.crepa.similarity_threshold)
            trackers = stack.enter_context(closing(Trackers(profile, run, listeners)))
            listeners = [MetricsFile(run.metrics), curves, EventsFile(run.events), trackers, *listeners]
        last = follow(
            lambda should_stop: _run(
                *(profile, family, run, accelerator, should_stop, requests), resume=resume, verify_cache=verify_cache
            ),
            listeners,
            should_stop,
        )
    accelerator.end_training()
    if state.is_main_process and isinstance(last, TrainingEnded) and last.weights is not None:
        # The prompts may be captions, which the settings of the run hold alone.
        write_model_card(run, family, with_prompts_of(resolve(str(run.profile)).profile, profile))
    return run


def fill_cache(
    profile: Profile,
    *,
    verify_cache: bool = False,
    listeners: Sequence[Listener] = (),
    should_stop: StopRequest = lambda: False,
) -> None:
    """Prepare the clips for later runs, and train nothing; see `train`."""
    start_processes()
    profile, family = _opened(profile)
    accelerator = Accelerator(mixed_precision=PRECISION[profile.model.dtype])
    follow(lambda _: _prepared(profile, family, accelerator, verify_cache=verify_cache), listeners, should_stop)


def download(profile: Profile, *, listeners: Sequence[Listener] = (), should_stop: StopRequest = lambda: False) -> None:
    """Download what a run needs, for a machine that will train without network; see `train`."""
    start_processes()
    profile = from_main(lambda: _pinned(profile, resume=False))
    family = open_family(profile)
    follow(lambda _: _downloaded(profile, family), listeners, should_stop)


def _opened(profile: Profile, *, resume: bool = False) -> tuple[Profile, Family]:
    """The settings with the commits of their models, and the family with its checkpoint.

    Raises:
        UserError: lists all mistakes.
    """
    mistakes: list[str] = []
    pinned = attempt(mistakes, lambda: from_main(lambda: _pinned(profile, resume=resume))) or profile
    family = attempt(mistakes, lambda: open_run(pinned, resumes=resume))
    if family is None or mistakes:
        # A repository that does not exist is a mistake for both.
        raise UserError("\n".join(dict.fromkeys("\n".join(mistakes).splitlines())))
    return pinned, family


def _pinned(profile: Profile, *, resume: bool) -> Profile:
    """The settings with the commits of the models; a resumed run stays at its own."""
    if resume:
        saved = RunFolder.to_resume(profile.train.output).profile
        profile = keep_commits(resolve(str(saved)).profile, profile)
    return at_commits(profile, commits(profile))


class _Prepared(NamedTuple):
    """Everything that comes of the preparation."""

    clips: list[PreparedClip]
    held_out: list[PreparedClip]
    cache: Cache
    form: ClipForm


def _run(
    profile: Profile,
    family: Family,
    run: RunFolder,
    accelerator: Accelerator,
    should_stop: StopRequest,
    requests: Requests | None,
    *,
    resume: bool,
    verify_cache: bool,
) -> Events:
    """Prepare, build the trainer, train."""
    yield RunOpened(
        run.path,
        device_memory(accelerator.device),
        loading_lines(run, family, profile),
        f"{family.base.shown_name}, {family.task}",
        device_name(accelerator),
    )
    for warning in setting_warnings(profile):
        yield Notice(warning)
    if shortage := shortage_of_run(profile, family, accelerator.device):
        yield Notice(shortage)
    checkpoint = (yield from checkpoint_to_resume(run, profile)) if resume else None
    prepared = yield from _prepared(profile, family, accelerator, verify_cache=verify_cache)
    for warning in neighbor_warnings(profile.crepa, family, (clip.bucket.frames for clip in prepared.clips)):
        yield Notice(warning)
    profile = from_main(lambda: with_prompts(profile, prepared.clips, run))
    prompts = yield from read_prompts(profile, family, prepared.cache, accelerator.device)
    if profile.train.attention == "auto" and accelerator.device.type == "cuda" and family.attention_heads:
        attention = largest_attention(profile, family, {clip.bucket for clip in prepared.clips})
        times = from_main(lambda: attention.times(accelerator.device))
        profile = with_setting(profile, "train", "attention", fastest(times))
        yield Notice(described(times))
    yield Progress("loading", 0, 1, "the transformer")
    trainer = _build_trainer(profile, family, run, accelerator, prepared, prompts, checkpoint)
    if accelerator.is_main_process:
        write_facts(run, family, [clip.clip.captions for clip in prepared.clips], device_name(accelerator))
    yield from trainer.train(should_stop, requests or Requests())


def _downloaded(profile: Profile, family: Family) -> Events:
    """Bring the models of a run onto this machine; an error in one process is raised in all."""
    if silence := unreachable():
        yield Notice(f"{silence.reason}; the run uses what is on this machine")
    failures: list[UserError] = []
    try:
        yield from download_needs([*needs(profile, family), *dataset_needs(profile.data)])
    except UserError as error:
        failures.append(error)
    # This run needs no more of it, and the next one in this process wants fresh answers.
    ask_anew()
    for failure in from_all(failures):
        raise failure


def _prepared(
    profile: Profile, family: Family, accelerator: Accelerator, *, verify_cache: bool
) -> Generator[Event, None, _Prepared]:
    """Fill the cache with everything that depends on the clips alone."""
    yield from _downloaded(profile, family)
    crepa, form = profile.crepa, ClipForm.of(profile.data)
    damaged: list[str] = []
    cache = Cache(
        cache_folder(profile.data),
        on_damage=lambda path, reason: damaged.append(f"{path.name} in the cache is made again: {reason}"),
        verify=verify_cache,
    )
    dtype = torch_dtype(profile.model.dtype)
    texts, negative = [*sampled_texts(profile.validation, family), ""], negative_prompt(profile.validation, family)
    reads_features = crepa.encoder_teaches and crepa.teacher_cache and not coefficient_schedule(profile).finished(0)
    stored = crepa if reads_features else None
    folder, found = clips_folder(profile.data), scan_all(family, profile)
    clips = yield from prepare(
        *(family, folder, form, stored, texts, cache, accelerator.device, dtype, negative, found),
        feature_dtype=profile.data.feature_dtype,
    )
    for message in damaged:
        yield Notice(message)
    return _Prepared(*divided(clips, profile), cache, form)


def _build_trainer(
    profile: Profile,
    family: Family,
    run: RunFolder,
    accelerator: Accelerator,
    prepared: _Prepared,
    prompts: Prompts,
    checkpoint: Path | None,
) -> Trainer:
    crepa = profile.crepa
    progress = read_progress(checkpoint) if checkpoint else {}
    teacher_size = encoder_config(crepa)["hidden_size"] if crepa.encoder_teaches else family.hidden_size
    dtype, cache = torch_dtype(profile.model.dtype), prepared.cache
    empty_key = prompt_key(family, "", dtype)
    healing = Healing(family, crepa, cache, dtype, profile.data.feature_dtype)
    experts = build_experts(profile, family, teacher_size, accelerator, checkpoint)
    online = crepa.encoder_teaches and not crepa.teacher_cache and experts.aligns
    clips, held_out = (
        ClipDataset(some, cache, empty_key, dtype, healing) for some in (prepared.clips, prepared.held_out)
    )
    reference = reference_clip(prepared.clips, profile.validation.prompts)
    measures = prepared.held_out and profile.validation.every
    # Checkpoints of earlier versions counted the skipped steps of the run alone.
    skipped = progress.get("skipped", {RUN: progress.get("skipped_in_a_row", 0)})
    return Trainer(
        profile,
        family,
        run,
        experts,
        Batches(clips, family, profile, accelerator, experts.aligns),
        Checkpointer(run, profile.checkpoints.keep, accelerator),
        Validator(profile, family, prompts, prepared.form, run, accelerator, reference),
        accelerator,
        OnlineTeacher(family, crepa, accelerator.device) if online else None,
        SkippedSteps(profile.train.max_skipped_steps, skipped),
        progress.get("step", 0),
        HeldOutLoss(held_out, family, profile, accelerator, progress.get("held_out")) if measures else None,
    )


def _with_output(profile: Profile, output: Path | str | None) -> Profile:
    if output is None:
        return profile
    return profile.model_copy(update={"train": profile.train.model_copy(update={"output": str(output)})})


def _accelerator(profile: Profile) -> Accelerator:
    """Device, precision and processes."""
    return Accelerator(
        mixed_precision=PRECISION[profile.model.dtype],
        # The trainer accumulates by itself; without the plugin an environment variable would divide the gradients.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


@contextmanager
def _removed_unless_started(run: RunFolder) -> Iterator[Listener]:
    """Remove a new run that fails before its training starts, so that `--resume` picks none without a beginning.

    A run that is stopped in its preparation stays: there is nothing wrong with it. Yields the listener that notices
    the start.
    """
    started = False

    def notice(event: Event) -> None:
        nonlocal started
        started = started or isinstance(event, TrainingStarted)

    try:
        yield notice
    except Exception:
        if not started:
            run.remove()
        raise
