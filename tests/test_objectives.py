"""Relation loss, convolution and spatial norm, compared with plain loops over frames and patches in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crepa_cli.alignment import Crepa, TokenGrid, comparison
from crepa_cli.alignment.grid import matching_frames
from crepa_cli.memory.live_bytes import LiveBytes

OPTIONS = st.fixed_dictionaries(
    {
        "adjacent_distance": st.integers(0, 3),
        "adjacent_tau": st.floats(0.3, 5),
        "cumulative_neighbors": st.booleans(),
        "normalize_by_frames": st.booleans(),
        "objective": st.sampled_from(["cosine", "relation"]),
        "projector": st.sampled_from(["linear", "conv"]),
        "spatial_norm": st.sampled_from([None, 0.0, 0.6, 1.0]),
    }
)
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 4))
CASES = settings(max_examples=30, deadline=None, derandomize=True)
MARGIN, EPS = 0.1, 1e-6


def case(
    seed: int, options: dict[str, Any], student: TokenGrid, teacher: TokenGrid, clips: int = 2
) -> tuple[Crepa, Tensor, Tensor]:
    """A projector, hidden states and features in float64."""
    torch.manual_seed(seed)
    crepa = Crepa(8, 6, **options).double()
    hidden = torch.randn(clips, student.frames, student.tokens, 8, dtype=torch.float64, requires_grad=True)
    features = torch.randn(clips, teacher.frames, teacher.tokens, 6, dtype=torch.float64)
    return crepa, hidden, features


def as_image(tokens: Tensor, grid: TokenGrid) -> Tensor:
    return tokens.T.reshape(1, -1, grid.rows, grid.columns)


def on_grid(tokens: Tensor, grid: TokenGrid, target: TokenGrid) -> Tensor:
    """Patches `[N, C]` of one frame on another grid, as an image `[1, C, rows, columns]`."""
    size = (target.rows, target.columns)
    return F.interpolate(as_image(tokens, grid), size=size, mode="bilinear", align_corners=False)


def plain_units(
    crepa: Crepa, hidden: Tensor, features: Tensor, student: TokenGrid, teacher: TokenGrid
) -> tuple[list[Tensor], list[Tensor]]:
    """P and Y of every frame of one clip, `[N, C]` each."""
    target = student if student.tokens <= teacher.tokens else teacher
    norm, layer = crepa.projector
    projections, targets = [], []
    for frame, taught in enumerate(matching_frames(teacher.frames, student.frames)):
        image = on_grid(norm(hidden[frame]), student, target)
        image = layer(image) if isinstance(layer, nn.Conv2d) else layer(image.movedim(1, -1)).movedim(-1, 1)
        projections.append(F.normalize(image.flatten(2)[0].T, dim=-1))
        patches = features[taught]
        if crepa.spatial_norm is not None:
            count = len(patches)
            mean = patches.sum(0) / count
            deviation = ((patches - mean).pow(2).sum(0) / max(count - 1, 1)).sqrt()
            patches = (patches - crepa.spatial_norm * mean) / (deviation + EPS)
        targets.append(F.normalize(on_grid(patches, teacher, target).flatten(2)[0].T, dim=-1))
    return projections, targets


def plain_pair(crepa: Crepa, ours: list[Tensor], theirs: list[Tensor], f: int, k: int) -> tuple[Tensor, Tensor]:
    """What a frame and another one add to the loss, and their similarity."""
    if crepa.objective == "cosine":
        cosine = torch.stack([ours[f][p] @ theirs[k][p] for p in range(len(ours[f]))]).mean()
        return -cosine, cosine
    count, terms, pairs = len(ours[f]), [], []
    for p in range(count):
        for q in range(count):
            mine, teachers = ours[f][p] @ ours[k][q], theirs[f][p] @ theirs[k][q]
            terms.append(F.relu((mine - teachers).abs() - MARGIN))
            if f != k or p != q or count == 1:
                pairs.append(torch.stack([mine, teachers]))
    both = torch.stack(pairs, dim=1).detach()
    both = both - both.mean(1, keepdim=True)
    norms = both.norm(dim=1)
    similarity = (both[0] @ both[1]) / norms.prod() if norms.prod() > 1e-20 else both.new_zeros(())
    return torch.stack(terms).mean(), similarity


def plain(
    crepa: Crepa, hidden: Tensor, features: Tensor, student: TokenGrid, teacher: TokenGrid
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, similarity and self-similarity by definition."""
    losses, similarities, own = [], [], []
    for clip in range(len(hidden)):
        ours, theirs = plain_units(crepa, hidden[clip], features[clip], student, teacher)
        loss = torch.zeros((), dtype=torch.float64)
        for f in range(student.frames):
            weighted, weights = torch.zeros((), dtype=torch.float64), 0.0
            for k in range(student.frames):
                distance, limit = abs(f - k), crepa.adjacent_distance
                if distance and (distance > limit if crepa.cumulative_neighbors else distance != limit):
                    continue
                weight = math.exp(-distance / crepa.adjacent_tau)
                term, similarity = plain_pair(crepa, ours, theirs, f, k)
                loss, weighted, weights = loss + weight * term, weighted + weight * similarity, weights + weight
                if f == k:
                    own.append(similarity)
            similarities.append(weighted / weights)
        losses.append(loss / student.frames if crepa.normalize_by_frames else loss)
    return torch.stack(losses).mean(), torch.stack(similarities).mean(), torch.stack(own).mean()


