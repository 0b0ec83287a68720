"""Oracles of the mixing statistics: on the gradients themselves, from definitions, in plain loops.

`gradients_BKD` is fp64 [units, kinds, parameters]; nothing here goes through Gram matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def covariance(gradients_BKD: Tensor, u: int, v: int) -> float:
    """tr S_uv: mean over pairs of units of <u_i - u_j, v_i - v_j> / 2."""
    terms = [
        0.5 * torch.dot(one[u] - other[u], one[v] - other[v]).item()
        for one, other in itertools.combinations(gradients_BKD, 2)
    ]
    return math.fsum(terms) / len(terms)


def mean_product(gradients_BKD: Tensor, u: int, v: int) -> float:
    """<mu_u, mu_v>: mean over ordered pairs of different units of <u_i, v_j>."""
    terms = [
        torch.dot(one[u], other[v]).item()
        for one, other in itertools.permutations(gradients_BKD, 2)
    ]
    return math.fsum(terms) / len(terms)


def mixture_error(
    gradients_BKD: Tensor, weights: Sequence[float], reference: int, batch_size: float
) -> float:
    """Estimated E |sum_k w_k k_bar - mu_r|^2 of a batch: |bias|^2 + variance / B of the mixture."""
    mixture = torch.zeros_like(gradients_BKD[:, 0])
    for k, weight in enumerate(weights):
        mixture = mixture + weight * gradients_BKD[:, k]
    against = torch.stack([mixture, mixture - gradients_BKD[:, reference]], dim=1)
    return mean_product(against, 1, 1) + covariance(against, 0, 0) / batch_size


def quadratic(
    gradients_BKD: Tensor, t: int, e: int, reference: int, batch_size: float
) -> tuple[float, float]:
    """Numerator and denominator of a*, read off three points of the parabola MSE(a)."""

    def at(a: float) -> float:
        weights = [0.0] * gradients_BKD.shape[1]
        weights[t], weights[e] = a, 1 - a
        return mixture_error(gradients_BKD, weights, reference, batch_size)

    zero, half, one = at(0.0), at(0.5), at(1.0)
    curvature = 2 * (zero - 2 * half + one)
    return (curvature - (one - zero)) / 2, curvature


def jackknife_error(
    gradients_BKD: Tensor, t: int, e: int, reference: int, batch_size: float
) -> float:
    """Standard error of a*: leave-one-out values of the residual numerator - a* denominator."""
    numerator, denominator = quadratic(gradients_BKD, t, e, reference, batch_size)
    units = gradients_BKD.shape[0]
    residuals = []
    for left_out in range(units):
        rest = torch.cat([gradients_BKD[:left_out], gradients_BKD[left_out + 1 :]])
        n, d = quadratic(rest, t, e, reference, batch_size)
        residuals.append(n - numerator / denominator * d)
    mean = math.fsum(residuals) / units
    squares = math.fsum((r - mean) ** 2 for r in residuals)
    return math.sqrt((units - 1) / units * squares) / denominator


def simplex_grid(size: int, steps: int) -> Iterator[tuple[float, ...]]:
    """All weights that are multiples of 1 / steps and sum to one."""
    if size == 1:
        yield (1.0,)
        return
    for bars in itertools.combinations(range(steps + size - 1), size - 1):
        cuts = (-1, *bars, steps + size - 1)
        yield tuple((b - a - 1) / steps for a, b in itertools.pairwise(cuts))


def self_normalised(log_ratios: Sequence[float], values: Sequence[float]) -> float:
    """sum_k v_k f_k / sum_k v_k."""
    ratios = [math.exp(log_ratio) for log_ratio in log_ratios]
    return math.fsum(v * f for v, f in zip(ratios, values, strict=True)) / math.fsum(ratios)


def jackknifed(log_ratios: Sequence[float], values: Sequence[float]) -> float:
    """N m - (N - 1) mean_k m_(-k), m_(-k) the self-normalised mean without trace k."""
    n = len(values)
    without = [
        self_normalised([*log_ratios[:k], *log_ratios[k + 1 :]], [*values[:k], *values[k + 1 :]])
        for k in range(n)
    ]
    return n * self_normalised(log_ratios, values) - (n - 1) * math.fsum(without) / n


def t_distribution(quantile: float, freedom: float, steps: int = 4000) -> float:
    """P(T <= quantile), quantile >= 0: 1/2 + the integral of Student's density, Simpson's rule."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    width = quantile / steps
    total = 0.0
    for i in range(steps + 1):
        weight = 1 if i in (0, steps) else 4 if i % 2 else 2
        total += weight * (1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2)
    return 0.5 + scale / math.sqrt(freedom * math.pi) * total * width / 3
