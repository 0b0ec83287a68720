"""avg@k and pass@k with bootstrap intervals over the questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CORRECT = 1.0 - 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its 95 % percentile-bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], resamples: int, seed: int = 0) -> Estimate:
    """Mean of `values`, and the 2.5 % and 97.5 % quantiles of the means of resamples of them.

    The samples of a question are not independent of each other, so questions are resampled whole.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"values: expected at least one number, got shape {array.shape}")
    if resamples < 1:
        raise ValueError(f"bootstrap: expected at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    means = [array[rng.integers(0, array.size, array.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))


def pass_at(correct: int, samples: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the unbiased estimate, from n samples, that one of k is right.

    Source: Chen et al., arXiv 2107.03374, equation 1.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@k: expected 0 <= correct <= n and 1 <= k <= n, got correct {correct}, "
            f"n {samples}, k {k}"
        )
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def summarize(
    scores: Sequence[Sequence[float]], resamples: int, seed: int = 0
) -> dict[str, Estimate]:
    """avg@k, the mean score of the k samples, and pass@j for j = 1, 2, 4 .. k.

    Args:
        scores: one row per question, one score in [0, 1] per sample; pass counts full marks only.
    """
    samples = len(scores[0]) if scores else 0
    if not samples or any(len(row) != samples for row in scores):
        raise ValueError("scores: expected the same number of samples, at least 1, per question")
    result = {f"avg@{samples}": bootstrap([float(np.mean(row)) for row in scores], resamples, seed)}
    solved = [sum(score >= _CORRECT for score in row) for row in scores]
    powers = {2**power for power in range(samples.bit_length())}
    for k in sorted(k for k in powers | {samples} if k <= samples):
        values = [pass_at(correct, samples, k) for correct in solved]
        result[f"pass@{k}"] = bootstrap(values, resamples, seed)
    return result
