"""The alignment loss compared with worked cases: explicit loops over frames and patches in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from crepa_cli.alignment import Crepa, TokenGrid

GOLDEN = Path(__file__).parent / "golden_alignment.safetensors"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}

with safe_open(GOLDEN, "pt") as file:
    CASES = json.loads(file.metadata()["cases"])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_loss_similarities_and_gradients_equal_the_worked_case(name: str, dtype: torch.dtype) -> None:
    settings = dict(CASES[name])
    student_grid = TokenGrid(*settings.pop("student_grid"))
    teacher_grid = TokenGrid(*settings.pop("teacher_grid"))
    with safe_open(GOLDEN, "pt") as file:
        case = {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}/")}  # noqa: SIM118 (safe_open has keys() alone)
    hidden = case["hidden"].to(dtype).requires_grad_()
    crepa = Crepa(hidden.shape[-1], case["features"].shape[-1], **settings).to(dtype)
    names = ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
    parameters = dict(zip(names, crepa.projector.parameters(), strict=True))
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(case[key])

    alignment = crepa(hidden, case["features"].to(dtype), student_grid, teacher_grid)
    alignment.loss.backward()

    assert relative_error(alignment.loss, case["expected/loss"]) <= TOLERANCE[dtype]
    for key in ("similarity", "self_similarity"):
        expected = case[f"expected/{key}"]
        # Cosines that cancel to a mean near 0 leave it their own rounding, in which processors differ.
        scale = expected.abs().clamp(min=0.01)
        assert ((getattr(alignment, key).double() - expected).abs() / scale).item() <= TOLERANCE[dtype], key
    for key, tensor in {"hidden": hidden, **parameters}.items():
        assert tensor.grad is not None
        assert relative_error(tensor.grad, case[f"grad/{key}"]) <= TOLERANCE[dtype], key
