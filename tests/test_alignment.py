"""Laws of the alignment loss: geometry, invariances, memory."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crepa_cli.alignment import Alignment, Crepa, TokenGrid, comparison, layersync_loss
from crepa_cli.alignment.grid import interpolation_taps, matching_frames, teaching_frames
from crepa_cli.alignment.loss import neighbor_weights
from crepa_cli.alignment.resampling import Constants, Resampling
from crepa_cli.memory.live_bytes import LiveBytes

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))
SETTINGS = st.fixed_dictionaries(
    {
        "adjacent_distance": st.integers(0, 6),
        "adjacent_tau": st.floats(0.1, 10),
        "cumulative_neighbors": st.booleans(),
        "spatial_align": st.booleans(),
        "normalize_by_frames": st.booleans(),
    }
)
CASES = settings(max_examples=50, deadline=None, derandomize=True)


def case(
    seed: int, options: dict[str, Any], student: TokenGrid, teacher: TokenGrid, clips: int = 2
) -> tuple[Crepa, Tensor, Tensor]:
    """A projector, hidden states and features in float64, so that the laws hold to the last digits."""
    torch.manual_seed(seed)
    crepa = Crepa(8, 6, **options).double()
    hidden = torch.randn(clips, student.frames, student.tokens, 8, dtype=torch.float64, requires_grad=True)
    features = torch.randn(clips, teacher.frames, teacher.tokens, 6, dtype=torch.float64)
    return crepa, hidden, features


def assert_equal(ours: Alignment, theirs: Alignment) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [(30, 52), (45, 80), (16, 22), (52, 30)])
@pytest.mark.parametrize("features", [(37, 37), (16, 16)])
def test_compared_positions_are_less_than_half_a_patch_apart(
    tokens: tuple[int, int], features: tuple[int, int]
) -> None:
    """Tokens that contain their own coordinates still do on the comparison grid, to half a patch."""
    student, teacher = TokenGrid(1, *tokens), TokenGrid(1, *features)
    target = student if student.tokens <= teacher.tokens else teacher

    def compared(grid: TokenGrid) -> Tensor:
        rows, columns = (torch.arange(size, dtype=torch.float64) + 0.5 for size in (grid.rows, grid.columns))
        places = torch.stack(torch.meshgrid(rows / grid.rows, columns / grid.columns, indexing="ij"), dim=-1)
        constants = Constants(torch.device("cpu"), torch.float64)
        resampling, whole = Resampling(grid, target, constants), slice(0, target.rows)
        return resampling(places[None, resampling.window(whole)], whole, torch.float64)[0]

    misplaced = (compared(student) - compared(teacher)) * torch.tensor([target.rows, target.columns])
    assert misplaced.norm(dim=-1).mean() < 0.5


@given(source=st.integers(1, 60), target=st.integers(1, 60))
@CASES
def test_interpolation_is_that_of_torch(source: int, target: int) -> None:
    values = torch.randn(1, 3, source, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(values, size=target, mode="linear", align_corners=False)
    taps = interpolation_taps(slice(0, target), source, target)
    found = torch.lerp(
        values[..., taps.lower], values[..., taps.upper], torch.tensor(taps.fraction, dtype=torch.float64)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@given(student=st.integers(1, 50), factor=st.integers(1, 8))
def test_a_latent_frame_meets_the_last_video_frame_that_it_covers(student: int, factor: int) -> None:
    video_frames = factor * (student - 1) + 1
    assert matching_frames(video_frames, student) == [factor * i for i in range(student)]


@given(student=st.integers(1, 50), factor=st.integers(1, 8))
def test_the_middle_frame_lies_in_the_middle_of_those_that_a_latent_covers(student: int, factor: int) -> None:
    video_frames = factor * (student - 1) + 1
    assert teaching_frames(video_frames, student, "last") == matching_frames(video_frames, student)
    first, *others = teaching_frames(video_frames, student, "middle")
    assert first == 0
    for latent, frame in enumerate(others, start=1):
        covered = range(factor * (latent - 1) + 1, factor * latent + 1)
        before, after = frame - covered[0], covered[-1] - frame
        assert after - before in (0, 1)


@given(seed=st.integers(0, 99), options=SETTINGS, frames=st.integers(1, 6), student=GRIDS, teacher=GRIDS)
@CASES
def test_similarities_lie_between_minus_one_and_one(seed, options, frames, student, teacher) -> None:
    student_grid, teacher_grid = TokenGrid(frames, *student), TokenGrid(frames, *teacher)
    crepa, hidden, features = case(seed, options, student_grid, teacher_grid)
    with torch.no_grad():  # features equal to the projections are the extreme
        if student_grid == teacher_grid and seed % 2:
            features = crepa.projector(hidden)
    alignment = crepa(hidden, features, student_grid, teacher_grid)
    assert -1 <= alignment.similarity <= 1
    assert -1 <= alignment.self_similarity <= 1
    assert alignment.loss.requires_grad
    assert not alignment.similarity.requires_grad


@given(seed=st.integers(0, 99), options=SETTINGS, student=GRIDS, scale=st.floats(1e-3, 1e3))
@CASES
def test_scaled_features_give_the_same_loss(seed, options, student, scale) -> None:
    grid, teacher_grid = TokenGrid(4, *student), TokenGrid(7, 3, 3)
    crepa, hidden, features = case(seed, options, grid, teacher_grid)
    assert_equal(crepa(hidden, features * scale, grid, teacher_grid), crepa(hidden, features, grid, teacher_grid))


@given(seed=st.integers(0, 99), options=SETTINGS, frames=st.integers(1, 6))
@CASES
def test_cumulative_is_adjacent_at_distance_one(seed, options, frames) -> None:
    grid = TokenGrid(frames, 2, 3)
    crepa, hidden, features = case(seed, options | {"adjacent_distance": 1}, grid, grid)
    first = crepa(hidden, features, grid, grid)
    crepa.cumulative_neighbors = not crepa.cumulative_neighbors
    assert_equal(crepa(hidden, features, grid, grid), first)


@given(seed=st.integers(0, 99), options=SETTINGS)
@CASES
def test_a_clip_of_one_frame_has_no_neighbors(seed, options) -> None:
    grid = TokenGrid(1, 3, 2)
    crepa, hidden, features = case(seed, options, grid, grid)
    alignment = crepa(hidden, features, grid, grid)
    torch.testing.assert_close(alignment.similarity, alignment.self_similarity)
    torch.testing.assert_close(-alignment.loss.detach(), alignment.self_similarity)


@given(seed=st.integers(0, 99), options=SETTINGS, student=GRIDS, teacher=GRIDS, size=st.integers(1, 200))
@CASES
def test_the_chunk_size_changes_nothing_beyond_rounding(seed, options, student, teacher, size) -> None:
    student_grid, teacher_grid = TokenGrid(4, *student), TokenGrid(4, *teacher)
    crepa, hidden, features = case(seed, options, student_grid, teacher_grid)

    def run() -> tuple[Alignment, list[Tensor]]:
        alignment = crepa(hidden, features, student_grid, teacher_grid)
        return alignment, list(torch.autograd.grad(alignment.loss, [hidden, *crepa.parameters()]))

    whole, gradients = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "CHUNK_TOKENS", size)
        chunked, chunked_gradients = run()
    assert_equal(chunked, whole)
    for ours, theirs in zip(chunked_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 99), options=SETTINGS, order=st.permutations(range(3)))
@CASES
def test_permuted_clips_permute_their_gradients_and_nothing_else(seed, options, order) -> None:
    grid, teacher_grid = TokenGrid(3, 3, 4), TokenGrid(5, 2, 2)
    crepa, hidden, features = case(seed, options, grid, teacher_grid, clips=3)
    first = crepa(hidden, features, grid, teacher_grid)
    (gradient,) = torch.autograd.grad(first.loss, hidden)
    permuted = hidden.detach()[order].requires_grad_()
    second = crepa(permuted, features[order], grid, teacher_grid)
    (permuted_gradient,) = torch.autograd.grad(second.loss, permuted)
    assert_equal(second, first)
    torch.testing.assert_close(permuted_gradient, gradient[order])


def test_neighbors_outside_the_clip_do_not_exist() -> None:
    weights = neighbor_weights(frames=4, distance=2, tau=0.5, cumulative=False)
    decay = math.exp(-4)
    expected = torch.tensor([[1, 0, decay, 0], [0, 1, 0, decay], [decay, 0, 1, 0], [0, decay, 0, 1]])
    torch.testing.assert_close(weights, expected.double())


@pytest.mark.parametrize("spatial_align", [True, False])
def test_memory_grows_neither_with_the_clip_nor_with_the_distance(spatial_align: bool) -> None:
    """The peak of live bytes beyond inputs and outputs, for the loss and its backward, without the gradient buffers."""

    def extra(frames: int, distance: int) -> float:
        student, teacher = TokenGrid(frames, 15, 26), TokenGrid(frames, 18, 18)
        crepa = Crepa(96, 64, adjacent_distance=distance, cumulative_neighbors=True, spatial_align=spatial_align)
        hidden = torch.randn(1, frames, student.tokens, 96).bfloat16().requires_grad_()
        features = torch.randn(1, frames, teacher.tokens, 64).half()
        with LiveBytes() as memory:
            crepa(hidden, features, student, teacher).loss.backward()
        outputs = [hidden.grad, *(parameter.grad for parameter in crepa.parameters())]
        return memory.peak - sum(tensor.nbytes for tensor in outputs if tensor is not None)

    assert extra(frames=81, distance=1) <= 1.2 * extra(frames=21, distance=1)
    assert extra(frames=21, distance=8) <= 1.1 * extra(frames=21, distance=0)


class NewTensors(TorchDispatchMode):
    """Counts the tensors that are made of Python numbers; on a GPU, each of them makes the CPU wait."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_positions_are_copied_to_the_device_in_the_first_step_alone() -> None:
    student, teacher = TokenGrid(5, 30, 52), TokenGrid(9, 37, 37)
    crepa, hidden, features = case(0, {}, student, teacher)
    counts, gradients = [], []
    for _ in range(2):
        with NewTensors() as new:
            crepa(hidden, features, student, teacher).loss.backward()
        counts.append(new.count)
        gradients.append(hidden.grad)
        hidden.grad = None
    assert counts[0] > 0
    assert counts[1] == 0
    assert torch.equal(*cast(list[Tensor], gradients))


