"""What a step spends its time on, and what the driver of the GPU says."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from crepa_cli import api
from crepa_cli.report.gpu import GpuUse
from crepa_cli.report.metrics import read_metrics
from crepa_cli.training.clock import StepClock

PARTS = ("data", "forward", "backward", "optimizer")


@pytest.mark.usefixtures("fresh_accelerate")
def test_parts_of_a_step_are_disjoint_and_inside_of_it(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several micro-batches; the update is reported one step later."""
    monkeypatch.chdir(demo)
    sets = ["validation.every=0", "train.batch_size=1", "train.steps=4", "train.gradient_accumulation=2"]
    profile = api.resolve("t2v", {"model.family": "wan"}, sets, demo=True).profile
    lines = read_metrics(api.train(profile, output=tmp_path / "run").metrics)
    assert lines[0]["optimizer_seconds"] is None
    for line, following in itertools.pairwise(lines):
        parts = [*(line[f"{part}_seconds"] for part in PARTS[:-1]), following["optimizer_seconds"]]
        assert all(seconds > 0 for seconds in parts)
        assert sum(parts) <= line["step_seconds"]


class Queue:
    """Stands for a GPU: the events of work that it has reached have a time, and it gets further only in `wait`."""

    def __init__(self) -> None:
        self.work = self.reached = 0.0

    def wait(self) -> None:
        self.reached = self.work


@pytest.fixture(name="queue")
def _queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = queue.work

        def elapsed_time(self, other: Event) -> float:
            assert other.at <= queue.reached, "reading would make the CPU wait"
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return queue


def test_the_times_of_a_gpu_are_read_when_it_has_got_there(queue: Queue) -> None:
    clock = StepClock(torch.device("cuda"))
    found = []
    for step in range(3):
        clock.mark()
        for _ in range(2):
            for part, seconds in (("data", 1), ("forward", 2), ("backward", 4)):
                queue.work += seconds
                clock.mark(part)
        queue.work += 8  # clipping and reading the losses
        queue.wait()
        found.append(clock.read())
        queue.work += 16
        if step != 1:  # a step that is not finite has no update
            clock.mark("optimizer")
        queue.work += 100  # a validation
    for parts in found:
        parts.pop("", None)
    spent = {"data": 2, "forward": 4, "backward": 8}
    assert found == [spent, {"optimizer": 24, **spent}, spent]


def test_a_gpu_is_asked_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, answers = [0.0], iter([10, 20])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: next(answers))
    monkeypatch.setattr(torch.cuda, "temperature", lambda: 71)
    use = GpuUse(lambda: now[0])
    shown = []
    for now[0] in (0.0, 0.9, 1.0, 1.9):
        shown.append(use())
    assert shown == ["GPU 10% at 71 C"] * 2 + ["GPU 20% at 71 C"] * 2
    now[0] = 3.0
    assert use() == "", "the driver does not answer"


def test_nothing_is_shown_without_a_gpu_or_the_package_that_asks_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GpuUse(lambda: 0.0)() == ""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "_HAS_PYNVML", False)
    assert GpuUse(lambda: 0.0)() == ""
