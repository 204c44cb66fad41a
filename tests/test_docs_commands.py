"""Every `crepa ...` command of README and docs runs, as a user would type it, with a tiny model and a few clips.

A stub of the Hub has the tiny model under the published names, and crepa.toml is edited so that a run takes a moment.
Left out are blocks below a comment such as `<!-- needs 8 GPUs -->`, and mentions: a name without arguments, or an
option without its value.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
import typer.main
from conftest import OpenTiny, RunCrepa
from hub_stub import HubStub
from typer.core import TyperGroup

from crepa_cli.cli import app

ROOT = Path(__file__).parents[1]
WRITTEN_BY_HAND = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"(<!-- needs .*? -->\n\n?)?```[a-z]*\n(.*?)```|`([^`]+)`", re.DOTALL)
STAND_INS = {"RUN": "runs/wan-t2v-1", "MODEL": "wan", "FAMILY": "wan", "GB": "24"}
"""What a user puts in place of the names of pages."""
MODELS = ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
TEACHER = "facebook/dinov2-giant"
SMALL = {
    "data": {"width": 32, "height": 32, "frames": 5},
    "train": {"steps": 2, "activation_checkpointing": False},
    "validation": {"every": 0, "steps": 1},
    "crepa": {"encoder_image_size": 56},
}
DEMO = "crepa train --profile t2v --model wan --demo"


def commands() -> list[str]:
    """The commands of all pages, in their order, each once."""
    found = [command for page in WRITTEN_BY_HAND for command in _commands_in(page.read_text(encoding="utf-8"))]
    return [command for command in dict.fromkeys(found) if not _is_mention(command)]


def _commands_in(page: str) -> Iterator[str]:
    for needs, block, inline in CODE.findall(page):
        lines = block.replace("\\\n", " ").splitlines() if block else [" ".join(inline.split())]
        for part in (part.strip() for line in lines for part in line.split(" #")[0].split("&&")):
            if not needs and (match := re.match(r"(?:\.venv/bin/|\.venv\\Scripts\\|!)?(crepa [a-z].*)", part)):
                yield match[1]


def _is_mention(command: str) -> bool:
    name, *arguments = shlex.split(command)[1:]
    if not arguments:
        return command not in BARE
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    with_value = {form for one in group.commands[name].params if not getattr(one, "is_flag", True) for form in one.opts}
    return arguments[-1] in with_value


BARE = {"crepa doctor", "crepa train", "crepa watch"}
"""Commands that do something without arguments."""


@pytest.fixture
def home(
    stub: HubStub,
    open_tiny: OpenTiny,
    tiny_dinov2: Path,
    short_clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A user's folder, with clips and another trainer's configuration; the user is logged in."""
    for name in MODELS:
        stub.add(name, Path(open_tiny("wan", "t2v").base.name))
    stub.add(TEACHER, tiny_dinov2)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copytree(short_clips, "clips")
    for copy in ("before", "after"):
        shutil.copytree(short_clips, copy)
    return folder


def prepare(command: str, home: Path, stub: HubStub) -> None:
    """Put aside what a command writes anew, and give it runs of the names that it takes."""
    stub.repositories.pop("me/my-lora", None)
    for name in re.findall(r"runs/(mine|one|two|with|without)\b", command):
        if not (home / "runs" / name).exists():
            shutil.copytree(home / "runs/wan-t2v-1", home / "runs" / name, ignore=shutil.ignore_patterns("evaluation"))
    if new := re.search(r"^crepa train .*--output (\S+)", command):
        shutil.rmtree(home / new[1], ignore_errors=True)
    if command.startswith("crepa init"):
        written = "config.json" if "--to" in command else "crepa.toml"
        (home / written).unlink(missing_ok=True)
        if "--from" in command:
            (home / "config.json").write_text(json.dumps({"model_family": "wan", "crepa_enabled": True}))


def edit(file: Path) -> None:
    """Make the runs of a crepa.toml small."""
    settings = tomllib.loads(file.read_text(encoding="utf-8"))
    for table, values in SMALL.items():
        settings[table] = settings.get(table, {}) | values
    settings["data"].setdefault("path", "clips")
    file.write_text(tomli_w.dumps(settings), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
@pytest.mark.usefixtures("demo")
def test_every_command_of_the_pages_runs(
    home: Path, stub: HubStub, run_crepa: RunCrepa, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = commands()
    assert len(ran) > 30
    for command in ran:
        if command == DEMO:
            continue  # the fixture has run it
        words = [STAND_INS.get(word, word.replace("<name>", "wan-t2v-1")) for word in shlex.split(command)[1:]]
        prepare(command, home, stub)
        code = run_crepa(*words)
        printed = capsys.readouterr()
        assert code == 0, f"{command}\n{printed.out[-3000:]}\n{printed.err[-3000:]}"
        if command.startswith("crepa init") and (home / "crepa.toml").exists():
            edit(home / "crepa.toml")
