"""`crepa doctor`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crepa_cli.cli.flags import CheckpointFlag, DataFlag, ModelFlag, ProfileFlag, SetFlag, TaskFlag, one_folder
from crepa_cli.cli.project import project_file, write_settings
from crepa_cli.cli.terminal import interactive
from crepa_cli.errors import UserError

if TYPE_CHECKING:
    from crepa_cli.doctor.findings import Report
    from crepa_cli.doctor.fit import Target
    from crepa_cli.events import Event
    from crepa_cli.profile import Profile, ResolvedProfile

Flag = typer.Option
Listener = Callable[["Event"], None]


def doctor(
    profile: ProfileFlag = None,
    model: ModelFlag = None,
    checkpoint: CheckpointFlag = None,
    task: TaskFlag = None,
    data: DataFlag = None,
    vram: Annotated[
        float | None, Flag(help="Memory of the GPU to plan for, in GB (10^9 bytes); default: this machine's.", min=0)
    ] = None,
    fit: Annotated[
        float | None,
        Flag(metavar="GB", help="Find the settings that cost the least time and fit a GPU of this size.", min=0),
    ] = None,
    write: Annotated[bool, Flag("--write", help="Write the settings that --fit finds to crepa.toml.")] = False,
    demo: Annotated[bool, Flag("--demo", help="Check a tiny model and generated clips; downloads nothing.")] = False,
    contact_sheet: Annotated[
        Path | None,
        Flag(metavar="FILE.png", help="Show one frame of each clip, as it is trained on, with its caption."),
    ] = None,
    sets: SetFlag = None,
    as_json: Annotated[bool, Flag("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Check whether training would start here, and say what to do if it would not.

    It checks the settings that `crepa train` would use.
    Without flags and crepa.toml, it checks only the machine.
    Exit code 0: training would start; 2: wrong settings or clips; 1: otherwise.
    """
    from rich.console import Console

    from crepa_cli.profile.files import find_project_file
    from crepa_cli.settings import resolve

    flags = {"model.family": model, "model.checkpoint": checkpoint, "model.task": task, "data.path": one_folder(data)}
    given = any([profile, *flags.values(), demo, sets]) or find_project_file(Path()) is not None
    settings = (lambda: resolve(profile, flags, sets or [], demo=demo)) if given else None
    if write and fit is None:
        raise UserError("--write needs --fit GB, which finds what is written")
    if fit is not None and settings is None:
        raise UserError("--fit: there are no settings to fit; name a family with --model, or run crepa init first")
    if contact_sheet is not None:
        if settings is None:
            raise UserError("--contact-sheet: there are no clips to show; name their settings, or run crepa init first")
        if contact_sheet.suffix.lower() != ".png":
            raise UserError(f"--contact-sheet {contact_sheet}: it is a PNG; give its name the ending .png")
    project = project_file(model) if write else None
    with _progress() as listener:
        report = _examine(settings, demo, vram, fit, contact_sheet, listener)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        report.show(Console())
    if project and report.plan and report.plan.fit and report.plan.profile:
        found = {one.name: one.value for one in report.plan.fit.settings}
        write_settings(project, report.plan.profile["model"]["family"], found)
    raise typer.Exit(report.exit_code)


@contextmanager
def _progress() -> Iterator[Listener]:
    """A listener that says on stderr what is worked on: on one line in a terminal, at least every 10 s elsewhere."""
    from rich.console import Console

    from crepa_cli.events import Progress
    from crepa_cli.report.plain import PlainLines, describe

    console = Console(stderr=True)
    if not interactive(console):
        with PlainLines(console, every=1) as lines:
            yield lambda event: lines(event) if isinstance(event, Progress) else None
        return
    with console.status("checking this machine") as status:
        yield lambda event: status.update(describe(event)) if isinstance(event, Progress) else None


def _examine(
    resolve: Callable[[], ResolvedProfile] | None,
    demo: bool,
    vram: float | None,
    fit: float | None,
    contact_sheet: Path | None,
    listener: Listener,
) -> Report:
    """Check the machine, and the plan if there are settings and the libraries can be imported."""
    from crepa_cli.doctor.environment import check_environment
    from crepa_cli.doctor.findings import Report

    machine = Report(check_environment(), None)
    if machine.exit_code:
        return machine
    from crepa_cli.doctor.fit import training_target
    from crepa_cli.doctor.plan import check_plan
    from crepa_cli.events import Progress

    def report(work: str) -> None:
        listener(Progress("checking", 0, 1, work))

    size = vram if fit is None else fit
    target = training_target(None if size is None else round(size * 10**9))
    if resolve is None:
        return _overview(machine, target, report)
    plan = check_plan(
        resolve,
        demo=demo,
        target=target,
        fit=fit is not None,
        contact_sheet=contact_sheet,
        listener=listener,
        report=report,
    )
    return Report(machine.environment, plan)


def _overview(machine: Report, target: Target, report: Callable[[str], None]) -> Report:
    """The machine, and the memory that each family would need on it, or on a GPU if it has none."""
    from crepa_cli.doctor.disk import check_folder
    from crepa_cli.doctor.findings import Check, Report
    from crepa_cli.doctor.overview import family_memories
    from crepa_cli.settings import resolve

    def preset(family: str, task: str) -> Profile:
        return resolve(task, {"model.family": family}).profile

    found = list(family_memories(preset, target, report))
    checks = [one for one in found if isinstance(one, Check)]
    environment = [*machine.environment, check_folder("runs folder", Path("runs")), *checks]
    return Report(environment, None, [one for one in found if not isinstance(one, Check)])
