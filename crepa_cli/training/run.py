"""A run from its settings to its weights: checks, preparation, training."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from crepa_cli.data.cache import Cache
from crepa_cli.data.dataset import ClipDataset
from crepa_cli.data.online import OnlineTeacher
from crepa_cli.data.prepare import ClipForm, encoder_config, prepare, prompt_key
from crepa_cli.errors import UserError
from crepa_cli.events import Event, Notice
from crepa_cli.models import load_family
from crepa_cli.models.checkpoint import fetch, require_index
from crepa_cli.models.family import Family
from crepa_cli.processes import from_main
from crepa_cli.profile import DataSettings, Profile
from crepa_cli.training.adapter import export_mistakes
from crepa_cli.training.checkpoints import newest_checkpoint
from crepa_cli.training.sampling import image_mistakes
from crepa_cli.training.trainer import Trainer

PRECISION = {"bfloat16": "bf16", "float32": "no"}
CACHE_FOLDER = ".crepa-cache"


def open_family(profile: Profile) -> Family:
    """The family of the settings with its checkpoint, checked against what the settings ask of it.

    Raises:
        UserError: lists all that does not fit: family, checkpoint, task, block indices, sizes, images, layouts.
    """
    model, crepa = profile.model, profile.crepa
    assert model.checkpoint is not None, "the family's defaults give a checkpoint"
    family = load_family(model.family)(model.checkpoint, model.task, model.revision, model.variant)
    layersync = profile.layersync
    indices: dict[str, int | None] = {"crepa.block_index": crepa.block_index} if crepa.enabled else {}
    if crepa.enabled and crepa.use_backbone_features:
        indices["crepa.teacher_block_index"] = crepa.teacher_block_index
    if layersync.enabled:
        indices |= {
            "layersync.student_block": layersync.student_block,
            "layersync.teacher_block": layersync.teacher_block,
        }
    sizes = {"data.width": profile.data.width, "data.height": profile.data.height}
    mistakes = []
    for name, index in indices.items():
        try:
            require_index(name, index or 0, family.block_count)
        except UserError as error:
            mistakes.append(str(error))
    for name, size in sizes.items():
        if size and size % family.size_multiple:
            lower = size // family.size_multiple * family.size_multiple
            mistakes.append(
                f"{name} = {size}: {family.name} takes multiples of {family.size_multiple}, "
                f"such as {lower or family.size_multiple} or {lower + family.size_multiple}"
            )
    mistakes += image_mistakes(profile.validation, model.task)
    mistakes += export_mistakes(family, profile.adapter)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return family


def clip_form(data: DataSettings) -> ClipForm:
    """The size, length and frame rate of the settings."""
    assert data.width is not None, "the family's defaults give a width"
    assert data.height is not None, "and a height"
    assert data.frames is not None, "and a number of frames"
    assert data.fps is not None, "and a frame rate"
    return ClipForm(data.width, data.height, data.frames, data.fps)


def clips_folder(data: DataSettings) -> Path:
    """The folder of clips of the settings.

    Raises:
        UserError: if there is none.
    """
    if data.path is None:
        raise UserError("no clips: name their folder with --data DIR, or as path in [data] of crepa.toml")
    return Path(data.path)


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
    folder, form = clips_folder(profile.data), clip_form(profile.data)
    # Without network this ends here, not after an hour of reading clips.
    fetch(family.checkpoint, family.revision, folders=())
    checkpoint = (yield from _newest_checkpoint(output)) if resume else None
    damaged: list[str] = []
    cache = Cache(
        Path(profile.data.cache) if profile.data.cache else folder / CACHE_FOLDER,
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


def new_run_folder(profile: Profile) -> Path:
    """The folder of a new run: `train.output`, or the next free one of `runs/<family>-<task>-<number>`.

    Raises:
        UserError: if `train.output` holds a run already.
    """
    if profile.train.output is None:
        stem = f"{profile.model.family}-{profile.model.task}"
        numbers = [int(match[1]) for path in Path("runs").glob("*") if (match := _numbered(stem, path))]
        return Path("runs") / f"{stem}-{max(numbers, default=0) + 1}"
    output = Path(profile.train.output)
    if (output / "profile.toml").exists():
        raise UserError(f"{output} holds a run already: add --resume to go on with it, or choose another --output")
    return output


def run_to_resume(output: str | None) -> Path:
    """The folder of the run to go on with: `output`, or the one in `runs/` that was worked on last.

    Raises:
        UserError: if there is no run.
    """
    if output is None:
        runs = [path.parent for path in Path("runs").glob("*/profile.toml")]
        if not runs:
            raise UserError("nothing to resume: there is no run in runs/; name its folder with --output")
        return max(runs, key=lambda run: max(path.stat().st_mtime for path in run.iterdir()))
    if not Path(output, "profile.toml").is_file():
        raise UserError(f"nothing to resume: {output} holds no run; leave --resume out to start one there")
    return Path(output)


def _numbered(stem: str, path: Path) -> re.Match[str] | None:
    return re.fullmatch(rf"{re.escape(stem)}-(\d+)", path.name)
