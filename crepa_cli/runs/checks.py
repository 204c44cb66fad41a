"""Settings checked against the checkpoint they are for, before any clip is read."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from accelerate.tracking import get_available_trackers
from PIL import Image

from crepa_cli.data.cache import cache_folder, check_writable
from crepa_cli.data.clips import check_clips, clips_folder
from crepa_cli.data.held_out import held_out_folder
from crepa_cli.data.images import first_frame
from crepa_cli.data.sources import forms
from crepa_cli.errors import UserError
from crepa_cli.models import FAMILIES, load_family
from crepa_cli.models.dtypes import torch_dtype
from crepa_cli.models.facts import BOTH
from crepa_cli.models.family import Family
from crepa_cli.models.lora import fetch_lora, lora_rank
from crepa_cli.models.single_file import is_single_file
from crepa_cli.profile import AdapterSettings, DataSettings, ModelSettings, Profile, TrainSettings, ValidationSettings

Result = TypeVar("Result")


def open_run(profile: Profile, *, resumes: bool = False) -> Family:
    """The family with its checkpoint, for a run whose packages, cache, clips and settings have been checked.

    Args:
        profile: the resolved settings.
        resumes: whether they resume a run.

    Raises:
        UserError: lists all mistakes.
    """
    mistakes: list[str] = []
    attempt(mistakes, lambda: require_packages(profile))
    attempt(mistakes, lambda: check_folders(profile))
    family = attempt(mistakes, lambda: open_family(profile, resumes=resumes))
    if family is None or mistakes:
        raise UserError("\n".join(mistakes))
    return family


def start_mistakes(profile: Profile) -> list[str]:
    """All mistakes that `open_run` would list, without those in clips that no setting names."""
    mistakes: list[str] = []
    attempt(mistakes, lambda: require_packages(profile))
    if profile.data.all_sources:
        attempt(mistakes, lambda: check_folders(profile))
    attempt(mistakes, lambda: open_family(profile))
    return mistakes


def attempt(mistakes: list[str], check: Callable[[], Result]) -> Result | None:
    """The result of a check; if it raises a UserError, add the lines of its message to `mistakes` and return None."""
    try:
        return check()
    except UserError as error:
        mistakes += str(error).splitlines()
        return None


def check_folders(profile: Profile) -> None:
    """Check that there are clips, and that the cache can be written.

    Raises:
        UserError: if not.
    """
    folder, held_out = clips_folder(profile.data), held_out_folder(profile)
    for source in profile.data.all_sources:
        if source.path is not None:  # datasets have not been downloaded yet
            check_clips(Path(source.path))
    if held_out is not None:
        check_clips(held_out)
    check_writable(cache_folder(profile.data), folder)


def require_packages(profile: Profile) -> None:
    """Check that the packages of the optimizer and of the trackers are installed.

    Raises:
        UserError: names those that are missing, with the commands that install them.
    """
    missing = missing_optimizer(profile) | missing_trackers(profile)
    if mistakes := [f"{mistake}: {command}" for mistake, command in missing.items()]:
        raise UserError("\n".join(mistakes))


OPTIMIZER_PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
"""The package of each optimizer that is not a dependency."""


def missing_optimizer(profile: Profile) -> dict[str, str]:
    """The mistake in the settings, with the command that installs the optimizer; empty if it is installed."""
    name = profile.train.optimizer
    package = OPTIMIZER_PACKAGES.get(name)
    if package is None or find_spec(package) is not None:
        return {}
    return {f"train.optimizer: {name} needs {package}": f"pip install {package}"}


def missing_trackers(profile: Profile) -> dict[str, str]:
    """The trackers of the settings that are not installed, with the commands that install them."""
    available = [str(tracker) for tracker in get_available_trackers()]
    return {
        f"report.trackers: {name} is not installed": f"pip install {name}"
        for name in profile.report.trackers
        if name not in available
    }


def open_family(profile: Profile, *, resumes: bool = False) -> Family:
    """The family of the settings with its checkpoint, checked against the settings.

    Args:
        profile: the resolved settings.
        resumes: whether they resume a run, of which some were started when any number of frames was accepted, and
            which reads no `adapter.init_from`.

    Raises:
        UserError: lists all mistakes: family, checkpoint, task, block indices, sizes, images, export layouts.
    """
    family = load_checkpoint(profile)
    if mistakes := family_mistakes(family, profile, resumes=resumes):
        raise UserError("\n".join(mistakes))
    return family


def load_checkpoint(profile: Profile) -> Family:
    """The family of the settings with its checkpoint, of which only the configuration is read.

    Raises:
        UserError: if it cannot be read, or is not for the family and the task.
    """
    model = profile.model
    single = is_single_file(model.checkpoint)
    if model.components is not None and not single:
        raise UserError(
            f"model.components = {model.components!r}: it is for a checkpoint in one file, and {model.checkpoint} has "
            "components of its own; leave it out"
        )
    family = load_family(model.family)(model.repository, model.task, model.revision, model.variant)
    if single:
        family = family.with_file(Path(model.checkpoint))
    return configured(family, profile)


def configured(family: Family, profile: Profile) -> Family:
    """The family with the settings that say how its models run; the same object if it has them already."""
    model = profile.model
    wanted = {
        "vae_dtype": torch_dtype(model.vae_dtype),
        "vae_tiling": family.vae_tiling if model.vae_tiling is None else model.vae_tiling,
        "streams_text_encoders": profile.memory.stream_weights,
    }
    if all(getattr(family, name) == value for name, value in wanted.items()):
        return family
    family = copy(family)
    vars(family).update(wanted)
    return family


def family_mistakes(family: Family, profile: Profile, *, resumes: bool = False) -> list[str]:
    """Settings that do not go with the checkpoint; see `open_family`."""
    return [
        *_block_mistakes(family, profile),
        *_size_mistakes(family, profile.data),
        *([] if resumes else _length_mistakes(family, profile)),
        *image_mistakes(profile.validation, profile.model.task),
        *_sampling_mistakes(family, profile.validation),
        *_noise_mistakes(family, profile.train),
        *_sharding_mistakes(profile.train),
        *_expert_mistakes(family, profile),
        *memory_mistakes(profile),
        *export_mistakes(family, profile.adapter),
        *_audio_mistakes(family, profile.model),
        *([] if resumes else warm_start_mistakes(profile.adapter)),
    ]


def _block_mistakes(family: Family, profile: Profile) -> list[str]:
    crepa, layersync = profile.crepa, profile.layersync
    indices: dict[str, int | None] = {}
    if crepa.enabled:
        indices["crepa.block_index"] = crepa.block_index
        if crepa.use_backbone_features:
            indices["crepa.teacher_block_index"] = crepa.teacher_block_index
    if layersync.enabled:
        indices["layersync.student_block"] = layersync.student_block
        indices["layersync.teacher_block"] = layersync.teacher_block
    last = family.block_count - 1
    return [
        f"{name} = {index}: the transformer of {family.base.name} has {last + 1} blocks; choose one of 0 to {last}"
        for name, index in indices.items()
        if index is not None and not 0 <= index <= last
    ]


def _size_mistakes(family: Family, data: DataSettings) -> list[str]:
    mistakes = []
    sizes = [(form.width, form.height) for form in forms(data)]
    if family.only_size is not None and {family.only_size} != set(sizes):
        width, height = family.only_size
        return [
            f"data.width = {data.width}, data.height = {data.height}: {family.base.name} has learned the positions of "
            f"{width} x {height} pixels alone; set data.width = {width} and data.height = {height}"
        ]
    asked = {"data.width": data.width, "data.height": data.height} | _of_sources(data, "width", "height")
    for name, size in asked.items():
        if size % family.size_multiple:
            lower = size // family.size_multiple * family.size_multiple
            mistakes.append(
                f"{name} = {size}: {family.name} takes multiples of {family.size_multiple}, "
                f"such as {lower or family.size_multiple} or {lower + family.size_multiple}"
            )
    return mistakes


def _of_sources(data: DataSettings, *keys: str) -> dict[str, int]:
    """The values that sources have of their own, by their names in messages."""
    return {
        f"data.sources: the {key} of {source.name}": value
        for source in data.sources
        for key in keys
        if (value := getattr(source, key)) is not None
    }


def _length_mistakes(family: Family, profile: Profile) -> list[str]:
    step = family.frame_multiple
    lengths = {"data.frames": profile.data.frames, "validation.frames": profile.validation.frames}
    lengths |= _of_sources(profile.data, "frames")
    return [
        f"{name} = {frames}: {family.name} takes one frame more than a multiple of {step}, "
        f"such as {lower} or {lower + step}"
        for name, frames in lengths.items()
        if frames is not None and frames != (lower := (frames - 1) // step * step + 1)
    ]


def _noise_mistakes(family: Family, train: TrainSettings) -> list[str]:
    if train.loss_weighting == "none" or family.noise_process.can_be_weighted:
        return []
    return [
        f"train.loss_weighting = {train.loss_weighting!r}: it weights the noise levels of flow matching, and "
        f"{family.name} is trained on timesteps of its own schedule; leave it out"
    ]


def _sharding_mistakes(train: TrainSettings) -> list[str]:
    if not train.sharding or train.optimizer.startswith("adamw"):
        return []
    return [f"train.optimizer = {train.optimizer!r}: it needs whole weights, and train.sharding splits them; use adamw"]


def _expert_mistakes(family: Family, profile: Profile) -> list[str]:
    if not family.trains_all:
        return []
    adapter, one = (
        profile.adapter,
        f"train one expert after the other, with model.variant = {' or '.join(family.experts)}",
    )
    rules = {
        f"adapter.kind = 'full': model.variant = 'both' is for LoRAs; {one}": adapter.kind == "full",
        f"adapter.init_from: one LoRA cannot start both experts; {one}": adapter.init_from is not None,
        f"train.sharding: model.variant = 'both' keeps the weights whole; turn sharding off, or {one}": (
            profile.train.sharding
        ),
    }
    return [mistake for mistake, applies in rules.items() if applies]


def memory_mistakes(profile: Profile) -> list[str]:
    """Settings of memory that do not go with the others."""
    memory, train = profile.memory, profile.train
    stream, offload, idle = "memory.stream_weights", "memory.offload_activations", "memory.offload_idle_expert"
    recomputation = "train.activation_checkpointing = true and memory.keep other than 'all'"
    rules = {
        f"{stream}: it streams frozen weights, and adapter.kind = 'full' trains them all; use a LoRA": (
            memory.stream_weights and profile.adapter.kind == "full"
        ),
        f"{stream}: train.sharding keeps a share of the weights in every process already; turn one of them off": (
            memory.stream_weights and train.sharding
        ),
        f"{stream}: it needs {recomputation}, without which the backward keeps all weights": (
            memory.stream_weights and not profile.recomputes_blocks
        ),
        f"{offload}: it needs {recomputation}, whose hidden states it offloads": (
            memory.offload_activations and not profile.recomputes_blocks
        ),
        f"{stream}: memory.keep = 'attention' would take its copies for a block's own work; turn one off": (
            memory.stream_weights and memory.keep == "attention"
        ),
        f"{stream}: memory.keep_blocks would keep the weights of these blocks too; turn one off": (
            memory.stream_weights and memory.keep_blocks > 0
        ),
        "memory.keep: memory.finer_recompute recomputes what it would keep; turn one of them off": (
            memory.keep != "nothing" and memory.finer_recompute
        ),
        "memory.keep_blocks: memory.finer_recompute recomputes what it would keep; turn one of them off": (
            memory.keep_blocks > 0 and memory.finer_recompute
        ),
        f"{idle}: it is for two experts in one run; set model.variant = 'both', or turn it off": (
            memory.offload_idle_expert and profile.model.variant != BOTH
        ),
        f"{idle}: {stream} keeps the blocks of both experts on the host already; turn one of them off": (
            memory.offload_idle_expert and memory.stream_weights
        ),
        "memory.quantize_base: adapter.kind = 'full' trains the weights, which it rounds to 8 bits; use a LoRA": (
            memory.quantize_base != "none" and profile.adapter.kind == "full"
        ),
    }
    return [mistake for mistake, applies in rules.items() if applies]


def image_mistakes(validation: ValidationSettings, task: str) -> list[str]:
    """Mistakes in the images that validation videos start from."""
    if task == "t2v":
        return ["validation.images: text to video starts from no image; leave them out"] if validation.images else []
    if validation.prompts and validation.every and not validation.images:
        return ["validation.images: image to video needs one image per prompt, the first frame of its video"]
    return [mistake for path in validation.images for mistake in _unreadable(path)]


def _sampling_mistakes(family: Family, validation: ValidationSettings) -> list[str]:
    if not validation.every:
        return []
    mistakes = []
    if validation.steps < family.fewest_sampling_steps:
        mistakes.append(
            f"validation.steps = {validation.steps}: the scheduler of {family.base.name} stretches the noise levels "
            f"between the first and the last one; choose {family.fewest_sampling_steps} or more"
        )
    if validation.motion_score is not None and family.motion_suffix is None:
        mistakes.append(f"validation.motion_score: {family.name} knows no motion score; leave it out")
    return mistakes


def _unreadable(path: str) -> list[str]:
    try:
        first_frame(path, 8, 8)
    except (OSError, Image.DecompressionBombError) as error:
        return [f"validation.images: {path} cannot be read as an image: {error}"]
    return []


def export_mistakes(family: Family, adapter: AdapterSettings) -> list[str]:
    """Programs in the settings that do not run the family."""
    if "comfyui" in adapter.export and family.comfyui_names is None:
        known = [name for name in FAMILIES if load_family(name).comfyui_names is not None]
        return [f"adapter.export: ComfyUI does not run {family.name}; comfyui is for {', '.join(known)}"]
    return []


def _audio_mistakes(family: Family, model: ModelSettings) -> list[str]:
    """Whether sound is to be trained, which no family can."""
    if not model.audio:
        return []
    return [f"model.audio = true: {family.name} is trained without sound, as {family.no_audio}; leave model.audio out"]


def warm_start_mistakes(adapter: AdapterSettings) -> list[str]:
    """Whether training cannot start from the LoRA of the settings."""
    if adapter.init_from is None:
        return []
    if adapter.kind == "full":
        return [
            "adapter.init_from: a LoRA cannot start a full fine-tune: merge it with crepa export, and name the result"
        ]
    try:
        rank = lora_rank(fetch_lora(adapter.init_from))
    except UserError as error:
        return [str(error)]
    if rank != adapter.rank:
        return [f"adapter.init_from = {adapter.init_from!r}: its rank is {rank}; set adapter.rank = {rank}"]
    return []
