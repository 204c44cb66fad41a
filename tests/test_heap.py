"""Memory that a model held goes back to the system, and not only to the heap."""

from __future__ import annotations

import platform

import psutil
import torch
from torch import nn

from crepa_cli.heap import release_memory
from crepa_cli.training.peak import RESET_PEAK, PeakMemory, resident_peak


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_the_memory_of_a_model_is_given_back() -> None:
    """200 MB in tensors that are too small to be mapped; one that stays lies behind them all on the heap."""
    release_memory()
    before = resident()
    model = nn.ModuleList(nn.Linear(100, 100) for _ in range(5000))
    loaded = resident() - before
    staying = torch.zeros(64)
    del model
    release_memory()
    assert staying.sum() == 0
    if platform.libc_ver()[0] == "glibc":
        assert loaded > 150e6
        assert resident() - before < 0.2 * loaded


def test_the_peak_of_training_leaves_out_what_was_held_before() -> None:
    before = torch.ones(50_000_000)
    highest = resident_peak()
    del before
    peak = PeakMemory(torch.device("cpu"))
    if RESET_PEAK.exists():
        assert peak.read() < highest - 100e6
    during = torch.ones(50_000_000)
    assert peak.read() >= during.nbytes
    reading = peak.read()
    del during
    peak.restart()
    assert peak.read() == reading
