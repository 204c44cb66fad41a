"""The wheel and the sdist hold everything that crepa reads, and the wheel works in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "crepa_cli"
CALL = "import sys; from crepa_cli.cli import main; sys.argv[0] = 'crepa'; main()"


def files(folder: Path) -> Iterator[str]:
    """The files in a folder, by their paths from the root of the repository."""
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist."""
    pytest.importorskip("hatchling", reason="pip install hatchling to build the package")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_profiles(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[0]).namelist())
    shipped = {name.replace("profiles/", "crepa_cli/profile/presets/", 1) for name in files(ROOT / "profiles")}
    assert {"crepa_cli/profile/presets/t2v.toml", "crepa_cli/profile/presets/recipes/wan-24gb.toml"} <= shipped
    assert shipped | set(files(PACKAGE)) | {"crepa_cli/constraints.txt"} <= names
    published = [name for name in names if name.startswith("crepa_cli/models/published/")]
    assert any(name.endswith("Wan2.1-T2V-1.3B-Diffusers/transformer/config.json") for name in published)


@pytest.mark.slow
def test_the_sdist_holds_what_the_wheel_is_built_from(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {*files(PACKAGE), *files(ROOT / "profiles"), "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert expected <= names


@pytest.mark.slow
def test_the_wheel_finds_its_presets_recipes_schema_and_configurations(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    (tmp_path / "project").mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "site"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "empty"),
    }

    def crepa(*arguments: str) -> str:
        command = [sys.executable, "-c", CALL, *arguments]
        done = subprocess.run(command, cwd=tmp_path / "project", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "wan-24gb" in crepa("init", "--list")
    # Blocks and sizes are checked, which needs the published configuration.
    assert "not checked" not in crepa("init", "--profile", "wan-24gb", "--data", "clips")
    assert (tmp_path / "project/crepa.schema.json").is_file()
