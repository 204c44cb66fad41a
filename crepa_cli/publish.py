"""A run on the Hub: weights, model card, samples, curves, metrics and settings, without folders of this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.filesize import decimal

from crepa_cli import __version__
from crepa_cli.data.sheet import without_clips
from crepa_cli.errors import RunError, UserError, counted
from crepa_cli.hub.push import Identity, claim_repository, page, push_files
from crepa_cli.profile import Profile, dump_toml
from crepa_cli.report.card import last_samples, without_folders, write_model_card
from crepa_cli.runs.checks import load_checkpoint
from crepa_cli.runs.folder import RunFolder
from crepa_cli.settings import resolve

WEIGHTS = ("*.safetensors", "transformer*/*")
"""The weights of the last step, in a folder that may hold those of earlier steps and merged ones too."""


def push(run: RunFolder, name: str, *, private: bool = False, report: Callable[[str], None] = lambda _: None) -> str:
    """Push a run that is over to the Hub, in one commit, and return the address of its repository.

    Weights, model card, the samples that it shows, curves, metrics and settings are pushed. Pushing again adds a
    commit.

    Args:
        run: its folder.
        name: owner/name of the repository, or the name alone for the user who is logged in.
        private: whether only the owner may see it.
        report: receives a line of text before the upload.

    Raises:
        UserError: the run has no weights yet, nobody is logged in, the token may not write there, or the name is
            taken by something else.
        RunError: the upload failed; the repository is as it was before.
    """
    profile = resolve(str(run.profile)).profile
    files = published_files(run, profile)
    repository = claim_repository(name, identity(run), private=private)
    size = sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in files.values())
    report(f"pushing {counted(len(files), 'file')}, {decimal(size)}, to {page(repository)}")
    try:
        push_files(repository, files, f"{run.name}, trained with crepa {__version__}")
    except RunError as error:
        again = f"crepa push {run.path} {repository}"
        raise RunError(f"{run.path} was not pushed: {error}. Nothing is lost; to try again: {again}") from error
    return page(repository)


def identity(run: RunFolder | None) -> Identity:
    """The first line of the metrics, which has the losses and the time of the first step; empty without a run."""
    if run is None or not run.metrics.is_file():
        return Identity(RunFolder(Path()).metrics.name, b"")
    with run.metrics.open("rb") as file:
        return Identity(run.metrics.name, file.readline())


def published_files(run: RunFolder, profile: Profile) -> Mapping[str, Path | bytes]:
    """The files of a run that are published, by their paths in its repository.

    The model card is pushed as it is in the folder, so that it can be edited first.

    Raises:
        UserError: if there are no weights of the last step.
    """
    weights = [path for pattern in WEIGHTS for path in sorted(run.weights.glob(pattern))]
    if not weights:
        raise UserError(
            f"{run.path} has no weights to push: they are written after the last step. To train it to its end: "
            f"crepa train --resume --output {run.path}"
        )
    if not run.card.is_file():
        write_model_card(run, load_checkpoint(profile), profile)
    samples = [path for sample in last_samples(run)[:1] for path in sorted((run.path / sample).parent.iterdir())]
    single = [path for path in (run.card, run.curves, run.metrics) if path.is_file()]
    files: dict[str, Path | bytes] = {
        path.relative_to(run.path).as_posix(): path for path in (*weights, *samples, *single) if path.is_file()
    }
    for name, path in files.items():
        if name.endswith("/sheet.png") and isinstance(path, Path):
            files[name] = without_clips(path)
    files[run.profile.name] = dump_toml(without_folders(profile)).encode()
    return files
