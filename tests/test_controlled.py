"""The controlled experiment: a short form of it, its intervals, and the scrambled arm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_video.arms import ARMS, teaching
from small_video.outcome import interval

from crepa_cli.alignment import Crepa, TokenGrid


@pytest.mark.slow
def test_a_short_controlled_experiment_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("benchmarks") / "controlled.py")
    command = [sys.executable, script, "--quick", "--output", "out"]
    first = subprocess.run([*command, "--arms", "none"], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
    assert [line.split(":")[0] for line in first.stdout.splitlines()] == ["scratch/none/0", "lora/none/0"]
    rest = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
    arms = ("adjacent", "scrambled")
    assert [line.split(":")[0] for line in rest.stdout.splitlines()] == [
        f"{start}/{arm}/0" for arm in arms for start in ("scratch", "lora")
    ]
    results = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert len(results["runs"]) == 6
    losses = {key: run["values"]["held_out_loss"] for key, run in results["runs"].items()}
    assert len({tuple(loss) for loss in losses.values()}) == 6, "arms with the same weights differ in nothing"
    real = results["references"]["scratch"]
    assert real["direction"] == real["color"] == [1.0, 1.0]
    assert max(real["way"]) < 0.15
    table = (tmp_path / "out/table.md").read_text(encoding="utf-8")
    assert "| default, positions scrambled | 1 |" in table
    assert "</svg>" in (tmp_path / "out/figure.svg").read_text(encoding="utf-8")


def test_an_interval_leaves_out_0_if_all_seeds_and_prompts_agree() -> None:
    noise = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert not interval(noise - noise.mean()).seen
    assert interval(0.1 * noise + 1).seen
    # One seed that stands out does not make a difference.
    assert not interval(torch.tensor([[3.0] * 12, [-0.5] * 12, [-0.5] * 12], dtype=torch.float64)).seen


def test_scrambled_features_are_those_of_one_long_row() -> None:
    """16 tokens in a row become 8 by the means of two neighbors, whatever the columns of the two grids."""
    student, square = TokenGrid(2, 2, 4), TokenGrid(2, 4, 4)
    torch.manual_seed(0)
    crepa, hidden, features = Crepa(8, 6), torch.randn(1, 2, 8, 8), torch.randn(1, 2, 16, 6)
    expected = crepa(hidden, features.unflatten(2, (8, 2)).mean(3), student, student)
    with teaching(ARMS["scrambled"]):
        found = crepa(hidden, features, student, square)
    torch.testing.assert_close(found, expected)
    assert abs(found.similarity - crepa(hidden, features, student, square).similarity) > 0.01
