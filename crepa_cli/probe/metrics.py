"""How similar two sets of vectors for the same tokens are, and how well one predicts the other. Plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBORS = 10
RIDGE = 0.1
"""The ridge penalty, in units of the mean square of an input, which is 1 for the output of a LayerNorm."""


def centered_kernel(vectors: Tensor) -> Tensor:
    """K `[n, n]`: inner products of vectors `[n, C]` after subtracting their mean; invariant to rotations."""
    centered = vectors - vectors.mean(0)
    return centered @ centered.T


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Centered kernel alignment of two kernels `[n, n]`, a 0-d tensor: 1 if equal, about 0 if independent.

    CKA(K, L) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the unbiased HSIC of Song et al. (2012), as Nguyen et al.
    (arXiv 2010.15327) estimate it over minibatches: the biased one finds independent vectors similar if there
    are fewer tokens than channels. With the diagonals of K and L set to zero,

        HSIC(K, L) = (tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'K L1 / (n - 2)) / (n (n - 3))

    Raises:
        ValueError: for fewer than four tokens.
    """
    if len(first) < 4:
        raise ValueError(f"linear CKA needs at least four tokens, got {len(first)}")
    return _aligned(_hsic(first, second), _hsic(first, first), _hsic(second, second))


def cknna(first: Tensor, second: Tensor, neighbors: int = NEIGHBORS) -> Tensor:
    """Centered kernel nearest-neighbor alignment of two kernels, a 0-d tensor: 1 for equal vectors.

    After Huh et al., "The Platonic Representation Hypothesis" (arXiv 2405.07987):

        Align(K, L) = sum over i, j of a(i, j) K[i, j] L[i, j]
        CKNNA(K, L) = Align(K, L) / sqrt(Align(K, K) Align(L, L))

    a(i, j) is 1 if i and j differ and j is among the nearest neighbors of i in both K and L; otherwise it is 0. Nearest
    is by Euclidean distance, K[i, i] + K[j, j] - 2 K[i, j]. Independent vectors share neighbors only by chance, which
    gives about neighbors / n.

    Args:
        first: K `[n, n]`, from `centered_kernel`.
        second: L `[n, n]`, for the same tokens.
        neighbors: number of neighbors of each token; n - 1 if there are fewer.
    """
    mine, theirs = _nearest(first, neighbors), _nearest(second, neighbors)
    shared = (first * second)[mine & theirs].sum()
    return _aligned(shared, (first[mine] ** 2).sum(), (second[theirs] ** 2).sum())


def _hsic(first: Tensor, second: Tensor) -> Tensor:
    n = len(first)
    first, second = (kernel - kernel.diagonal().diag() for kernel in (first, second))
    rows, others = first.sum(1), second.sum(1)
    trace = (first * second).sum() + rows.sum() * others.sum() / ((n - 1) * (n - 2)) - 2 * (rows @ others) / (n - 2)
    return trace / (n * (n - 3))


def _nearest(kernel: Tensor, neighbors: int) -> Tensor:
    """Whether j is among the nearest neighbors of i: bool `[n, n]`."""
    # K[i, i] shifts a whole row and does not change the order of its neighbors.
    distances = (kernel.diagonal() - 2 * kernel).fill_diagonal_(torch.inf)
    nearest = distances.topk(min(neighbors, len(kernel) - 1), largest=False).indices
    return torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, value=True)


def _aligned(both: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """A normalized alignment; 0 if all vectors on one side are equal."""
    tiny = torch.finfo(both.dtype).tiny
    return both / (first.clamp_min(tiny).sqrt() * second.clamp_min(tiny).sqrt())


class NormalEquations:
    """A linear regression with intercept, accumulated in parts: X'X and X'Y in float64.

    The weights W minimize |[X 1] W - Y|² + n RIDGE |W|², without a penalty on the intercept. Memory is
    (H + 1)(H + 1 + D) numbers, independent of the number of samples.

    Args:
        inputs: width H of X.
        outputs: width D of Y.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.samples = 0
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.moments = torch.zeros(inputs + 1, outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples X `[n, H]` and Y `[n, D]`."""
        extended = _with_one(x)
        self.samples += len(x)
        self.gram += extended.T @ extended
        self.moments += extended.T @ y.double()

    def merge(self, other: NormalEquations) -> None:
        """Add the samples of `other`."""
        self.samples += other.samples
        self.gram += other.gram
        self.moments += other.moments

    def constant(self) -> Tensor:
        """The mean of Y, `[D]`: the best prediction without X."""
        return self.moments[-1] / self.samples

    def solve(self) -> Tensor:
        """W `[H + 1, D]`; the last row is the intercept."""
        penalty = torch.full((len(self.gram),), RIDGE * self.samples, dtype=torch.float64)
        penalty[-1] = 0
        return torch.cholesky_solve(self.moments, torch.linalg.cholesky(self.gram + penalty.diag()))


def predicted_cosine(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The cosine `[...]` of each prediction [x 1] W with its target: x `[..., H]`, y `[..., D]`."""
    return F.cosine_similarity(_with_one(x) @ weights, y.double(), dim=-1)


def _with_one(x: Tensor) -> Tensor:
    return F.pad(x.double(), (0, 1), value=1.0)
