"""Runs on the Hub, pushed to a stub of it on this machine."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import CREPA, RunCrepa
from hub_stub import HubStub, StubRepository
from PIL import Image

from crepa_cli.profile.files import parse_toml

# huggingface_hub sends files in the way of an older httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

NAME = "me/dance"
NO_VALIDATION = ("--set", "validation.every=0")
START = ("train", "--profile", "t2v", "--model", "wan", "--demo", "--plain", "--steps", 1, *NO_VALIDATION)


@pytest.fixture
def hub(stub: HubStub, monkeypatch: pytest.MonkeyPatch) -> HubStub:
    """A Hub with a user who is logged in, which takes files by HTTP alone."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return stub


@pytest.fixture
def run(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the demo's run, in `runs/wan-t2v-1`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo / "crepa-demo", "crepa-demo", ignore=shutil.ignore_patterns("runs"))
    return Path(shutil.copytree(newest_run(demo), "runs/wan-t2v-1"))


def newest_run(folder: Path) -> Path:
    (profile,) = folder.glob("**/wan-t2v-1/profile.toml")
    return profile.parent


def head(hub: HubStub) -> dict[str, bytes]:
    return hub.repositories[NAME].commits[-1]


def test_a_run_is_pushed_with_everything_that_its_card_shows(
    hub: HubStub, run: Path, tmp_path: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (run / "profile.toml").read_text()
    (run / "profile.toml").write_text(settings.replace('"crepa-demo', f'"{tmp_path.as_posix()}/crepa-demo'))
    assert run_crepa("push", run, "dance") == 0
    assert f"pushed to {hub.address}/{NAME}" in capsys.readouterr().out
    files = head(hub)
    samples = sorted(path.name for path in (run / "samples").iterdir())
    expected = {".gitattributes", "README.md", "curves.svg", "metrics.jsonl", "profile.toml"}
    expected |= {f"weights/{path.name}" for path in (run / "weights").glob("*.safetensors")}
    expected |= {path.relative_to(run).as_posix() for path in (run / "samples" / samples[-1]).iterdir()}
    assert files.keys() == expected
    sheet = f"samples/{samples[-1]}/sheet.png"
    for path in expected - {".gitattributes", "profile.toml", sheet}:
        assert files[path] == (run / path).read_bytes()
    # Videos of the base and of the run are published, and no frame of a clip.
    with Image.open(io.BytesIO(files[sheet])) as pushed_sheet, Image.open(run / sheet) as own:
        height = own.height * 2 // 3  # a row of step 0, one of the last step, and one of a clip
        assert pushed_sheet.tobytes() == own.crop((0, 0, own.width, height)).tobytes()
    # The card shows frames of the last samples and the curves, and links to nothing that is not there.
    shown = re.findall(r"\]\(((?!https:)[^)]+)\)", files["README.md"].decode())
    assert "curves.svg" in shown
    assert sheet in shown
    assert set(shown) <= files.keys()
    # The repository names no folder of this machine, and all settings that name none are there.
    assert not [path for path, data in files.items() if tmp_path.as_posix().encode() in data]
    pushed, local = (parse_toml(text, "") for text in (files["profile.toml"].decode(), settings))
    assert pushed["train"] == local["train"]
    assert pushed["report"] == local["report"]
    assert not hub.repositories[NAME].private


def test_pushing_again_adds_a_commit_with_what_has_changed(hub: HubStub, run: Path, run_crepa: RunCrepa) -> None:
    assert run_crepa("push", run, NAME, "--private") == 0
    assert hub.repositories[NAME].private
    assert run_crepa("push", run, NAME) == 0
    assert len(hub.repositories[NAME].commits) == 2
    card = run / "README.md"
    card.write_text(card.read_text() + "\nIts subject is a ring.\n")
    last = max((run / "samples").iterdir())
    last.rename(last.with_name("step-999999"))
    assert run_crepa("push", run, NAME) == 0
    files = head(hub)
    assert files["README.md"].decode().endswith("Its subject is a ring.\n")
    assert {path.split("/")[1] for path in files if path.startswith("samples/")} == {"step-999999"}
    assert len(hub.repositories[NAME].messages) == 2


def test_the_name_of_the_folder_is_that_of_the_repository(hub: HubStub, run: Path, run_crepa: RunCrepa) -> None:
    assert run_crepa("push", run) == 0
    assert list(hub.repositories) == ["me/wan-t2v-1"]


def test_a_card_that_was_never_written_is_written(hub: HubStub, run: Path, run_crepa: RunCrepa) -> None:
    card = (run / "README.md").read_bytes()
    (run / "README.md").unlink()
    assert run_crepa("push", run, NAME) == 0
    assert head(hub)["README.md"] == card


def other_model(hub: HubStub, _run: Path) -> None:
    hub.repositories[NAME] = StubRepository([{".gitattributes": b"", "README.md": b"another model"}])


def other_run(hub: HubStub, _run: Path) -> None:
    hub.repositories[NAME] = StubRepository([{"metrics.jsonl": b'{"step": 0, "loss": 1.0}\n'}])


def read_only(hub: HubStub, _run: Path) -> None:
    hub.repositories[NAME] = StubRepository([{".gitattributes": b""}])
    hub.writable.clear()


def no_weights(_hub: HubStub, run: Path) -> None:
    shutil.rmtree(run / "weights")


MISTAKES = {
    "taken": (other_model, "dance", "/me/dance holds something else, which would be overwritten: choose another name"),
    "other run": (other_run, "dance", "/me/dance holds something else"),
    "nobody's": (None, "other/dance", "your token may not write to other/dance: make one with write access"),
    "read only": (read_only, "me/dance", "your token may not write to me/dance"),
    "no name": (None, "my dance", "'my dance' is no name of a repository: use name or owner/name"),
    "no weights": (no_weights, "dance", "has no weights to push: they are written after the last step"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_from_failures_and_push_nothing(
    hub: HubStub, run: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    prepare, name, message = MISTAKES[mistake]
    if prepare:
        prepare(hub, run)
    before = {name: list(repository.commits) for name, repository in hub.repositories.items()}
    assert run_crepa("push", run, name) == 2
    assert message in capsys.readouterr().err
    assert {name: repository.commits for name, repository in hub.repositories.items()} == before


def test_a_public_repository_is_not_taken_for_a_private_one(
    hub: HubStub, run: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_crepa("push", run, NAME) == 0
    assert run_crepa("push", run, NAME, "--private") == 2
    assert f"{hub.address}/{NAME} is public" in capsys.readouterr().err


def test_a_push_without_a_login_says_how_to_log_in(
    stub: HubStub, run: Path, run_crepa: RunCrepa, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert run_crepa("push", run, NAME) == 2
    assert f"{stub.address}/settings/tokens, then run: hf auth login" in capsys.readouterr().err
    assert stub.requests == []


def test_a_failed_upload_is_repeated_without_what_has_arrived(
    hub: HubStub, run: Path, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.upload_statuses = [413]
    assert run_crepa("push", run, "dance") == 1
    error = capsys.readouterr().err
    assert f"{run} was not pushed: " in error
    assert f"to try again: crepa push {run} {NAME}" in error
    assert head(hub).keys() == {".gitattributes"}
    arrived = set(hub.objects)
    hub.requests.clear()
    assert run_crepa("push", run, NAME) == 0
    sent = {request.path.removeprefix("/upload/") for request in hub.requests if request.method == "PUT"}
    assert sent == hub.objects.keys() - arrived


def test_a_training_that_cannot_be_pushed_does_not_start(
    hub: HubStub,
    run_crepa: RunCrepa,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_crepa(*START, "--push-to-hub", "other/dance") == 2
    assert "your token may not write to other/dance" in capsys.readouterr().err
    assert run_crepa(*START, "--private") == 2
    assert "--private is for the repository of --push-to-hub" in capsys.readouterr().err
    # What is wrong with the run is found before a repository is made for it.
    assert run_crepa(*START, "--push-to-hub", NAME, "--set", "crepa.block_index=40") == 2
    assert not hub.repositories
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_training_that_is_not_pushed_at_its_end_loses_nothing(
    hub: HubStub,
    run_crepa: RunCrepa,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.upload_statuses = [400, 400]
    assert run_crepa(*START, "--push-to-hub", "dance", "--private") == 1
    run = newest_run(tmp_path).relative_to(tmp_path)
    again = re.search(r"to try again: crepa (push \S+ \S+)", capsys.readouterr().err)
    assert again is not None
    assert again[1] == f"push {run} {NAME}"
    assert hub.repositories[NAME].private
    assert run_crepa(*again[1].split()) == 0
    assert head(hub)["README.md"] == (run / "README.md").read_bytes()
    # The same run goes on into the same repository.
    assert run_crepa(*START, "--resume", "--steps", 2, "--output", run, "--push-to-hub", "dance") == 0
    assert len(head(hub)["metrics.jsonl"].splitlines()) == 2
    # Another run does not take its place.
    assert run_crepa(*START, "--push-to-hub", "dance") == 2


def command(hub: HubStub, *arguments: str) -> subprocess.Popen[str]:
    """A command as a process of its own, logged in at the stub."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.Popen(
        [*CREPA, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_interrupts")
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process")
def test_ctrl_c_ends_an_upload_at_once(hub: HubStub, run: Path) -> None:
    hub.slow_uploads = True
    process = command(hub, "push", str(run), NAME)
    while not any(request.method == "PUT" for request in hub.requests):
        time.sleep(0.05)
        assert process.poll() is None
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert time.monotonic() - before < 5
    assert f"To push: crepa push {run} {NAME}" in output
    assert head(hub).keys() == {".gitattributes"}


@pytest.mark.slow
def test_of_several_processes_one_pushes(hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    process = command(hub, *map(str, START), "--processes", "2", "--push-to-hub", "dance")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert output.count("pushed to ") == 1
    assert len(hub.repositories[NAME].messages) == 1
    assert sum(request.path == "/api/repos/create" for request in hub.requests) == 1
    (line, *_) = head(hub)["metrics.jsonl"].splitlines()
    assert json.loads(line)["step"] == 0
