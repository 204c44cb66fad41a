"""`crepa init`: a crepa.toml for this folder."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crepa_cli.cli.completion import family_names, json_files, profile_names, task_names
from crepa_cli.cli.flags import FAMILY_HELP, PROFILE_HELP, CheckpointFlag, DataFlag, one_folder
from crepa_cli.cli.terminal import interactive
from crepa_cli.errors import UserError

if TYPE_CHECKING:
    from crepa_cli.models.family import Family
    from crepa_cli.profile import Profile
    from crepa_cli.profile.simpletuner import Imported


@dataclass
class _Choices:
    """Choices made by flags or answers so far."""

    model: str | None
    task: str | None
    profile: str | None
    checkpoint: str | None
    data: str | None
    vram: float | None
    prompts: list[str] | None = None
    images: list[str] | None = None


def init(
    model: Annotated[str | None, typer.Option(help=FAMILY_HELP, metavar="FAMILY", autocompletion=family_names)] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Text to video or image to video.", metavar="t2v|i2v", autocompletion=task_names),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help=PROFILE_HELP, metavar="NAME|FILE", autocompletion=profile_names),
    ] = None,
    checkpoint: CheckpointFlag = None,
    data: DataFlag = None,
    vram: Annotated[
        float | None,
        typer.Option(min=1, help="Memory of the GPU in GB (10^9 bytes), to choose settings that fit.", metavar="GB"),
    ] = None,
    from_json: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Start from a configuration of SimpleTuner, takenoko or musubi-tuner (JSON or TOML).",
            metavar="FILE",
            autocompletion=json_files,
        ),
    ] = None,
    to_json: Annotated[
        Path | None,
        typer.Option(
            "--to",
            help="Write the crepa_* keys of this folder's settings as JSON.",
            metavar="FILE",
            autocompletion=json_files,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    list_presets: Annotated[bool, typer.Option("--list", help="List the presets and the recipes.")] = False,
) -> None:
    """Write a crepa.toml for this folder, from a preset or from another trainer's configuration.

    In a terminal, it asks for everything that no flag gives; in notebooks and CI, it never asks.
    """
    if list_presets:
        _show_presets()
        _show_recipes()
    elif to_json is not None:
        _export(to_json, profile, {"model.family": model, "model.task": task}, force=force)
    else:
        _create(_Choices(model, task, profile, checkpoint, one_folder(data), vram), from_json, force=force)


def _show_presets() -> None:
    from crepa_cli.profile import preset_purpose, presets

    for name, path in presets().items():
        typer.echo(f"{name:<18}{preset_purpose(path)}")


def _show_recipes() -> None:
    from crepa_cli.profile import recipes

    typer.echo("\nRecipes, for a family and the memory of a card:")
    typer.echo(textwrap.fill(", ".join(recipes()), 100, break_on_hyphens=False))


def _create(choices: _Choices, from_json: Path | None, *, force: bool) -> None:
    from rich.console import Console

    from crepa_cli.profile import presets
    from crepa_cli.profile.project import SCHEMA_FILE, project_settings, refuse_to_overwrite, write_project

    folder = Path()
    if not force:
        refuse_to_overwrite(folder)
    config = None if from_json is None else _read(from_json)
    if sys.stdin.isatty() and interactive(Console()):
        try:
            _ask(choices, config)
        except EOFError as error:
            raise UserError("not all questions were answered; nothing was written") from error
    imported = None if config is None else _imported(config, str(from_json), choices)
    if choices.profile is None and imported is None:
        choices.profile = choices.task if choices.task in presets() else "t2v"
    settings = project_settings(
        profile=choices.profile,
        imported=imported.settings if imported else (),
        flags={
            "model.family": choices.model,
            "model.task": choices.task,
            "model.checkpoint": choices.checkpoint,
            "data.path": choices.data,
            "validation.prompts": choices.prompts,
            "validation.images": choices.images,
        },
        folder=folder,
        families=family_names(),
    )
    with Console(stderr=True).status("checking the settings"):
        settings, planned, notes = _checked(settings, choices.vram, may_shorten=imported is None)
    write_project(settings, planned, folder)
    typer.echo(f"Wrote crepa.toml and {SCHEMA_FILE}.")
    for note in imported.notes if imported else ():
        typer.echo(f"  {note}")
    if imported and imported.without_counterpart:
        _show_without_counterpart(imported.without_counterpart, from_json)
    clips = settings.get("data", {}).get("path")
    if clips is None:
        typer.echo("Where are the clips? Set path in [data], or give --data to crepa train.")
    elif not Path(clips).is_dir():
        typer.echo(f"The folder {clips} does not exist yet: put clips there before training.")
    for note in notes:
        typer.echo(note)
    typer.echo("Next: crepa doctor, then crepa train.")


def _checked(
    settings: dict[str, Any], vram: float | None, *, may_shorten: bool
) -> tuple[dict[str, Any], Profile, list[str]]:
    """The settings that fit the GPU, the profile that they describe, and what to say about them.

    Args:
        settings: by table and key, with the name of a preset.
        vram: memory of the GPU in GB; None to leave the settings as they are.
        may_shorten: whether shorter clips are an answer; another trainer's configuration is converted for its own.

    Raises:
        UserError: if the checkpoint can be read, and the settings are not for it.
    """
    from crepa_cli.libraries import silence_libraries
    from crepa_cli.models import family_defaults
    from crepa_cli.profile.layers import complete
    from crepa_cli.profile.project import lighter_clips

    silence_libraries()
    from crepa_cli.runs.checks import family_mistakes, image_mistakes, load_checkpoint

    candidates = [settings]
    if vram is not None and may_shorten:
        candidates.append(_completed(settings, lighter_clips(vram)))
    profile = complete(settings, family_defaults)
    try:
        family = load_checkpoint(profile)
    except UserError as error:
        settings = candidates[-1]
        return settings, complete(settings, family_defaults), [f"Blocks and sizes were not checked: {error}"]
    # An imported configuration may name prompts, but no images that crepa could read.
    open_ = image_mistakes(profile.validation, profile.model.task)
    if mistakes := [one for one in family_mistakes(family, profile) if one not in open_]:
        raise UserError("\n".join(mistakes))
    notes = [f"Before training: {mistake}" for mistake in open_]
    if vram is None:
        return settings, profile, notes
    for settings in candidates:
        profile = complete(settings, family_defaults)
        fitted, said = _fitted(settings, profile, family, vram)
        if fitted is not None:
            return fitted, complete(fitted, family_defaults), [*notes, *said]
    return settings, profile, [*notes, *said]


def _completed(settings: Mapping[str, Any], further: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """The settings with those of `further` that they do not have."""
    return {**settings, **{table: {**values, **settings.get(table, {})} for table, values in further.items()}}


def _fitted(
    settings: Mapping[str, Any], profile: Profile, family: Family, vram: float
) -> tuple[dict[str, Any] | None, list[str]]:
    """The settings with those that the GPU needs, if any make them fit, and what to say about that."""
    import torch
    from rich.filesize import decimal

    from crepa_cli.memory.fit import cheapest_fit
    from crepa_cli.memory.prediction import predict
    from crepa_cli.memory.shapes import form_bucket

    device, bucket = torch.device("cuda"), form_bucket(profile, family)
    try:
        fit = cheapest_fit(profile, family, bucket, device, round(vram * 10**9))
        if fit is None:
            peak = predict(profile, family, bucket, device).peak
            needed = f"These settings need {decimal(peak)} of GPU memory, and there are {vram:g} GB"
            return None, [f"{needed}. What would fit: crepa doctor --fit {vram:g}"]
    except UserError as error:
        return {**settings}, [f"The memory was not predicted: {error}"]
    found: dict[str, Any] = {**settings}
    for table, key, value in fit.settings:
        found[table] = {**found.get(table, {}), key: value}
    return found, [f"For {vram:g} GB of GPU memory: {fit}; {fit.price}"] if fit.settings else []


def _read(path: Path) -> dict[str, Any]:
    from crepa_cli.profile.files import read_text
    from crepa_cli.profile.simpletuner import read_config

    return read_config(read_text(path, str(path)), str(path))


def _imported(config: Mapping[str, Any], label: str, choices: _Choices) -> Imported:
    from crepa_cli.libraries import silence_libraries
    from crepa_cli.models import family_defaults
    from crepa_cli.models.flavours import FLAVOURS
    from crepa_cli.profile.layers import complete
    from crepa_cli.profile.simpletuner import import_config

    flags = {"family": choices.model, "task": choices.task, "checkpoint": choices.checkpoint}

    def latent_frames(settings: Mapping[str, object]) -> int:
        silence_libraries()
        model = {name.removeprefix("model."): value for name, value in settings.items()}
        model |= {name: value for name, value in flags.items() if value is not None}
        without_checkpoint = {name: value for name, value in model.items() if name != "checkpoint"}
        for stated in (model, without_checkpoint):
            try:
                return _latent_frames(complete({"model": stated}, family_defaults))
            except UserError:  # an unknown family, which the check of all settings refuses, or an unknown checkpoint
                continue
        return 1

    return import_config(config, label, FLAVOURS, latent_frames)


def _latent_frames(profile: Profile) -> int:
    """Frames of a clip's latents."""
    return (profile.data.frames - 1) // _frame_multiple(profile) + 1