def assert_as_defined(crepa: Crepa, hidden: Tensor, features: Tensor, student: TokenGrid, teacher: TokenGrid) -> None:
    """Loss, similarities and all gradients are those of the plain reference and its autograd."""
    leaves = [hidden, *crepa.parameters()]
    expected = plain(crepa, hidden, features, student, teacher)
    found = crepa(hidden, features, student, teacher)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(result[0], leaves) for result in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm().clamp(min=1e-6)


@given(seed=st.integers(0, 99), options=OPTIONS, frames=st.integers(1, 4), student=GRIDS, teacher=GRIDS)
@CASES
def test_loss_and_gradients_are_those_of_the_definition(seed, options, frames, student, teacher) -> None:
    student_grid, teacher_grid = TokenGrid(frames, *student), TokenGrid(2 * frames - 1, *teacher)
    crepa, hidden, features = case(seed, options, student_grid, teacher_grid, clips=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "CHUNK_TOKENS", 1 + seed % 40)
        assert_as_defined(crepa, hidden, features, student_grid, teacher_grid)


def test_one_structure_in_other_directions_costs_nothing() -> None:
    """Rotated features have the same cosines: no loss, no gradient, and a correlation of 1."""
    grid = TokenGrid(3, 4, 5)
    crepa, hidden, _ = case(0, {"objective": "relation"}, grid, grid)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    features = (crepa.projector(hidden) @ rotation).detach()
    alignment = crepa(hidden, features, grid, grid)
    alignment.loss.backward()
    assert alignment.loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    torch.testing.assert_close(alignment.similarity, torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(alignment.self_similarity, torch.tensor(1.0, dtype=torch.float64))


def test_unrelated_structures_do_not_correlate() -> None:
    grid = TokenGrid(4, 8, 8)
    alignment = Crepa(64, 32, objective="relation")(torch.randn(2, 4, 64, 64), torch.randn(2, 4, 64, 32), grid, grid)
    assert abs(alignment.similarity) < 0.05
    assert abs(alignment.self_similarity) < 0.05


@given(seed=st.integers(0, 99), student=GRIDS, teacher=GRIDS, objective=st.sampled_from(["cosine", "relation"]))
@CASES
def test_a_convolution_with_its_middle_alone_is_the_linear_projector(seed, student, teacher, objective) -> None:
    grids = TokenGrid(3, *student), TokenGrid(5, *teacher)
    linear, hidden, features = case(seed, {"objective": objective}, *grids)
    conv = Crepa(8, 6, objective=objective, projector="conv").double()
    weights = linear.state_dict()
    middle = torch.zeros(6, 8, 3, 3, dtype=torch.float64)
    middle[:, :, 1, 1] = weights["projector.1.weight"]
    conv.load_state_dict({**weights, "projector.1.weight": middle})
    for one, other in zip(conv(hidden, features, *grids), linear(hidden, features, *grids), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "relation"},
        {"projector": "conv", "spatial_norm": 0.6},
        {"objective": "relation", "projector": "conv", "adjacent_distance": 3, "cumulative_neighbors": True},
    ],
)
def test_memory_does_not_grow_with_the_clip(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of live bytes beyond inputs and outputs, for the loss and its backward, without the gradient buffers."""
    monkeypatch.setattr(comparison, "CHUNK_TOKENS", 80)

    def extra(frames: int) -> float:
        student, teacher = TokenGrid(frames, 5, 8), TokenGrid(frames, 6, 6)
        crepa = Crepa(96, 64, **options)
        hidden = torch.randn(1, frames, student.tokens, 96).bfloat16().requires_grad_()
        features = torch.randn(1, frames, teacher.tokens, 64).half()
        with LiveBytes() as memory:
            crepa(hidden, features, student, teacher).loss.backward()
        outputs = [hidden.grad, *(parameter.grad for parameter in crepa.parameters())]
        return memory.peak - sum(tensor.nbytes for tensor in outputs if tensor is not None)

    assert extra(frames=44) <= 1.2 * extra(frames=11)


@pytest.mark.parametrize("projector", ["linear", "conv"])
@pytest.mark.parametrize("objective", ["cosine", "relation"])
def test_a_trained_projector_raises_the_similarity(objective: str, projector: str) -> None:
    """Cosine or correlation: features that hidden states determine are found in them, and the loss falls."""
    grid = TokenGrid(3, 4, 5)
    options = {"objective": objective, "projector": projector}
    crepa, hidden, _ = case(0, options, grid, grid)
    features = torch.tanh(hidden.detach() @ torch.randn(8, 6, dtype=torch.float64))
    optimizer = torch.optim.Adam(crepa.parameters(), lr=0.02)
    alignments = []
    for _ in range(60):
        alignments.append(crepa(hidden, features, grid, grid))
        optimizer.zero_grad()
        alignments[-1].loss.backward()
        optimizer.step()
    assert alignments[-1].self_similarity > alignments[0].self_similarity + 0.5
    assert alignments[-1].loss < alignments[0].loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "mse"}, "objective must be one of cosine, relation, got 'mse'"),
        ({"projector": "mlp"}, "projector must be one of linear, conv, got 'mlp'"),
        ({"spatial_norm": 2.0}, "spatial_norm must be None or from 0 to 1, got 2.0"),
        ({"spatial_align": False, "projector": "conv"}, "leaves one patch per frame"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Crepa(8, 6, **options)
