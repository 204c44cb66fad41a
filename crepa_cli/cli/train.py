"""`crepa train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TextIO, cast

import typer

from crepa_cli.cli.flags import CheckpointFlag, DataFlag, ModelFlag, ProfileFlag, SetFlag, TaskFlag, one_folder
from crepa_cli.cli.launch import check_processes, launch, launched
from crepa_cli.cli.push import push_run
from crepa_cli.cli.terminal import LastingOutput
from crepa_cli.cli.view import LogLevel, View, open_view, print_settings
from crepa_cli.errors import RunError, UserError
from crepa_cli.libraries import silence_libraries
from crepa_cli.requests import Requests

if TYPE_CHECKING:
    from crepa_cli.profile import Profile
    from crepa_cli.runs.folder import RunFolder

Flag = typer.Option
Only = Literal["download", "cache"] | None


class _Push(NamedTuple):
    """The repository that the run is pushed to, and what takes the lines on it."""

    name: str
    private: bool
    say: Callable[[str], None]


def train(
    profile: ProfileFlag = None,
    model: ModelFlag = None,
    checkpoint: CheckpointFlag = None,
    task: TaskFlag = None,
    data: DataFlag = None,
    steps: Annotated[int | None, Flag(help="Optimizer steps.")] = None,
    output: Annotated[str | None, Flag(help="Folder of the run; a new one in runs/ by default.")] = None,
    resume: Annotated[bool, Flag("--resume", help="Resume a run from its newest checkpoint.")] = False,
    demo: Annotated[bool, Flag("--demo", help="Train a tiny model on generated clips; downloads nothing.")] = False,
    plain: Annotated[bool, Flag("--plain", help="Plain lines instead of the dashboard.")] = False,
    quiet: Annotated[bool, Flag("--quiet", help="Print only problems, to standard error.")] = False,
    log_level: Annotated[LogLevel, Flag(help="Show log messages of libraries from this level on.")] = "warning",
    print_profile: Annotated[bool, Flag("--print-profile", help="Show the settings, and train nothing.")] = False,
    cache_only: Annotated[bool, Flag("--cache-only", help="Prepare the clips, and train nothing.")] = False,
    download_only: Annotated[bool, Flag("--download-only", help="Download the models, and train nothing.")] = False,
    verify_cache: Annotated[
        bool, Flag("--verify-cache", help="Verify the whole cache before training, not each entry when it is read.")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        Flag("--push-to-hub", metavar="NAME", help="Push the run to this repository of the Hub at its end."),
    ] = None,
    private: Annotated[bool, Flag("--private", help="Make the repository of --push-to-hub private.")] = False,
    processes: Annotated[int, Flag(min=1, help="Processes to start on this machine, one for each GPU.")] = 1,
    sets: SetFlag = None,
) -> None:
    """Fine-tune a video diffusion transformer with cross-frame alignment."""
    from rich.console import Console

    from crepa_cli.runs.folder import RunFolder
    from crepa_cli.settings import resolve

    if sys.stdout and sys.stdout.isatty() and not (quiet or print_profile):
        # Imports take several seconds, and a screen must not stay blank for so long.
        typer.echo("starting: loading PyTorch and diffusers")
    silence_libraries()
    if private and push_to_hub is None:
        raise UserError("--private is for the repository of --push-to-hub NAME, which is not given")
    named = output is not None
    if resume:
        run = RunFolder.to_resume(output)
        output = str(run.path)
        # The run was made with settings of its own: the demo's would change it.
        profile = str(run.profile) if profile is None or demo else profile
    flags = {
        "model.family": model,
        "model.checkpoint": checkpoint,
        "model.task": task,
        "data.path": one_folder(data),
        "train.steps": steps,
        "train.output": output,
    }
    resolved = resolve(profile, flags, sets or [], demo=demo and not resume)
    # Python has no standard output if the caller closed it.
    console = Console(file=cast(TextIO, LastingOutput(sys.stdout))) if sys.stdout else Console()

    def say(line: str) -> None:
        if not quiet:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    pushes = _Push(push_to_hub, private, say) if push_to_hub and not (cache_only or download_only) else None
    if print_profile:
        print_settings(resolved, console)
    elif processes > 1 and not launched():
        _check_launch(resolved.profile, processes, pushes, resume=resume, demo=demo)
        raise typer.Exit(launch(processes))
    else:
        if resume and not named and os.environ.get("RANK", "0") == "0":
            say(f"resuming {output}, the run in runs/ that was written to last")
        requests = Requests()
        view = open_view(resolved.profile, console, requests, plain=plain, quiet=quiet, log_level=log_level)
        only: Only = "download" if download_only else "cache" if cache_only else None
        options = {"resume": resume, "demo": demo, "verify_cache": verify_cache}
        raise typer.Exit(_train(resolved.profile, view, requests, pushes, only, **options))


def _check_launch(profile: Profile, processes: int, pushes: _Push | None, *, resume: bool, demo: bool) -> None:
    """Validate once, before the processes start and each repeats the error."""
    from crepa_cli import api
    from crepa_cli.demo import write_demo

    if demo:
        write_demo(profile)
    api.check(profile, resume=resume)
    check_processes(processes)
    if pushes:
        _claim(profile, pushes, resume=resume)


def _claim(profile: Profile, pushes: _Push, *, resume: bool) -> str:
    """The owner/name of the repository that the run can be pushed to, which is made if need be."""
    from crepa_cli import api
    from crepa_cli.hub.push import claim_repository
    from crepa_cli.publish import identity
    from crepa_cli.runs.folder import RunFolder

    # A repository is not made for a run that will not start.
    api.check(profile, resume=resume)
    run = RunFolder.to_resume(profile.train.output) if resume else None
    return claim_repository(pushes.name, identity(run), private=pushes.private)


def _train(
    profile: Profile,
    view: View,
    requests: Requests,
    pushes: _Push | None,
    only: Only,
    *,
    resume: bool,
    demo: bool,
    verify_cache: bool,
) -> int:
    """Run the training, push the run if that was asked for, and return the exit code."""
    from crepa_cli import api
    from crepa_cli.demo import write_demo
    from crepa_cli.processes import from_main, start_processes
    from crepa_cli.signals import Stopped

    state = start_processes()
    if demo:
        with state.local_main_process_first():
            write_demo(profile)
    if pushes:
        pushes = pushes._replace(name=from_main(partial(_claim, profile, pushes, resume=resume)))
    try:
        with view as listeners:
            if only == "download":
                api.download(profile, listeners=listeners)
                return 0
            if only == "cache":
                api.fill_cache(profile, verify_cache=verify_cache, listeners=listeners)
                return 0
            run = api.train(profile, resume=resume, verify_cache=verify_cache, listeners=listeners, requests=requests)
    except Stopped as stop:
        return 128 + stop.number
    if pushes and state.is_main_process:
        _push(run, pushes)
    return 0


def _push(run: RunFolder, pushes: _Push) -> None:
    try:
        push_run(run, pushes.name, private=pushes.private, say=pushes.say)
    except UserError as error:
        again = f"crepa push {run.path} {pushes.name}"
        raise RunError(f"{run.path} was trained, but not pushed: {error}. To try again: {again}") from error