def test_wrong_shapes_are_refused_with_what_is_needed() -> None:
    crepa, grid = Crepa(8, 6), TokenGrid(2, 3, 4)
    hidden, features = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 6)
    with pytest.raises(ValueError, match=r"hidden has shape \[1, 2, 12, 8\]"):
        crepa(hidden, features, TokenGrid(2, 4, 4), grid)
    with pytest.raises(ValueError, match="features has shape"):
        crepa(hidden, hidden, grid, grid)
    with pytest.raises(ValueError, match="hidden has 1 clips and features has 2"):
        crepa(hidden, features.expand(2, -1, -1, -1), grid, grid)
    for tau in (0.0, math.nan):
        with pytest.raises(ValueError, match="adjacent_tau"):
            Crepa(8, 6, adjacent_tau=tau)
    with pytest.raises(ValueError, match="at least 1"):
        TokenGrid(0, 1, 1)


def test_a_missing_tensor_is_refused_by_name() -> None:
    crepa, grid, nothing = Crepa(8, 6), TokenGrid(2, 3, 4), cast(Any, None)
    with pytest.raises(TypeError, match="hidden must be a tensor, got NoneType"):
        crepa(nothing, torch.randn(1, 2, 12, 6), grid, grid)
    with pytest.raises(TypeError, match="features must be a tensor, got NoneType"):
        crepa(torch.randn(1, 2, 12, 8), nothing, grid, grid)
    with pytest.raises(TypeError, match="teacher must be a tensor, got NoneType"):
        layersync_loss(torch.randn(1, 2, 8), nothing)


@pytest.mark.parametrize("wrong", [None, (2, 3, 4)])
def test_what_is_no_grid_or_no_tensor_is_refused_by_name(wrong: Any) -> None:
    crepa, grid = Crepa(8, 6), TokenGrid(2, 3, 4)
    hidden, features = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 6)
    with pytest.raises(TypeError, match=r"student_grid must be a TokenGrid, got (NoneType|tuple)"):
        crepa(hidden, features, wrong, grid)
    with pytest.raises(TypeError, match=r"teacher_grid must be a TokenGrid, got (NoneType|tuple)"):
        crepa(hidden, features, grid, wrong)
    with pytest.raises(TypeError, match=r"hidden must be a tensor, got (NoneType|tuple)"):
        crepa(wrong, features, grid, grid)
    with pytest.raises(TypeError, match="features must be a tensor, got ndarray"):
        crepa(hidden, cast(Any, features.numpy()), grid, grid)


def test_layersync_is_minus_the_mean_cosine_and_leaves_the_teacher_alone() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5000, 8, requires_grad=True)
    result = layersync_loss(student, teacher)
    expected = -F.cosine_similarity(student, teacher.detach(), dim=-1).mean()
    torch.testing.assert_close(result, expected)
