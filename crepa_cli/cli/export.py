"""`crepa export`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from crepa_cli.cli.flags import RunArgument

Program = Literal["diffusers", "comfyui"]
Dtype = Literal["bf16", "bfloat16", "fp32", "float32"]
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def export(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest by default.")] = None,
    program: Annotated[
        Program | None, typer.Option("--format", help="Program to export for; by default those of the run.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Data type of the weights; by default that of the run.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add the LoRA to the weights of the base model.")] = False,
) -> None:
    """Export the weights of a run from one of its checkpoints."""
    from crepa_cli.errors import UserError
    from crepa_cli.libraries import silence_libraries
    from crepa_cli.runs.checks import export_mistakes, load_checkpoint
    from crepa_cli.runs.folder import RunFolder
    from crepa_cli.settings import resolve
    from crepa_cli.training.export_run import export_run

    silence_libraries()
    folder = RunFolder.existing(run)
    profile = resolve(str(folder.profile), {}).profile
    changes = {"export": (program,) if program else None, "export_dtype": DTYPES.get(dtype or "", dtype)}
    adapter = profile.adapter.model_copy(update={key: value for key, value in changes.items() if value is not None})
    profile = profile.model_copy(update={"adapter": adapter})
    family = load_checkpoint(profile)
    if mistakes := export_mistakes(family, adapter):
        raise UserError("\n".join(mistakes))
    for exports in export_run(folder, family, profile, step=step, merge=merge):
        names = {"diffusers": exports.transformer if merge or adapter.kind == "full" else exports.diffusers}
        names["comfyui"] = exports.comfyui
        for name in adapter.export:
            typer.echo(f"{name}: {exports.folder / names[name]}")
