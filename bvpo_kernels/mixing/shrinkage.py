"""From an estimate of a* and its error to the weight to train with."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

# Standard deviation of a weight that is uniform on [0, 1].
PRIOR_SD = 12**-0.5

Number = TypeVar("Number", float, Tensor)


def credibility(denominator: Number, variance: Number, freedom: float) -> Number:
    """z in [0, 1] of the posterior mean a0 + z (a - a0), a = numerator / denominator.

    With the denominator D known, the expected MSE given the data is E[D (a - a*)^2] + const: least
    at the posterior mean of a*. Let the prior be a* ~ N(a0, s^2), s = `PRIOR_SD`. The residual
    r = numerator - a0 D is linear in the moments, with mean (a* - a0) D and an error of variance v,
    so the posterior mean is a0 + z r / D with

        z = (s D)^2 / ((s D)^2 + v freedom / (freedom - 2)),

    freedom / (freedom - 2) being the variance of Student's t: 0 where it has none. v is taken at
    a0, where it contains no ratio: that at a has the same noise in it as a.

    Args:
        denominator: D > 0; a Tensor for many at once.
        variance: v >= 0, of numerator - a0 denominator.
        freedom: degrees of freedom of v.

    Source: the credibility factor (Buehlmann, ASTIN Bulletin 4, 1967); chosen among other rules by
    simulated regret (`python -m benchmarks.alpha_rules`; tables: bvpo_kernels/mixing/README.md).
    """
    if freedom <= 2:
        return 0 * denominator
    signal = (PRIOR_SD * denominator) ** 2
    return signal / (signal + variance * (freedom / (freedom - 2)))
