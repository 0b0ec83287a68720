"""avg@k and pass@k with intervals over the questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CORRECT = 1.0 - 1e-9
_NORMAL_975 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its 95 % interval."""

    mean: float
    low: float
    high: float


def proportion(values: Sequence[float], samples: int = 1) -> Estimate:
    """Mean p of `values` in [0, 1], one per question, and Wilson's interval for it:

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    For zeros and ones n is the number of questions. The samples of a question depend on each other:
    for their means n is p (1 - p) / (variance of p), as the spread over questions gives it, at most
    the number of all samples, and z is Student's quantile, as n was estimated. Where nothing varies
    n is the number of questions again: 0 right of 4 is an interval from 0 to 49 %.
    Source: Wilson, JASA 22 (1927); Franco et al., J. Surv. Stat. Methodol. 7 (2019) for n.

    Args:
        samples: responses behind each value.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"values: expected numbers in [0, 1], at least one, got {values!r:.80}")
    questions, mean = array.size, float(array.mean())
    count, z = float(questions), _NORMAL_975
    variance = float(array.var(ddof=1)) / questions if questions > 1 else 0.0
    if variance > 0 and (effective := mean * (1 - mean) / variance) > questions:
        count, z = min(effective, float(questions * samples)), _student_975(questions - 1)
    center = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    # An end that is 0 or 1 but for rounding: of no or only right answers.
    low, high = max(center - half, 0.0), min(center + half, 1.0)
    return Estimate(mean, low if mean > 0 else 0.0, high if mean < 1 else 1.0)


def _student_975(freedom: int) -> float:
    """97.5 % quantile of Student's t: Abramowitz and Stegun, 26.7.5; 1 % low at 3 degrees."""
    z, f = _NORMAL_975, freedom
    return (
        z
        + (z**3 + z) / (4 * f)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
    )


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


def summarize(scores: Sequence[Sequence[float]]) -> dict[str, Estimate]:
    """avg@k, the mean score of the k samples, and pass@j for j = 1, 2, 4 .. k.

    Args:
        scores: one row per question, one score in [0, 1] per sample; pass counts full marks only.
    """
    samples = len(scores[0]) if scores else 0
    if not samples or any(len(row) != samples for row in scores):
        raise ValueError("scores: expected the same number of samples, at least 1, per question")
    result = {f"avg@{samples}": proportion([float(np.mean(row)) for row in scores], samples)}
    solved = [sum(score >= _CORRECT for score in row) for row in scores]
    powers = {2**power for power in range(samples.bit_length())}
    for k in sorted(k for k in powers | {samples} if k <= samples):
        values = [pass_at(correct, samples, k) for correct in solved]
        result[f"pass@{k}"] = proportion(values, samples)
    return result
