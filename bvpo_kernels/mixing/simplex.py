"""The best mixture of several gradient estimators: w^T M w over the simplex, exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bvpo_kernels.mixing.moments import Moments, StepStats, unbiased
from bvpo_kernels.mixing.optimum import MARGINAL, Target, mse_matrix
from bvpo_kernels.types import TRACE

MAX_ESTIMATORS = 8
_TOLERANCE = 1e-12  # of the largest |M|: how far a weight may be below 0, and what counts as better


@dataclass(frozen=True)
class MixingWeights:
    """weights: kind -> w >= 0, summing to 1. mse: w^T M w. kind_mse: that of each kind alone."""

    weights: dict[str, float]
    mse: float
    kind_mse: dict[str, float]
    batch_size: float


def minimise_on_simplex(matrix: Tensor) -> Tensor:
    """argmin w^T M w subject to w >= 0 and sum w = 1.

    Every face of the simplex is tried: on the face of the kinds A the stationary point solves
    2 M_AA w = lambda 1, 1^T w = 1. A minimum is the stationary point of some face, also when M is
    not positive semidefinite; a singular face gets its solution of least norm, so kinds that are
    identical share their weight. Larger faces win ties.

    Args:
        matrix: [n, n] symmetric fp64, n <= 8 (255 systems of at most nine unknowns).

    Returns:
        [n] fp64.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix: expected shape [n, n], got {list(matrix.shape)}")
    n = matrix.shape[0]
    if not 1 <= n <= MAX_ESTIMATORS:
        raise ValueError(f"matrix: expected 1 to {MAX_ESTIMATORS} estimators, got {n}")
    if not bool(matrix.isfinite().all()):
        raise ValueError("matrix: expected finite values, got NaN or infinity")
    scaled = matrix.double() / matrix.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    best, least = torch.zeros(n, dtype=torch.float64), math.inf
    for size in range(n, 0, -1):
        for face in itertools.combinations(range(n), size):
            weights = _stationary_point(scaled, face)
            value = (weights @ scaled @ weights).item()
            if bool((weights >= -_TOLERANCE).all()) and value < least - _TOLERANCE:
                best, least = weights, value
    best = best.clamp(min=0)
    return best / best.sum()


def _stationary_point(matrix: Tensor, face: Sequence[int]) -> Tensor:
    """On a face, over all kinds; its weights sum to 1 but may be negative (then it does not count).

    A minimum that only a singular face has also lies on one of its sub-faces, so a system without
    a solution loses nothing: -1 marks it.
    """
    size = len(face)
    system = torch.ones(size + 1, size + 1, dtype=torch.float64)
    system[:size, :size] = matrix[list(face)][:, list(face)]
    system[size, size] = 0
    right = torch.zeros(size + 1, dtype=torch.float64)
    right[size] = 1
    solution = torch.linalg.pinv(system, hermitian=True) @ right
    weights = matrix.new_full((matrix.shape[0],), 0.0)
    weights[list(face)] = solution[:size]
    if (system @ solution - right).abs().max() > 1e-9:
        weights.fill_(-1.0)
    return weights


def mixing_weights(
    moments: Moments | StepStats,
    batch_size: float | None = None,
    *,
    reference: str = TRACE,
    target: Target = "population",
    estimators: Sequence[str] | None = None,
) -> MixingWeights:
    """argmin_w E |sum_k w_k k_bar - mu|^2 = w^T M w over the simplex, M = `mse_matrix`.

    With the estimators trace and empty this is `alpha_star`, a = w_trace: the estimate itself,
    whatever its error (`AlphaStar.weight` and `AlphaEstimator` mind it).

    Args:
        moments, batch_size, reference, target: as for `alpha_star`.
        estimators: kinds to mix, at most eight; None: all but "marginal", which is a truth to
            compare with and costs K traces.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
    """
    if isinstance(moments, StepStats):
        moments = unbiased(moments)
    matrix = mse_matrix(moments, batch_size, reference=reference, target=target)
    if estimators is None:
        estimators = [kind for kind in moments.kinds if kind != MARGINAL]
    if not 1 <= len(estimators) <= MAX_ESTIMATORS or len(set(estimators)) != len(estimators):
        expected = f"1 to {MAX_ESTIMATORS} distinct kinds"
        raise ValueError(f"estimators: expected {expected}, got {list(estimators)}")
    chosen = [moments.index("estimators", kind) for kind in estimators]
    matrix = matrix[chosen][:, chosen]
    weights = minimise_on_simplex(matrix)
    return MixingWeights(
        weights=dict(zip(estimators, weights.tolist(), strict=True)),
        mse=(weights @ matrix @ weights).item(),
        kind_mse=dict(zip(estimators, matrix.diagonal().tolist(), strict=True)),
        batch_size=float(moments.num_units if batch_size is None else batch_size),
    )
