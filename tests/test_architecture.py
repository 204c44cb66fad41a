"""Rooms import downwards only, modules form no cycles, and only `models` and `demo` know families by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import crepa_cli
from crepa_cli.models import FAMILIES

PACKAGE = "crepa_cli"
SOURCE = Path(crepa_cli.__file__).parent

FLOORS: list[set[str]] = [
    {"cli"},
    {"api"},
    {"publish"},
    {"settings"},
    {"doctor", "evaluate", "probe"},
    {"memory"},
    {"training"},
    {"report"},
    {"runs"},
    {"demo"},
    {"data"},
    {"teachers", "models"},
    {"hub", "profile", "alignment", "measures"},
    {"events", "errors", "files", "follow", "heap", "kept", "libraries", "processes", "requests", "signals", PACKAGE},
]
"""The rooms from the top down: a package, or a module that belongs to none. The package itself holds the version.

A room may import itself and every room on a floor below; rooms on one floor stay apart, except on the ground floor.
"""
IMPORTERS = {"demo": {"cli", "api", "settings", "doctor", "probe", "demo"}}
"""Rooms that only these may import."""
ROOMS_OF_FAMILIES = {"models", "demo"}
HELP = {"help", "description", "epilog", "short_help"}
"""Keyword arguments whose text only explains."""


def parsed_modules() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its full name."""
    trees = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def room(module: str) -> str:
    """The room of a module: the first name below the package."""
    parts = module.split(".")
    if len(parts) == 1:
        return PACKAGE
    return "cli" if parts[1] == "__main__" else parts[1]


def floor(name: str) -> int:
    """The floor of a room, 0 at the top."""
    found = [index for index, rooms in enumerate(FLOORS) if name in rooms]
    assert found, f"{name} is not in FLOORS: give the new room a floor"
    return found[0]


def imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules of the package that are imported anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write the import with the full name of the module"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                target = submodule if submodule in known else node.module
                if target in known:
                    yield str(target)


def may_import(importer: str, imported: str) -> bool:
    """Whether an arrow from one room to another is allowed."""
    if imported in IMPORTERS and importer not in IMPORTERS[imported]:
        return False
    above, below = floor(importer), floor(imported)
    return importer == imported or above < below or above == below == len(FLOORS) - 1


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string that code can act on or print.

    Parts of f-strings count. Left out are docstrings, those of attributes included, and the texts of `HELP`, with
    whatever they are composed of: they only explain.
    """
    explaining: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            explaining.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg in HELP:
            explaining.update(ast.walk(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in explaining:
            yield node.lineno, node.value


def names_of_families(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Where a module names a family: in a literal, as a word in upper or lower case, or by importing its module."""
    word = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, FAMILIES))})(?!\w)", re.IGNORECASE)
    yield from (f"{line}: {text!r}" for line, text in literals(tree) if word.search(text))
    yield from (module for module in imports(tree, known) if module.split(".")[-1] in FAMILIES)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return parsed_modules()


def test_rooms_import_only_what_lies_below(trees: dict[str, ast.Module]) -> None:
    arrows = [(module, target) for module, tree in trees.items() for target in imports(tree, {*trees})]
    assert arrows
    wrong = {f"{module} > {target}" for module, target in arrows if not may_import(room(module), room(target))}
    assert not wrong, "\n".join(sorted(wrong))


def test_modules_form_no_cycle(trees: dict[str, ast.Module]) -> None:
    graph = {module: {*imports(tree, {*trees})} for module, tree in trees.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" > ".join(error.args[1]))


def test_only_models_and_the_demo_name_families(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{module}: {found}"
        for module, tree in trees.items()
        if room(module) not in ROOMS_OF_FAMILIES
        for found in names_of_families(tree, {*trees})
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("cli", "errors", True),
        ("files", "errors", True),
        ("training", "training", True),
        ("api", "demo", True),
        ("training", "doctor", False),
        ("models", "teachers", False),
        ("training", "demo", False),
        ("models", "demo", False),
    ],
)
def test_arrows(importer: str, imported: str, *, allowed: bool) -> None:
    assert may_import(importer, imported) == allowed


def test_literals_and_imports_are_found_wherever_they_stand() -> None:
    tree = ast.parse(
        '"""wan"""\n'
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from crepa_cli.models import wan\n"
        "class A:\n"
        '    field: int = Field(description="such as wan")\n'
        '    """wan"""\n'
        "def f(x):\n"
        '    return x == "Wan-AI/Wan2.1", f"{x} swan", "swan", "wanted", f"{x} for wan"\n'
    )
    found = [*names_of_families(tree, {"crepa_cli.models.wan"})]
    assert found == ["9: 'Wan-AI/Wan2.1'", "9: ' for wan'", "crepa_cli.models.wan"]
