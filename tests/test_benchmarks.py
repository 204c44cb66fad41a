"""The benchmarks, on the CPU with tiny models or on tensors without content."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import alignment
import gpu
import pytest
import torch
from conftest import OpenTiny


@pytest.fixture
def bench(open_tiny: OpenTiny, tiny_dinov2: Path, tmp_path: Path) -> gpu.Bench:
    """The tiny checkpoint of LTX-Video, and the teacher."""
    shutil.copytree(open_tiny("ltxvideo", "t2v").base.name, tmp_path / "ltxvideo-t2v")
    shutil.copytree(tiny_dinov2, tmp_path / "dinov2")
    return gpu.Bench(torch.device("cpu"), tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_plan_that_fails_leaves_the_others_alone(bench: gpu.Bench) -> None:
    plans = {
        "no such setting": bench.plan("ltxvideo", "", {"train": {"speed": 3}}),
        "LoRA": bench.plan("ltxvideo", "", {}, cutoff=True),
    }
    part = gpu.Part("Two plans", 60, lambda _: plans)
    wrong, aligned, after = gpu.run_part(part, bench)
    assert "speed" in wrong["failure"]
    assert (aligned["plan"], after["plan"]) == ("LoRA", "LoRA, after the cutoff")
    for row in (aligned, after):
        assert row["seconds"] > 0
        assert row["peak"] == pytest.approx(row["predicted"], rel=0.02)
    assert aligned["flops"] > after["flops"]
    assert aligned["peak"] > after["peak"]
    shown = gpu.table(part, [aligned, after, wrong], flops=1e12)
    assert shown.count("\n") == 6
    assert "x 1.000" in shown


@pytest.mark.slow
def test_a_part_runs_in_a_process_of_its_own_and_is_stopped_in_time(tmp_path: Path) -> None:
    assert gpu.start_part("optimizer", tmp_path / "rows.json", seconds=1, tiny=tmp_path) == [
        {"plan": "the rest", "failure": "stopped after 1 s"}
    ]
    script = str(Path(gpu.__file__))
    command = [sys.executable, script, "--tiny", "--only", "optimizer", "--output", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((tmp_path / "out/gpu.json").read_text(encoding="utf-8"))
    full, eight_bits = results["parts"]["optimizer"]
    assert full["peak"] == pytest.approx(full["predicted"], rel=0.02)
    assert eight_bits["peak"] < full["peak"]
    assert "| adamw8bit |" in (tmp_path / "out/gpu.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_way_to_align_takes_at_most_a_hundredth_of_a_step() -> None:
    """FLOPs, for Wan 1.3B at its default size; relations stay below that in every family."""
    with torch.device("meta"):
        cases = alignment.published_cases()
    wan, sana = (next(case for case in cases.values() if case.family == name) for name in ("wan", "sanavideo"))
    bare = alignment.step_flops(wan)
    for arguments in alignment.OPTIONS.values():
        assert alignment.alignment_flops(wan, arguments) <= 0.01 * bare
    relation = alignment.alignment_flops(sana, alignment.OPTIONS["relation"])
    assert relation <= 0.01 * alignment.step_flops(sana)
