"""The documentation agrees with the code: generated pages, links, commands and settings that it names."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from typer.core import TyperGroup

from crepa_cli.cli import app
from crepa_cli.events import StepDone
from crepa_cli.profile import known_keys

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```[a-z]*\n(.*?)```|`([^`\n]+)`", re.DOTALL)


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _code(page: Path) -> Iterator[str]:
    """Every line of code in a page, without comments."""
    for block, inline in CODE.findall(page.read_text(encoding="utf-8")):
        for line in (block or inline).replace("\\\n", " ").splitlines():
            yield line.split(" #")[0].strip()


def _commands() -> list[str]:
    lines = {line for page in PAGES for line in _code(page)}
    commands = {part.strip() for line in lines for part in line.split("&&")}
    commands = {re.sub(r"^(\.venv/bin/|\.venv\\Scripts\\|!)", "", command) for command in commands}
    # A mention such as `crepa eval` has nothing to check but its name.
    return sorted(command for command in commands if re.match(r"crepa [a-z]", command))


def test_generated_pages_are_what_the_code_says() -> None:
    for name, page in _generator().PAGES.items():
        written = (DOCS / name).read_text(encoding="utf-8")
        assert written == page(), f"docs/{name} is out of date: run python docs/generate.py"


def test_the_page_of_files_names_every_value_of_a_step() -> None:
    named = set(re.findall(r"`(\w+)`", (DOCS / "files.md").read_text(encoding="utf-8")))
    assert {field.name for field in fields(StepDone)} <= named


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    listed = re.findall(r"[\w-]+\.md", navigation)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("command", _commands())
def test_commands_and_their_flags_exist(command: str) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    name, *arguments = shlex.split(command)[1:]
    assert name in group.commands
    wanted = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    known = {form for parameter in group.commands[name].params for form in parameter.opts} | {"--help"}
    assert wanted <= known


def _literals() -> Iterator[str]:
    """Every text that the package can print, with an ellipsis for what is filled in."""
    for path in (ROOT / "crepa_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_hint_of_troubleshooting_has_a_sign_or_messages_that_the_code_prints() -> None:
    literals = list(_literals())
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = []
    for section in page.split("\n## ")[1:]:
        assert re.search(r"^\*\*(Message|Sign)\*\*: ", section, re.MULTILINE), section.splitlines()[0]
        for paragraph in re.findall(r"^\*\*Message\*\*: (.*?)\n\n", section, re.DOTALL | re.MULTILINE):
            messages += [" ".join(message.split()) for message in re.findall(r"`([^`]+)`", paragraph)]
    assert len(messages) > 10
    for message in messages:
        # The name of a setting may be filled in.
        pattern = ".*".join(re.escape(part) for part in re.sub(r"crepa\.\w+", "…", message).split("…"))
        assert any(re.search(pattern, literal) for literal in literals), message


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_pages_name_exist(page: Path) -> None:
    settings = known_keys()
    pattern = re.compile(rf"^(?:--set )?({'|'.join(settings)})\.(?!toml|html|json|safetensors)([a-z_]+)( ?=.*)?$")
    for line in _code(page):
        if match := pattern.match(line):
            assert match[2] in settings[match[1]], line
