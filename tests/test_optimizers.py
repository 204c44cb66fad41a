"""Optimizers and the schedule of the learning rate: each resumes to the bit, and takes the settings that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from crepa_cli.profile import TrainSettings
from crepa_cli.training.build import make_optimizer, trainable, with_floor
from crepa_cli.training.checkpoints import load_checkpoint, take_snapshot, write_checkpoint

ADAMW = {"learning_rate": 1e-2, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": ADAMW,
    "adafactor": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "prodigy": ADAMW | {"learning_rate": 1.0},
}
TARGET = torch.linspace(-1, 1, 8 * 6).view(8, 6)


def built(name: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A layer whose weight is to become `TARGET`, and its optimizer with the empty group of a missing projector."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 8)
    train = TrainSettings.model_validate({"optimizer": name, **SETTINGS[name]})
    return layer, make_optimizer(train, [trainable(layer), []], torch.device("cpu"))


def train_steps(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> float:
    for _ in range(steps):
        loss = (layer.weight - TARGET).square().mean()
        loss.backward()
        layer.bias.grad = torch.zeros_like(layer.bias)
        optimizer.step()
        optimizer.zero_grad()
    return float((layer.weight.detach() - TARGET).square().mean())


@pytest.mark.parametrize("name", SETTINGS)
def test_an_optimizer_learns_and_resumes_to_the_bit(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    whole, optimizer = built(name)
    before = train_steps(whole, optimizer, 0)
    train_steps(whole, optimizer, 30)
    write_checkpoint(tmp_path / "step-000030", {"": take_snapshot(whole, optimizer, None, {})})
    after = train_steps(whole, optimizer, 70)
    assert after < before / 2

    resumed, optimizer = built(name)
    load_checkpoint(tmp_path / "step-000030", resumed, optimizer, None)
    train_steps(resumed, optimizer, 70)
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("first", [False, True])
def test_adamw_goes_on_with_the_kernels_of_another_device(first: bool, tmp_path: Path) -> None:
    """The CPU has the fused kernel too, but only a GPU gets it."""

    def stepped(fused: bool, checkpoint: Path | None, steps: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
        layer, optimizer = built("adamw")
        for group in optimizer.param_groups:
            group["fused"] = fused
        if checkpoint:
            load_checkpoint(checkpoint, layer, optimizer, None)
        assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]
        train_steps(layer, optimizer, steps)
        return layer, optimizer

    saved = tmp_path / "step-000030"
    write_checkpoint(saved, {"": take_snapshot(*stepped(first, None, 30), None, {})})
    resumed, _ = stepped(not first, saved, 10)
    expected, _ = stepped(first, saved, 10)
    torch.testing.assert_close(resumed.weight, expected.weight)


def test_betas_and_eps_reach_the_optimizer() -> None:
    group, _ = built("adamw")[1].param_groups
    assert (group["betas"], group["eps"], group["lr"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 1e-2, 0.1)


def test_the_schedule_ends_at_its_floor_and_warms_up_from_zero() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    (cosine,) = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=100).lr_lambdas
    floored = with_floor(cosine, 0.1, 10)
    assert [floored(step) for step in range(10)] == [cosine(step) for step in range(10)]
    assert floored(10) == 1
    assert floored(100) == pytest.approx(0.1)
    assert floored(55) == pytest.approx(0.1 + 0.9 * cosine(55))
    assert [with_floor(cosine, 0.0, 10)(step) for step in range(101)] == [cosine(step) for step in range(101)]
