"""The alignment loss compared with worked cases: explicit loops over frames and patches in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from crepa_cli.alignment import Crepa, TokenGrid
from crepa_cli.data.compact import in_int8, restored_features

GOLDEN = Path(__file__).parent / "golden_alignment.safetensors"
PARAMETERS = ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}

with safe_open(GOLDEN, "pt") as file:
    CASES = json.loads(file.metadata()["cases"])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def tensors(name: str) -> dict[str, Tensor]:
    """The tensors of a case, by their names in it."""
    with safe_open(GOLDEN, "pt") as file:
        return {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}/")}  # noqa: SIM118 (safe_open has keys() alone)


def grids(name: str) -> tuple[TokenGrid, TokenGrid]:
    """The grids of a case's student and teacher."""
    return TokenGrid(*CASES[name]["student_grid"]), TokenGrid(*CASES[name]["teacher_grid"])


def worked_crepa(name: str, case: dict[str, Tensor], dtype: torch.dtype) -> Crepa:
    """The loss of a case, with its projector."""
    settings = {key: value for key, value in CASES[name].items() if not key.endswith("_grid")}
    crepa = Crepa(case["hidden"].shape[-1], case["features"].shape[-1], **settings).to(dtype)
    with torch.no_grad():
        for key, parameter in zip(PARAMETERS, crepa.projector.parameters(), strict=True):
            parameter.copy_(case[key])
    return crepa


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_loss_similarities_and_gradients_equal_the_worked_case(name: str, dtype: torch.dtype) -> None:
    case, (student_grid, teacher_grid) = tensors(name), grids(name)
    hidden = case["hidden"].to(dtype).requires_grad_()
    crepa = worked_crepa(name, case, dtype)
    parameters = dict(zip(PARAMETERS, crepa.projector.parameters(), strict=True))

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


def change_in_8_bits(crepa: Crepa, hidden: Tensor, features: Tensor, *grids: TokenGrid) -> float:
    """How far the loss with features in 8 bits is from that in float16."""
    stored = (features.half(), restored_features(in_int8(features.half())))
    one, other = (crepa(hidden.double(), each.double(), *grids).loss.item() for each in stored)
    return abs(one - other)


@pytest.mark.parametrize("name", CASES)
def test_features_in_8_bits_hardly_change_the_loss_of_a_worked_case(name: str) -> None:
    case = tensors(name)
    crepa = worked_crepa(name, case, torch.float64)
    # Above the 1e-4 of real widths, as measured: what ten features are rounded by hardly averages out over few patches.
    assert change_in_8_bits(crepa, case["hidden"], case["features"], *grids(name)) < 6e-4


@pytest.mark.parametrize("width", [384, 1536])
def test_features_in_8_bits_of_a_real_width_change_the_loss_by_less_than_1e_4(width: int) -> None:
    case, grid = tensors("adjacent_d1"), TokenGrid(5, 4, 4)
    generator = torch.Generator().manual_seed(0)
    crepa = Crepa(case["hidden"].shape[-1], width).double()
    features = torch.randn(2, grid.frames, grid.tokens, width, generator=generator)
    with torch.no_grad():
        projected = crepa.projector(case["hidden"].double())
    # Half alike: what rounding takes from a similarity grows with it.
    features += torch.nn.functional.normalize(projected, dim=-1) * width**0.5
    assert change_in_8_bits(crepa, case["hidden"], features, grid, grid) < 1e-4
