"""`crepa eval`."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crepa_cli.cli.flags import CheckpointFlag, DataFlag, ModelFlag, ProfileFlag, SetFlag, TaskFlag, one_folder
from crepa_cli.cli.progress import stage_progress
from crepa_cli.errors import UserError

if TYPE_CHECKING:
    from crepa_cli.evaluate.result import Evaluation
    from crepa_cli.events import Event
    from crepa_cli.profile import Profile

Flag = typer.Option
Flags = Mapping[str, object]
OUTPUT = Path("evaluation")
NOTHING = (
    "nothing to evaluate: name the folder of a run, such as runs/mine, or a LoRA, or give folders of videos with "
    "--videos"
)


def evaluate(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Folder of a run, or a LoRA: a file, a folder or a Hub id."),
    ] = None,
    videos: Annotated[
        list[Path] | None,
        Flag(metavar="FOLDER", help="Compare videos in place of runs; repeatable, the first folder is the base."),
    ] = None,
    prompts: Annotated[
        Path | None,
        Flag(metavar="FILE", help="A prompt in each line; by default those of the run, then captions of its clips."),
    ] = None,
    seeds: Annotated[int, Flag(min=1, help="Videos of each prompt, from as many seeds.")] = 1,
    steps: Annotated[int | None, Flag(help="Denoising steps per video.")] = None,
    output: Annotated[
        Path | None, Flag(metavar="FOLDER", help="Folder of report and videos; by default in that of the first run.")
    ] = None,
    profile: ProfileFlag = None,
    model: ModelFlag = None,
    checkpoint: CheckpointFlag = None,
    task: TaskFlag = None,
    data: DataFlag = None,
    demo: Annotated[bool, Flag("--demo", help="Use the demo's tiny model and clips; downloads nothing.")] = False,
    sets: SetFlag = None,
    as_json: Annotated[bool, Flag("--json", help="Print the report as one JSON object, for scripts.")] = False,
) -> None:
    """Compare videos with those of the base model: are they steadier, and what did it cost in motion and color?

    The same prompts and seeds are sampled from the base model and from each run, with the settings of the first run.
    With --videos, files of the same name are compared.
    After Ctrl-C, the same command goes on at the next video.
    """
    from rich.console import Console

    from crepa_cli.evaluate.page import report_page
    from crepa_cli.evaluate.report import report_json
    from crepa_cli.evaluate.table import show
    from crepa_cli.events import drained
    from crepa_cli.files import write_whole
    from crepa_cli.libraries import silence_libraries

    silence_libraries()
    if runs and videos:
        raise UserError("--videos compares folders of videos: leave out the runs, or --videos")
    if not (runs or videos or demo):
        raise UserError(NOTHING)
    clips = one_folder(data)
    flags = {
        "model.family": model,
        "model.checkpoint": checkpoint,
        "model.task": task,
        "data.path": clips,
        "validation.steps": steps,
    }
    output = output or _default_output(runs or [])
    if videos:
        events = _compare(videos, clips, _settings(profile, flags, sets or [], demo=demo), output)
    else:
        events = _sample(runs or [], profile, flags, sets or [], prompts, seeds, output, demo=demo)
    try:
        with stage_progress() as listener:
            evaluation = drained(events, listener)
    except KeyboardInterrupt:
        typer.echo("Stopped; the same command goes on at the next video.", err=True)
        raise typer.Exit(130) from None
    report = report_json(evaluation, output)
    write_whole(output / "report.json", report.encode())
    write_whole(output / "report.html", report_page(evaluation).encode())
    if as_json:
        typer.echo(report, nl=False)
    else:
        show(evaluation, Console())
        typer.echo(f"\nreport: {output / 'report.html'}")


def _default_output(runs: list[str]) -> Path:
    from crepa_cli.runs.folder import RunFolder

    folders = [RunFolder(Path(run)) for run in runs]
    return next((folder.evaluation for folder in folders if folder.profile.is_file()), OUTPUT)


def _settings(profile: str | None, flags: Flags, sets: list[str], *, demo: bool) -> Profile | None:
    """The settings that flags and crepa.toml make; None if there are none, or a folder of clips alone."""
    from crepa_cli.profile.files import find_project_file

    named = any(value is not None for name, value in flags.items() if name != "data.path")
    if not (profile or named or sets or demo or find_project_file(Path())):
        return None
    return _resolved(profile, flags, sets, demo=demo)


def _resolved(profile: str | None, flags: Flags, sets: list[str], *, demo: bool = False) -> Profile:
    from crepa_cli.demo import write_demo
    from crepa_cli.settings import resolve

    resolved = resolve(profile, flags, sets, demo=demo).profile
    if demo:
        write_demo(resolved)
    return resolved


def _compare(
    folders: list[Path], clips: str | None, settings: Profile | None, output: Path
) -> Generator[Event, None, Evaluation]:
    from crepa_cli.evaluate.videos import compare_folders

    crepa = settings.crepa if settings and settings.crepa.encoder_teaches else None
    path = next((one.path for one in settings.data.all_sources if one.path), None) if settings else clips
    return compare_folders(folders, Path(path) if path else None, crepa, output)


def _sample(
    runs: list[str],
    profile: str | None,
    flags: Flags,
    sets: list[str],
    prompts: Path | None,
    seeds: int,
    output: Path,
    *,
    demo: bool,
) -> Generator[Event, None, Evaluation]:
    from crepa_cli.demo import write_demo
    from crepa_cli.evaluate.generate import Request, evaluate_runs
    from crepa_cli.runs.folder import RunFolder

    opened: list[tuple[str, Profile | None]] = []
    for run in runs:
        file = RunFolder(Path(run)).profile
        opened.append((run, _resolved(str(file), flags, sets) if file.is_file() else None))
    first = next((settings for _, settings in opened if settings), None)
    if profile is not None or first is None:
        first = _resolved(profile, flags, sets, demo=demo)
    elif demo:
        write_demo(first)
    return evaluate_runs(Request(first, opened, prompts, seeds, output))
