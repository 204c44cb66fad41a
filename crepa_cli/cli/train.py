"""`crepa train`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crepa_cli.cli.completion import family_names, preset_names
from crepa_cli.cli.launch import launch, launched
from crepa_cli.cli.view import Listener, open_view
from crepa_cli.errors import RunError, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

    from crepa_cli.events import Event
    from crepa_cli.models.family import Family
    from crepa_cli.profile import Profile, ResolvedProfile

Flag = typer.Option
OpenView = Callable[..., AbstractContextManager[list[Listener]]]
LogLevel = Literal["debug", "info", "warning", "error"]


def train(
    profile: Annotated[str | None, Flag(help="Name of a preset, or a TOML file.", autocompletion=preset_names)] = None,
    model: Annotated[str | None, Flag(help="Model family, such as wan.", autocompletion=family_names)] = None,
    checkpoint: Annotated[str | None, Flag(help="Hub id or local folder of a checkpoint.")] = None,
    task: Annotated[str | None, Flag(help="t2v (text to video) or i2v (image to video).")] = None,
    data: Annotated[str | None, Flag(help="Folder of clips with captions.")] = None,
    steps: Annotated[int | None, Flag(help="Optimizer steps.")] = None,
    output: Annotated[str | None, Flag(help="Folder of the run; a new one in runs/ by default.")] = None,
    resume: Annotated[bool, Flag("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    demo: Annotated[bool, Flag("--demo", help="Train a tiny model on generated clips; downloads nothing.")] = False,
    plain: Annotated[bool, Flag("--plain", help="Plain lines instead of the dashboard.")] = False,
    quiet: Annotated[bool, Flag("--quiet", help="Print nothing but errors.")] = False,
    log_level: Annotated[LogLevel, Flag(help="Show what libraries log at this level or above.")] = "warning",
    print_profile: Annotated[bool, Flag("--print-profile", help="Show the settings, and train nothing.")] = False,
    cache_only: Annotated[bool, Flag("--cache-only", help="Prepare the clips, and train nothing.")] = False,
    processes: Annotated[int, Flag(min=1, help="Processes to start on this machine, one for each GPU.")] = 1,
    sets: Annotated[list[str] | None, Flag("--set", help="Any setting, as table.key=value; repeatable.")] = None,
) -> None:
    """Fine-tune a video diffusion transformer with cross-frame alignment."""
    from rich.console import Console

    silence_libraries()
    if resume:
        profile, output = _run_to_resume(profile, output)
    flags = {
        "model.family": model,
        "model.checkpoint": checkpoint,
        "model.task": task,
        "data.path": data,
        "train.steps": steps,
        "train.output": output,
    }
    resolved = resolve(profile, flags, sets or [], demo)
    console = Console()
    if print_profile:
        _print_profile(resolved, console)
    elif processes > 1 and not launched():
        _check(resolved.profile, processes, resume=resume, demo=demo)
        raise typer.Exit(launch(processes))
    else:
        view = partial(open_view, console=console, plain=plain, quiet=quiet, log_level=log_level)
        _train(resolved.profile, view, resume=resume, cache_only=cache_only, demo=demo)


def _run_to_resume(profile: str | None, output: str | None) -> tuple[str, str]:
    """The settings and the folder of the run to go on with: its own settings, unless others are named."""
    from crepa_cli.runs.folder import RunFolder

    run = RunFolder.to_resume(output)
    return profile or str(run.profile), str(run.path)


def resolve(profile: str | None, flags: Mapping[str, object], sets: list[str], demo: bool) -> ResolvedProfile:
    """The settings of the command line and of what it names, for the current folder."""
    from crepa_cli.models import load_family
    from crepa_cli.profile import resolve_profile

    if demo:
        from crepa_cli.training.demo import demo_settings
    return resolve_profile(
        profile=profile,
        flags=flags,
        sets=sets,
        folder=Path(),
        family_defaults=lambda family, task: load_family(family).defaults(task),
        demo=demo_settings if demo else None,
    )


def _print_profile(resolved: ResolvedProfile, console: Console) -> None:
    from rich.table import Table

    table = Table("setting", "value", "from", box=None)
    for section, key, value, source in resolved.rows():
        table.add_row(f"{section}.{key}", value, source)
    console.print(table)


def _check(profile: Profile, processes: int, *, resume: bool, demo: bool) -> None:
    """Find mistakes before processes are started, which would each tell of them."""
    import torch

    from crepa_cli.data.clips import clips_folder
    from crepa_cli.runs.checks import open_family
    from crepa_cli.runs.folder import RunFolder
    from crepa_cli.training.demo import write_demo

    if demo:
        write_demo(profile)
    clips_folder(profile.data)
    open_family(profile)
    if not resume:
        RunFolder.new(profile)
    devices = torch.cuda.device_count()
    if 0 < devices < processes:
        raise UserError(f"--processes {processes}: this machine has {devices} GPUs, and each process needs its own")


def _train(profile: Profile, view: OpenView, *, resume: bool, cache_only: bool, demo: bool) -> None:
    from crepa_cli.data.clips import clips_folder
    from crepa_cli.processes import from_main, start_processes
    from crepa_cli.report.card import write_model_card
    from crepa_cli.runs.checks import open_family
    from crepa_cli.runs.folder import RunFolder
    from crepa_cli.training import run
    from crepa_cli.training.demo import write_demo

    state = start_processes()
    if demo:
        with state.local_main_process_first():
            write_demo(profile)
    clips_folder(profile.data)
    family = open_family(profile)
    output = Path(profile.train.output or ".") if resume else from_main(lambda: RunFolder.new(profile).path)
    accelerator = run.make_accelerator(profile, output)
    listeners: list[Listener] = []
    if state.is_main_process and not cache_only:
        output.mkdir(parents=True, exist_ok=True)
        _write_profile(profile, output)
        listeners = _file_listeners(profile, output, accelerator)
    with _stop_requests() as signals, view(profile, family, output, accelerator) as shown:
        events = run.train(
            profile,
            family,
            output,
            accelerator,
            resume=resume,
            cache_only=cache_only,
            should_stop=lambda: bool(signals),
        )
        # Closed at once where a listener fails, so that the trainer can save a checkpoint.
        with closing(events), _advice_on_memory(profile, family):
            trained = _listen(events, [*listeners, *shown], signals)
    accelerator.end_training()
    if signals:
        raise typer.Exit(128 + signals[0])
    if trained and state.is_main_process:
        write_model_card(output, family, profile)


def _file_listeners(profile: Profile, output: Path, accelerator: Accelerator) -> list[Listener]:
    from crepa_cli.report.metrics import MetricsFile
    from crepa_cli.report.plot import CurvesFile
    from crepa_cli.report.trackers import Trackers

    return [
        MetricsFile(output / "metrics.jsonl"),
        CurvesFile(output, profile.crepa.similarity_threshold),
        Trackers(accelerator, profile),
    ]


def _listen(events: Iterator[Event], listeners: list[Listener], signals: list[int]) -> bool:
    """Pass the events on, and say whether training reached its end."""
    from crepa_cli.events import Progress, TrainingEnded

    event = None
    for event in events:
        for listener in listeners:
            listener(event)
        if signals and isinstance(event, Progress):
            break
    return isinstance(event, TrainingEnded) and event.weights is not None


@contextmanager
def _advice_on_memory(profile: Profile, family: Family) -> Iterator[None]:
    """Say what would lower memory where it was not enough."""
    from accelerate.utils.memory import should_reduce_batch_size

    from crepa_cli.doctor.out_of_memory import out_of_memory_message

    try:
        yield
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        failure = RunError(out_of_memory_message(error, profile, family))
        for note in getattr(error, "__notes__", ()):
            failure.add_note(note)
        raise failure from error


def _write_profile(profile: Profile, output: Path) -> None:
    from crepa_cli.files import write_whole
    from crepa_cli.profile import dump_toml

    # The folder is left out, so that the file repeats the run in a new one.
    elsewhere = profile.model_copy(update={"train": profile.train.model_copy(update={"output": None})})
    write_whole(output / "profile.toml", dump_toml(elsewhere).encode())


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """The signals that asked the run to stop; a second Ctrl-C ends it at once."""
    received: list[int] = []

    def request(number: int, _frame: object) -> None:
        # A launcher answers Ctrl-C with SIGTERM to processes that have had the Ctrl-C already.
        if number == signal.SIGINT in received:
            sys.exit(128 + number)
        received.append(number)

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def silence_libraries() -> None:
    """Keep the bars and notes of libraries off the screen; what matters of them arrives as an event."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    # On some processors its import warns of a kernel for 4-bit weights, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.captureWarnings(True)
