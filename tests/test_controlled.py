"""The controlled experiment: a short form of it, its intervals, and the scrambled arm."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import controlled
import pytest
import torch
from small_video.arms import ARMS, teaching
from small_video.outcome import interval

from crepa_cli.alignment import Crepa, TokenGrid


@pytest.fixture
def run_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., list[str]]]:
    """Runs the quick form in this process, and returns the runs that it took."""

    def run(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["controlled.py", "--quick", "--output", str(tmp_path / "out"), *arguments])
        controlled.main()
        return [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]

    yield run
    logging.captureWarnings(False)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_short_controlled_experiment_goes_on_where_it_was_stopped(
    tmp_path: Path, run_quick: Callable[..., list[str]]
) -> None:
    assert run_quick("--arms", "none") == ["scratch/none/0", "lora/none/0"]
    assert run_quick() == ["scratch/adjacent/0", "lora/adjacent/0"]
    results = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert len(results["runs"]) == 4
    losses = {key: run["values"]["held_out_loss"] for key, run in results["runs"].items()}
    assert len({tuple(loss) for loss in losses.values()}) == 4, "arms with the same weights differ in nothing"
    real = results["references"]["scratch"]["real clips"]
    assert real["direction"] == real["color"] == [1.0, 1.0]
    assert max(real["way"]) < 0.15
    table = (tmp_path / "out/table.md").read_text(encoding="utf-8")
    assert "| adjacent frames (default) | 1 |" in table
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
