"""A run from its settings to its weights: checks, preparation, training."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from crepa_cli.data.cache import Cache, cache_folder
from crepa_cli.data.clips import clips_folder
from crepa_cli.data.dataset import ClipDataset
from crepa_cli.data.online import OnlineTeacher
from crepa_cli.data.prepare import ClipForm, encoder_config, prepare, prompt_key
from crepa_cli.events import Event, Notice
from crepa_cli.models.checkpoint import fetch
from crepa_cli.models.family import Family
from crepa_cli.processes import PRECISION, from_main
from crepa_cli.profile import Profile
from crepa_cli.training.checkpoints import newest_checkpoint
from crepa_cli.training.trainer import Trainer


def make_accelerator(profile: Profile, output: Path) -> Accelerator:
    """Device, precision, processes and trackers."""
    return Accelerator(
        mixed_precision=PRECISION[profile.model.dtype],
        log_with=list(profile.report.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "trackers")),
    )


def train(
    profile: Profile,
    family: Family,
    output: Path,
    accelerator: Accelerator,
    *,
    resume: bool,
    cache_only: bool,
    should_stop: Callable[[], bool],
) -> Generator[Event, None, None]:
    """Prepare the clips, then train; yields what happens.

    Args:
        profile: the resolved settings.
        family: from `open_family`.
        output: the run's folder.
        accelerator: from `make_accelerator`.
        resume: go on from the newest checkpoint of the folder.
        cache_only: prepare, and stop before training.
        should_stop: asked after each step.

    Raises:
        UserError: if no clip is usable, or there is nothing to go on from.
        RunError: if the training fails.
    """
    folder, form = clips_folder(profile.data), ClipForm.of(profile.data)
    # Without network this ends here, not after an hour of reading clips.
    fetch(family.checkpoint, family.revision, folders=())
    checkpoint = (yield from _newest_checkpoint(output)) if resume else None
    damaged: list[str] = []
    cache = Cache(
        cache_folder(profile.data),
        on_damage=lambda path, reason: damaged.append(f"{path.name} in the cache is made again: {reason}"),
    )
    crepa = profile.crepa
    dtype = getattr(torch, profile.model.dtype)
    texts = [*profile.validation.prompts, ""]
    encoder_teaches = crepa.enabled and not crepa.use_backbone_features
    stored = crepa if encoder_teaches and crepa.teacher_cache else None
    clips = yield from prepare(family, folder, form, stored, texts, cache, accelerator.device, dtype)
    for message in damaged:
        yield Notice(message)
    if cache_only:
        return
    prompts = [cache.read("prompts", prompt_key(family, text, dtype)) for text in texts]
    online = OnlineTeacher(family, crepa, accelerator.device) if encoder_teaches and not stored else None
    feature_size = encoder_config(crepa)["hidden_size"] if encoder_teaches else family.hidden_size
    trainer = Trainer(
        profile,
        family,
        ClipDataset(clips, cache, prompt_key(family, "", dtype)),
        prompts,
        form,
        output,
        accelerator,
        feature_size,
        online,
        checkpoint,
    )
    yield from trainer.run(should_stop)


def _newest_checkpoint(output: Path) -> Generator[Event, None, Path | None]:
    """The checkpoint to go on from; None where the run has not come to its first one."""
    path, damaged = from_main(lambda: newest_checkpoint(output / "checkpoints"))
    for message in damaged:
        yield Notice(message)
    if path is None:
        yield Notice(f"{output} has no complete checkpoint: it starts from step 0")
    return path