def _frame_multiple(profile: Profile) -> int:
    """Video frames in a latent frame; if the checkpoint cannot be read, those of the family's default one."""
    from crepa_cli.models import load_family
    from crepa_cli.runs.checks import load_checkpoint

    try:
        return load_checkpoint(profile).frame_multiple
    except UserError:
        kind, task = load_family(profile.model.family), profile.model.task
        return kind(kind.checkpoints.get(task, ""), task).frame_multiple


def _with_tau_in_frames(profile: Profile) -> Profile:
    """The profile with the decay constant of the neighbor weights in latent frames, the only unit of other trainers."""
    crepa = profile.crepa
    if crepa.adjacent_tau_seconds is None:
        return profile
    tau = crepa.tau(_frame_multiple(profile) / profile.data.fps)
    changes = {"adjacent_tau": tau, "adjacent_tau_seconds": None}
    return profile.model_copy(update={"crepa": crepa.model_copy(update=changes)})


def _show_without_counterpart(options: Mapping[str, object], path: Path | None) -> None:
    from crepa_cli.profile.describe import shown

    typer.echo(f"These options of {path} have no counterpart in crepa and were ignored:")
    for name, value in options.items():
        typer.echo(f"  {name} = {shown(value)}")


def _ask(choices: _Choices, config: Mapping[str, Any] | None) -> None:
    """Ask for what is still open; with another trainer's configuration, that is at most the family and the clips."""
    from rich.prompt import FloatPrompt, Prompt

    from crepa_cli.profile import presets

    said = {name.lstrip("-") for name in config or ()}
    everything_said = config is not None or None not in (choices.model, choices.profile, choices.data, choices.vram)
    if choices.model is None and "model_family" not in said:
        choices.model = Prompt.ask("Model family", choices=family_names(), default=family_names()[0])
    if config is None and choices.profile is None:
        if choices.task is None:
            choices.task = Prompt.ask("Text to video or image to video", choices=["t2v", "i2v"], default="t2v")
        _show_presets()
        choices.profile = Prompt.ask("Preset", choices=list(presets()), default=choices.task)
    if choices.data is None:
        choices.data = Prompt.ask("Folder of clips", default="clips")
    if config is None and choices.vram is None:
        name, memory = detected_gpu() or ("no NVIDIA GPU found", 24.0)
        choices.vram = FloatPrompt.ask(f"GPU memory in GB ({name})", default=memory)
    if not everything_said:
        _ask_prompts(choices)


