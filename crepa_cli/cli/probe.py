"""`crepa probe-blocks`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crepa_cli.cli.completion import family_names
from crepa_cli.cli.flags import FAMILY_HELP, CheckpointFlag, DataFlag, ProfileFlag, SetFlag, TaskFlag, one_folder
from crepa_cli.cli.progress import stage_progress
from crepa_cli.cli.project import project_file, write_settings
from crepa_cli.errors import UserError

if TYPE_CHECKING:
    from crepa_cli.models.family import Family
    from crepa_cli.probe.answer import Answer
    from crepa_cli.profile import Profile

Flag = typer.Option


def probe_blocks(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help=FAMILY_HELP, autocompletion=family_names)],
    profile: ProfileFlag = None,
    checkpoint: CheckpointFlag = None,
    task: TaskFlag = None,
    data: DataFlag = None,
    demo: Annotated[bool, Flag("--demo", help="Measure a tiny model on generated clips; downloads nothing.")] = False,
    sets: SetFlag = None,
    write: Annotated[bool, Flag("--write", help="Write the recommended block to crepa.toml.")] = False,
    plot: Annotated[Path | None, Flag(metavar="FILE.svg", help="Plot the measurement over depth.")] = None,
    as_json: Annotated[bool, Flag("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Recommend a block to align, and explain why.

    Without clips, it answers from the checkpoint's configuration.
    With --data or --demo, it measures every block.
    After Ctrl-C, the same command resumes the measurement.
    """
    from rich.console import Console

    from crepa_cli.files import write_whole
    from crepa_cli.libraries import silence_libraries
    from crepa_cli.settings import resolve

    folder = one_folder(data)
    measured = demo or folder is not None
    if (write or plot) and not measured:
        raise UserError(f"{'--write' if write else '--plot'} needs a measurement: add --data DIR or --demo")
    project = project_file(family) if write else None
    silence_libraries()
    flags = {"model.family": family, "model.checkpoint": checkpoint, "model.task": task, "data.path": folder}
    try:
        answer = _answer(resolve(profile, flags, sets or [], demo=demo).profile, measured=measured, demo=demo)
    except KeyboardInterrupt:
        typer.echo("Stopped; the same command resumes from here.", err=True)
        raise typer.Exit(130) from None
    if plot:
        from crepa_cli.probe.plot import draw_measurement

        write_whole(plot, draw_measurement(answer))
    if as_json:
        typer.echo(json.dumps(answer.to_json(), indent=2))
    else:
        from crepa_cli.probe.show import show

        show(answer, Console())
    if project and answer.recommended:
        write_settings(project, family, {"crepa.block_index": answer.recommended.block})


def _answer(profile: Profile, *, measured: bool, demo: bool) -> Answer:
    from crepa_cli.probe.answer import describe
    from crepa_cli.probe.recommend import recommend

    if demo:
        from crepa_cli.demo import write_demo

        write_demo(profile)
    opened = _open_family(profile)
    answer = describe(opened, profile.crepa.block_index)
    if not measured:
        return answer
    from crepa_cli.events import drained
    from crepa_cli.probe.measure import measure

    with stage_progress() as listener:
        measurement = drained(measure(profile, opened), listener)
    return replace(answer, measurement=measurement, recommended=recommend(measurement, answer.default))


def _open_family(profile: Profile) -> Family:
    """Open the checkpoint, ignoring the blocks and the validation that the settings name."""
    from crepa_cli.profile import LayerSyncSettings
    from crepa_cli.runs.checks import open_family

    unasked = {
        "crepa": profile.crepa.model_copy(update={"enabled": False}),
        "layersync": LayerSyncSettings(),
        "validation": profile.validation.model_copy(update={"every": 0, "prompts": (), "images": ()}),
    }
    family = open_family(profile.model_copy(update=unasked))
    if family.trains_all:
        raise UserError(
            "model.variant = 'both': the blocks of one expert are measured at a time; add "
            f"--set model.variant={' or --set model.variant='.join(family.experts)}"
        )
    return family
