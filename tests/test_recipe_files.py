"""The recipes in profiles/recipes: each is what docs/recipes.py writes, has no mistakes, and fits its card."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import QUICK_FAMILIES, RunCrepa

from crepa_cli.memory.prediction import predict
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models import FAMILIES
from crepa_cli.profile import recipes
from crepa_cli.profile.files import parse_toml
from crepa_cli.runs.checks import open_family
from crepa_cli.settings import resolve

SCRIPT = Path(__file__).parents[1] / "docs/recipes.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder in which the published configurations of this package answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def card_of(name: str) -> int:
    """Bytes of the card that a recipe is for."""
    return int(name.rpartition("-")[2].removesuffix("gb")) * 10**9


def test_every_family_has_been_searched_and_its_recipes_are_written(script: ModuleType) -> None:
    rows = script.read_found()
    missing = FAMILIES.keys() - {row["family"] for row in rows}
    assert not missing, f"run python docs/recipes.py {' '.join(missing)}, then python docs/generate.py"
    written = {name: path.read_text(encoding="utf-8") for name, path in recipes().items()}
    assert written == script.recipes(rows)
    assert {name.rpartition("-")[0] for name in written} == set(FAMILIES)


@pytest.mark.usefixtures("offline")
def test_recipes_have_no_mistakes_and_change_nothing_but_where_the_run_fits() -> None:
    for name in recipes():
        profile = resolve(name).profile
        preset = resolve("t2v", {"model.family": profile.model.family}).profile
        open_family(profile)
        assert profile.crepa == preset.crepa
        assert profile.adapter == preset.adapter
        assert profile.data == preset.data


@pytest.mark.usefixtures("offline")
def test_a_recipe_starts_a_project(run_crepa: RunCrepa, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_crepa("init", "--profile", "wan-12gb", "--data", "clips") == 0
    written = parse_toml((tmp_path / "crepa.toml").read_text(), "crepa.toml")
    recipe = parse_toml(recipes()["wan-12gb"].read_text(), "recipe")
    assert written["preset"] == "t2v"
    assert written.get("memory") == recipe.get("memory")
    assert run_crepa("init", "--list") == 0
    assert ", ".join(recipes()).partition(",")[0] in capsys.readouterr().out
    assert run_crepa("train", "--profile", "wan-25gb") == 2
    assert "did you mean wan-24gb?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("family", sorted(QUICK_FAMILIES))
def test_the_recipe_for_the_smallest_card_fits_it(family: str) -> None:
    name = min((name for name in recipes() if name.rpartition("-")[0] == family), key=card_of)
    profile = resolve(name).profile
    opened = open_family(profile)
    peak = predict(profile, opened, form_bucket(profile, opened), torch.device("cuda")).peak
    assert peak <= card_of(name)
