"""`crepa init`: a crepa.toml for this folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crepa_cli.cli.completion import family_names, json_files, preset_names, task_names
from crepa_cli.cli.terminal import interactive
from crepa_cli.errors import UserError

if TYPE_CHECKING:
    from crepa_cli.profile.simpletuner import Imported


@dataclass
class _Choices:
    """Choices made by flags or answers so far."""

    model: str | None
    task: str | None
    profile: str | None
    data: str | None
    vram: float | None


def init(
    model: Annotated[
        str | None, typer.Option(help="Model family.", metavar="FAMILY", autocompletion=family_names)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Text to video or image to video.", metavar="t2v|i2v", autocompletion=task_names),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Preset or TOML file to start from.", metavar="NAME|FILE", autocompletion=preset_names),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of clips.", metavar="FOLDER")] = None,
    vram: Annotated[
        float | None, typer.Option(min=1, help="Memory of the GPU in GiB, to choose settings that fit.", metavar="GIB")
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
    list_presets: Annotated[bool, typer.Option("--list", help="List the presets and their purposes.")] = False,
) -> None:
    """Write a crepa.toml for this folder, from a preset or from another trainer's configuration.

    In a terminal, it asks for everything that no flag gives; in notebooks and CI, it never asks.
    """
    if list_presets:
        _show_presets()
    elif to_json is not None:
        _export(to_json, profile, {"model.family": model, "model.task": task}, force=force)
    else:
        _create(_Choices(model, task, profile, data, vram), from_json, force=force)


def _show_presets() -> None:
    from crepa_cli.profile import preset_purpose, presets

    for name, path in presets().items():
        typer.echo(f"{name:<18}{preset_purpose(path)}")


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
        vram=choices.vram,
        imported=imported.settings if imported else (),
        flags={"model.family": choices.model, "model.task": choices.task, "data.path": choices.data},
        folder=folder,
        families=family_names(),
    )
    write_project(settings, folder)
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
    typer.echo("Next: crepa doctor, then crepa train.")


def _read(path: Path) -> dict[str, Any]:
    from crepa_cli.profile.files import read_text
    from crepa_cli.profile.simpletuner import read_config

    return read_config(read_text(path, str(path)), str(path))


def _imported(config: Mapping[str, Any], label: str, choices: _Choices) -> Imported:
    from crepa_cli.models import family_defaults
    from crepa_cli.models.flavours import FLAVOURS
    from crepa_cli.profile.project import memory_settings
    from crepa_cli.profile.simpletuner import import_config

    def latent_frames(model: Mapping[str, object]) -> int:
        family, task = (choices.model or model.get("model.family"), choices.task or model.get("model.task", "t2v"))
        if family not in family_names() or task not in ("t2v", "i2v"):
            return 1  # The check of all settings refuses it.
        defaults = family_defaults(str(family), str(task))
        layers = (defaults, memory_settings(choices.vram) if choices.vram else {})
        frames = [layer["data"]["frames"] for layer in layers if "frames" in layer.get("data", {})]
        checkpoint = model.get("model.checkpoint", defaults["model"]["checkpoint"])
        return _latent_frames(str(family), str(task), str(checkpoint), int(str(frames[-1])))

    return import_config(config, label, FLAVOURS, latent_frames)


def _latent_frames(family: str, task: str, checkpoint: str, frames: int) -> int:
    """Frames of a clip's latents; if the checkpoint cannot be read, with the VAE of the family's default one."""
    from crepa_cli.cli.view import silence_libraries
    from crepa_cli.models import load_family

    silence_libraries()
    from crepa_cli.models.hub import go_offline_without_hub

    kind = load_family(family)
    go_offline_without_hub()
    try:
        opened = kind(checkpoint, task)
    except UserError:
        opened = kind(kind.checkpoints[task], task)
    return (frames - 1) // opened.frame_multiple + 1


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
        choices.vram = FloatPrompt.ask(f"GPU memory in GiB ({name})", default=memory)


def detected_gpu() -> tuple[str, float] | None:
    """Name and memory in GiB of the first NVIDIA GPU; None if nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        name, _, mebibytes = output.splitlines()[0].rpartition(",")
        return name, round(float(mebibytes) / 1024, 1)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _export(path: Path, profile: str | None, flags: Mapping[str, object], *, force: bool) -> None:
    from crepa_cli.files import write_whole
    from crepa_cli.models import family_defaults
    from crepa_cli.profile import resolve_profile
    from crepa_cli.profile.files import exists, read_text
    from crepa_cli.profile.simpletuner import export_crepa, read_config

    config = {}
    if exists(path):
        if not force:
            raise UserError(f"{path}: already exists; --force replaces its crepa_* options and keeps the others")
        config = read_config(read_text(path, str(path)), str(path))
    resolved = resolve_profile(
        profile=profile,
        flags=flags,
        sets=(),
        folder=Path(),
        family_defaults=family_defaults,
    )
    model, frames = resolved.profile.model, resolved.profile.data.frames
    exported = export_crepa(
        resolved.profile, config, lambda: _latent_frames(model.family, model.task, model.checkpoint, frames)
    )
    text = json.dumps(exported.config, indent=4, ensure_ascii=False)
    write_whole(path, f"{text}\n".encode())
    typer.echo(f"Wrote the crepa_* options to {path}.")
    for note in exported.notes:
        typer.echo(f"  {note}")
