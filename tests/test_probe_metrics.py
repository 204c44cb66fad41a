"""The figures of `crepa probe-blocks` compared with plain float64 references, their laws, and the recommendation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crepa_cli.alignment import Crepa, TokenGrid
from crepa_cli.alignment.grid import matching_frames
from crepa_cli.probe.clip import ComparedTokens, resampled
from crepa_cli.probe.measure import HeldOut, Measurement
from crepa_cli.probe.metrics import RIDGE, NormalEquations, centered_kernel, cknna, linear_cka, predicted_cosine
from crepa_cli.probe.recommend import Choice, recommend

SEEDS = st.integers(0, 2**32 - 1)


def vectors(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(vectors(seed, size, size))[0]


def reference_hsic(first: Tensor, second: Tensor) -> float:
    """The U-statistic of Song et al. (2012): a mean over all ordered quadruples of different tokens."""
    k, l = first @ first.T, second @ second.T  # noqa: E741 (K and L of the papers)
    n, total, count = len(first), 0.0, 0
    for i in range(n):
        for j in set(range(n)) - {i}:
            for q in set(range(n)) - {i, j}:
                for r in set(range(n)) - {i, j, q}:
                    total += float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]))
                    count += 1
    return total / count


def reference_cknna(first: Tensor, second: Tensor, neighbors: int) -> float:
    first, second = first - first.mean(0), second - second.mean(0)

    def nearest(points: Tensor, i: int) -> set[int]:
        others = sorted((j for j in range(len(points)) if j != i), key=lambda j: float((points[i] - points[j]).norm()))
        return set(others[:neighbors])

    def align(one: Tensor, other: Tensor) -> float:
        return sum(
            float(one[i] @ one[j]) * float(other[i] @ other[j])
            for i in range(len(one))
            for j in nearest(one, i) & nearest(other, i)
        )

    return align(first, second) / math.sqrt(align(first, first) * align(second, second))


def test_cka_is_the_mean_over_quadruples() -> None:
    first = vectors(0, 9, 5)
    second = first[:, :3] + vectors(1, 9, 3)
    hsic = reference_hsic(first, second)
    expected = hsic / math.sqrt(reference_hsic(first, first) * reference_hsic(second, second))
    found = linear_cka(centered_kernel(first), centered_kernel(second))
    assert float(found) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("tokens", "neighbors"), [(40, 10), (30, 3), (6, 10)])
def test_cknna_is_the_sum_over_shared_neighbors(tokens: int, neighbors: int) -> None:
    first = vectors(2, tokens, 6)
    second = first[:, :4] + 0.5 * vectors(3, tokens, 4)
    found = cknna(centered_kernel(first), centered_kernel(second), neighbors)
    assert float(found) == pytest.approx(reference_cknna(first, second, neighbors), rel=1e-10)


@pytest.mark.parametrize("measure", [linear_cka, cknna])
def test_identical_features_come_to_one(measure: type) -> None:
    kernel = centered_kernel(vectors(4, 200, 32))
    assert float(measure(kernel, kernel)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("tokens", "width"), [(1024, 16), (256, 2048)])
def test_independent_features_come_to_zero(tokens: int, width: int) -> None:
    first, second = centered_kernel(vectors(5, tokens, width)), centered_kernel(vectors(6, tokens, width))
    assert abs(float(linear_cka(first, second))) < 0.02
    assert abs(float(cknna(first, second))) < 1.5 * 10 / tokens


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(1e-2, 1e2), st.floats(-5, 5))
def test_rotation_scale_and_shift_change_nothing(seed: int, scale: float, shift: float) -> None:
    first, other = vectors(seed, 48, 8), vectors(seed + 1, 48, 8)
    second = first + other
    moved = scale * (second @ rotation(seed + 2, 8)) + shift
    kernels = [centered_kernel(one) for one in (first, second, moved)]
    for measure in (linear_cka, cknna):
        expected = float(measure(kernels[0], kernels[1]))
        assert float(measure(kernels[0], kernels[2])) == pytest.approx(expected, abs=1e-8)
        assert float(measure(kernels[1], kernels[0])) == pytest.approx(expected, abs=1e-12)


def test_features_that_are_all_equal_come_to_zero() -> None:
    constant = centered_kernel(torch.ones(20, 3, dtype=torch.float64))
    kernel = centered_kernel(vectors(7, 20, 3))
    assert float(linear_cka(kernel, constant)) == 0
    assert float(cknna(kernel, constant)) == 0


def test_cka_needs_four_tokens() -> None:
    kernel = centered_kernel(vectors(8, 3, 4))
    with pytest.raises(ValueError, match="four tokens"):
        linear_cka(kernel, kernel)


def reference_ridge(x: Tensor, y: Tensor) -> Tensor:
    """Least squares with the penalty as extra rows, on centered inputs and outputs."""
    penalty = math.sqrt(RIDGE * len(x)) * torch.eye(x.shape[1], dtype=x.dtype)
    centered = torch.cat([x - x.mean(0), penalty])
    targets = torch.cat([y - y.mean(0), torch.zeros(x.shape[1], y.shape[1], dtype=y.dtype)])
    weights = torch.linalg.lstsq(centered, targets).solution
    return torch.cat([weights, (y.mean(0) - x.mean(0) @ weights)[None]])


@pytest.mark.parametrize("samples", [12, 300])
def test_ridge_is_least_squares_with_a_penalty(samples: int) -> None:
    x, y = vectors(9, samples, 20), vectors(10, samples, 7) + 3
    equations = NormalEquations(20, 7)
    equations.add(x, y)
    torch.testing.assert_close(equations.solve(), reference_ridge(x, y), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(equations.constant(), y.mean(0))


def test_parts_add_up_to_the_whole() -> None:
    x, y = vectors(11, 90, 8), vectors(12, 90, 5)
    whole, streamed, rest = NormalEquations(8, 5), NormalEquations(8, 5), NormalEquations(8, 5)
    whole.add(x, y)
    for start in range(0, 60, 20):
        streamed.add(x[start : start + 20], y[start : start + 20])
    rest.add(x[60:], y[60:])
    streamed.merge(rest)
    torch.testing.assert_close(streamed.solve(), whole.solve(), rtol=1e-12, atol=1e-12)


def test_the_cosine_of_a_perfect_prediction() -> None:
    x, weights = vectors(13, 4, 30, 6), vectors(14, 7, 5)
    y = x @ weights[:-1] + weights[-1]
    torch.testing.assert_close(predicted_cosine(weights, x, y), torch.ones(4, 30, dtype=torch.float64))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (TokenGrid(5, 4, 6), TokenGrid(5, 4, 4)),
        (TokenGrid(3, 3, 5), TokenGrid(9, 7, 7)),
        (TokenGrid(1, 4, 6), TokenGrid(1, 4, 6)),
    ],
)
def test_states_meet_features_where_the_loss_has_them_meet(student: TokenGrid, teacher: TokenGrid) -> None:
    """The projector's cosines, averaged over all tokens, are the loss's similarity."""
    hidden = vectors(15, student.frames, student.tokens, 8).float()
    features = vectors(16, teacher.frames, teacher.tokens, 6).float()
    crepa = Crepa(8, 6, adjacent_distance=0)
    expected = crepa(hidden[None], features[None], student, teacher).self_similarity

    tokens = ComparedTokens(student, teacher, torch.Generator().manual_seed(0))
    normed = nn.functional.layer_norm(hidden, (8,)).unflatten(1, (student.rows, student.columns))
    chosen = features[matching_frames(teacher.frames, student.frames)].unflatten(1, (teacher.rows, teacher.columns))
    states, _ = tokens.look(normed)
    targets, _ = tokens.look(chosen)
    cosine = nn.functional.cosine_similarity(crepa.projector[1](states), targets, dim=-1).mean()
    torch.testing.assert_close(cosine, expected, rtol=1e-5, atol=1e-6)


def test_drift_is_what_neighboring_frames_differ_by() -> None:
    grid = TokenGrid(6, 2, 3)
    frames = vectors(17, 6, 2, 3, 4)
    _, drift = ComparedTokens(grid, grid, torch.Generator()).look(frames)
    tokens = frames.flatten(1, 2)
    expected = [1 - nn.functional.cosine_similarity(tokens[f], tokens[f + 1], dim=-1).mean() for f in range(5)]
    torch.testing.assert_close(drift, torch.stack(expected).mean())
    still = frames[:1].expand(6, -1, -1, -1)
    assert float(ComparedTokens(grid, grid, torch.Generator()).look(still)[1]) == pytest.approx(0, abs=1e-12)
    single = TokenGrid(1, 2, 3)
    assert float(ComparedTokens(single, single, torch.Generator()).look(frames[:1])[1]) == 0


def test_the_sample_is_bounded_and_spread_over_the_frames() -> None:
    grid = TokenGrid(9, 20, 20)
    tokens = ComparedTokens(grid, grid, torch.Generator().manual_seed(1))
    sample, _ = tokens.look(torch.arange(3600.0).view(9, 20, 20, 1))
    assert len(sample) == 1024
    assert len(sample.unique()) == 1024
    assert all(80 < len(patches) < 150 for patches in tokens.patches)
    assert resampled(torch.rand(20, 20, 3), TokenGrid(1, 5, 4)).shape == (20, 3)


def measurement(means: list[float], spread: float, constant: float = 0.4) -> Measurement:
    """A measurement of six clips with scores around `means`; differences between blocks vary by `spread` over clips."""
    wobble = spread * torch.linspace(-1, 1, 6, dtype=torch.float64)
    scores = torch.tensor(means, dtype=torch.float64) + wobble[:, None] * torch.arange(len(means)).remainder(2)
    cosines = scores[:, :, None].repeat(1, 1, 2)
    figures = torch.rand(len(means), 2)
    held_out = HeldOut(cosines, torch.full((6,), constant, dtype=torch.float64))
    return Measurement(6, [0.3, 0.7], figures, figures, figures, held_out)


@pytest.mark.parametrize(
    ("means", "spread", "chosen"),
    [
        ([0.45, 0.5, 0.6, 0.55, 0.5, 0.45], 0.0, 2),  # the best
        ([0.45, 0.585, 0.6, 0.55, 0.5, 0.45], 0.0, 1),  # nine tenths of what the best adds
        ([0.45, 0.575, 0.6, 0.55, 0.5, 0.45], 0.0, 2),  # less than that
        ([0.45, 0.575, 0.6, 0.55, 0.5, 0.45], 0.1, 1),  # the same, within a standard error
        ([0.45, 0.5, 0.5, 0.5, 0.5, 0.6], 0.0, 5),
        ([0.401, 0.403, 0.402, 0.4, 0.4, 0.4], 0.0, 4),  # nothing to tell: the default
        ([0.3, 0.35, 0.3, 0.3, 0.3, 0.3], 0.0, 4),
    ],
)
def test_the_earliest_block_that_is_as_good_as_the_best(means: list[float], spread: float, chosen: int) -> None:
    assert recommend(measurement(means, spread), Choice(4, "of the family")).block == chosen