def _ask_prompts(choices: _Choices) -> None:
    """Ask for prompts until an empty answer; without any, training takes captions of the clips."""
    from rich.prompt import Prompt

    prompts, images = [], []
    question = "Prompt to sample videos from (empty: two captions of your clips)"
    while prompt := Prompt.ask(question, default="", show_default=False):
        prompts.append(prompt)
        if "i2v" in (choices.task, choices.profile):
            images.append(Prompt.ask("Image that this video starts from"))
        question = "Another prompt (empty: no more)"
    if prompts:
        choices.prompts, choices.images = prompts, images or None


def detected_gpu() -> tuple[str, float] | None:
    """Name and memory in GB of the first NVIDIA GPU; None if nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        name, _, mebibytes = output.splitlines()[0].rpartition(",")
        return name, round(float(mebibytes) * 2**20 / 10**9, 1)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _export(path: Path, profile: str | None, flags: Mapping[str, object], *, force: bool) -> None:
    from crepa_cli.files import write_whole
    from crepa_cli.libraries import silence_libraries
    from crepa_cli.models import family_defaults
    from crepa_cli.profile import resolve_profile
    from crepa_cli.profile.files import exists, read_text
    from crepa_cli.profile.simpletuner import export_crepa, read_config

    config = {}
    if exists(path):
        if not force:
            raise UserError(f"{path}: already exists; --force replaces its crepa_* options and keeps the others")
        config = read_config(read_text(path, str(path)), str(path))
    silence_libraries()
    resolved = resolve_profile(
        profile=profile,
        flags=flags,
        sets=(),
        folder=Path(),
        family_defaults=family_defaults,
    )
    exported = export_crepa(_with_tau_in_frames(resolved.profile), config, lambda: _latent_frames(resolved.profile))
    text = json.dumps(exported.config, indent=4, ensure_ascii=False)
    write_whole(path, f"{text}\n".encode())
    typer.echo(f"Wrote the crepa_* options to {path}.")
    for note in exported.notes:
        typer.echo(f"  {note}")
