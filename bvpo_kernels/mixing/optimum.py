"""The mean squared error of a mixture of gradient estimators, and the weight that minimises it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from bvpo_kernels import checks
from bvpo_kernels.mixing.moments import COVARIANCES, MEANS, WITHIN, Moments, StepStats, unbiased
from bvpo_kernels.mixing.shrinkage import credibility
from bvpo_kernels.types import EMPTY, TRACE

Target = Literal["population", "batch"]

MARGINAL = "marginal"
# Below this share of the squared norms that cancel in it, E|d_bar|^2 is rounding error.
_ROUNDING = 64 * torch.finfo(torch.float64).eps


def _check_question(moments: Moments, batch_size: float | None, target: str) -> float:
    """The batch size asked about."""
    if target not in ("population", "batch"):
        raise ValueError(f"target: expected 'population' or 'batch', got {target!r}")
    if target == "batch" and moments.values_XKK.shape[0] <= WITHIN:
        raise ValueError("target: expected 'population' for stats without within_BKK, got 'batch'")
    if batch_size is None:
        return float(moments.num_units)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | float):
        raise TypeError(f"batch_size: expected a number or None, got {type(batch_size).__name__}")
    if not 0 < batch_size < math.inf:
        raise ValueError(f"batch_size: expected a finite number > 0, got {batch_size}")
    return float(batch_size)


def _error_matrix(values_XKK: Tensor, reference: int, batch_size: float, target: str) -> Tensor:
    """`mse_matrix` over all kinds; linear in `values_XKK`, leading axes broadcast."""

    def around(product_KK: Tensor, with_reference_KK: Tensor) -> Tensor:
        """<u - r, v - r> from <u, v> and <u, r>, r standing for the reference."""
        with_r = with_reference_KK[..., reference]
        return (
            product_KK
            - with_r[..., :, None]
            - with_r[..., None, :]
            + with_reference_KK[..., reference, reference, None, None]
        )

    covariance, means = values_XKK[..., COVARIANCES, :, :], values_XKK[..., MEANS, :, :]
    if target == "batch":
        covariance = around(covariance, covariance - values_XKK[..., WITHIN, :, :])
    return around(means, means) + covariance / batch_size


def mse_matrix(
    moments: Moments,
    batch_size: float | None = None,
    *,
    reference: str = TRACE,
    target: Target = "population",
) -> Tensor:
    """M_uv = <b_u, b_v> + tr C_uv / B: the mixture of batch means has squared error w^T M w.

    b_u = mu_u - mu_r is the bias against the reference kind r. target "population": the error
    against mu_r, C = S. "batch": against the mean of E[r_i | prompt] over the prompts of the batch,
    C_uv = tr Cov(u - E[r | x], v - E[r | x]), where Cov(u, E[r | x]) = S_ur - (its part within
    prompts). An unbiased estimate, so M need not be positive definite; the sum x^T M x with
    sum_k x_k = 0 is >= 0 for B up to the number of units measured.

    Args:
        moments: of one step or of several.
        batch_size: B of the question; None: that of the moments.
        reference: the kind whose mean is the truth.
        target: whose gradient is estimated.

    Returns:
        [K, K] fp64, in the order of `moments.kinds`.
    """
    batch_size = _check_question(moments, batch_size, target)
    r = moments.index("reference", reference)
    return _error_matrix(moments.values_XKK, r, batch_size, target)


@dataclass(frozen=True)
class AlphaStar:
    """The optimal weight of the traces, how well it is known, and what it is made of.

    alpha: `raw` clipped to [0, 1]. raw = numerator / denominator, the minimum of
    MSE(a) = mse[0] + mse[1] a + mse[2] a^2; the fallback where the denominator is not positive (the
    kinds are identical, or noise hides that they differ). se: standard error of `raw`, inf when
    unknown. low, high: its confidence interval, clipped to [0, 1]. determined: False where that is
    all of [0, 1]. weight: what to train with, fallback + credibility (raw - fallback) within
    [0, 1]. credibility: how far the data carry, 0 to 1; 0 where a* is not determined. data_needed:
    about how many times these data determine a* (at most 1: they do; inf: unknown). q,
    kappa = q / tr S_d, batch_mix = tr S_d / |Delta|^2 (inf where the estimate of |Delta|^2 is not
    positive) give a* for other batch sizes.
    """

    alpha: float
    raw: float
    se: float
    low: float
    high: float
    determined: bool
    weight: float
    credibility: float
    data_needed: float
    numerator: float
    denominator: float
    batch_size: float
    q: float
    kappa: float
    batch_mix: float
    delta_sq: float
    tr_trace: float
    tr_empty: float
    tr_cross: float
    mse: tuple[float, float, float]


def t_quantile(probability: float, freedom: float) -> float:
    """Student's t quantile, within 1 % for two degrees of freedom or more and 1e-4 from eight.

    The expansion around the normal quantile: Abramowitz and Stegun, 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


@dataclass(frozen=True)
class _Levels:
    """Confidence of the interval, and the weight without data."""

    confidence: float
    fallback: float


@dataclass(frozen=True)
class _Question:
    """Which mixture, around which reference, at which batch size."""

    trace: int
    empty: int
    reference: int
    batch_size: float
    target: str

    def matrix(self, values_XKK: Tensor) -> Tensor:
        return _error_matrix(values_XKK, self.reference, self.batch_size, self.target)

    def quadratic(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of a*: w^T M w for w = (a, 1 - a) is least at their ratio."""
        cross = matrix[..., self.trace, self.empty]
        m_tt, m_ee = matrix[..., self.trace, self.trace], matrix[..., self.empty, self.empty]
        return m_ee - cross, m_tt - 2 * cross + m_ee

    def noise(self, values_XKK: Tensor) -> Tensor:
        """q: 1 - a* is <b_t, Delta> + q / B, over the denominator."""
        covariance, t, e = values_XKK[COVARIANCES], self.trace, self.empty
        q = covariance[t, t] - covariance[t, e]
        if self.target == "batch":
            between_K = covariance[self.reference] - values_XKK[WITHIN, self.reference]
            q = q - between_K[t] + between_K[e]
        return q


def _residual_variance(question: _Question, moments: Moments, a: float) -> float:
    """Of the error of numerator - a denominator; inf when unknown.

    It is linear in the moments; its coefficients are its values on the unit vectors.
    """
    if moments.covariance_FF is None:
        return math.inf
    values_XKK = moments.values_XKK
    basis = torch.eye(values_XKK.numel(), dtype=torch.float64).view(-1, *values_XKK.shape)
    numerator_F, denominator_F = question.quadratic(question.matrix(basis))
    coefficient_F = numerator_F - a * denominator_F
    return (coefficient_F @ moments.covariance_FF @ coefficient_F).clamp(min=0).item()


@dataclass(frozen=True)
class _Known:
    """How well a* is known: fields of `AlphaStar`. The defaults know nothing."""

    se: float = math.inf
    low: float = 0.0
    high: float = 1.0
    credibility: float = 0.0
    data_needed: float = math.inf


def _known(
    question: _Question, moments: Moments, raw: float, denominator: float, levels: _Levels
) -> _Known:
    """The symmetric interval raw -+ t se, and how far it lets the weight move."""
    variance = _residual_variance(question, moments, raw)
    if math.isinf(variance):
        return _Known()
    se = math.sqrt(variance) / denominator
    half = t_quantile((1 + levels.confidence) / 2, moments.freedom) * se
    low, high = (min(1.0, max(0.0, bound)) for bound in (raw - half, raw + half))
    # raw -+ half covers [0, 1] from half = max(raw, 1 - raw) on, and half^2 falls as 1 / n.
    needed = (half / max(raw, 1 - raw)) ** 2
    if low == 0.0 and high == 1.0:
        return _Known(se=se, data_needed=needed)
    at_fallback = _residual_variance(question, moments, levels.fallback)
    return _Known(se, low, high, credibility(denominator, at_fallback, moments.freedom), needed)


def alpha_star(
    moments: Moments | StepStats,
    batch_size: float | None = None,
    *,
    reference: str = TRACE,
    target: Target = "population",
    confidence: float = 0.95,
    fallback: float = 0.5,
) -> AlphaStar:
    """a* = argmin_a E |a t_bar + (1 - a) e_bar - mu|^2 from B units, clipped to [0, 1].

    With M = `mse_matrix`, d = t - e and Delta = mu_t - mu_e:
    MSE(a) = M_ee - 2 a (M_ee - M_te) + a^2 (M_tt - 2 M_te + M_ee), hence
    a* = [-<b_e, Delta> - tr S_ed / B] / [|Delta|^2 + tr S_d / B].
    The denominator is E |d_bar|^2. reference "trace" has b_t = 0, so the numerator is the
    denominator - (tr S_ed + tr S_d) / B = denominator - q / B with q = tr S_td, and at the measured
    B, where the unbiased denominator is |d_bar|^2 itself, a* = 1 - q / (B |d_bar|^2): never divided
    by a negative number, a positive-part James-Stein rule. For target "batch" q is the part of
    tr S_td within prompts. In general 1 - a* = (<b_t, Delta> + q / B) / denominator.

    Args:
        moments: of one step, or averaged over steps by `AlphaEstimator`.
        batch_size: B of the training step that a* is for; None: the batch size measured.
        reference: the kind that is the truth: "trace", exact while policy, reference model and
            generator agree and selection looks at answers only; or "marginal".
        target: "population", or "batch" where `within_BKK` was measured.
        confidence: of the interval, raw -+ t se with Student's t.
        fallback: the weight where the moments do not determine one, and where it moves from as
            they do (`credibility`).

    Returns:
        AlphaStar. Its `se` holds B of the question fixed and is linearised: the standard error of
        numerator - a* denominator, over the denominator.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

    Source: arXiv 2510.05095 (a*); the estimators from per-unit statistics are this package's.
    """
    if isinstance(moments, StepStats):
        moments = unbiased(moments)
    if not isinstance(moments, Moments):
        raise TypeError(f"moments: expected Moments or StepStats, got {type(moments).__name__}")
    checks.number("fallback", fallback, lambda a: 0 <= a <= 1, "a number in [0, 1]")
    checks.number("confidence", confidence, lambda c: 0 < c < 1, "a number in (0, 1)")
    question = _Question(
        trace=moments.index("kinds", TRACE),
        empty=moments.index("kinds", EMPTY),
        reference=moments.index("reference", reference),
        batch_size=_check_question(moments, batch_size, target),
        target=target,
    )
    return _solve(question, moments, _Levels(confidence, fallback))


def _solve(question: _Question, moments: Moments, levels: _Levels) -> AlphaStar:
    """`alpha_star` of checked arguments."""
    covariance, means = moments.values_XKK[COVARIANCES], moments.values_XKK[MEANS]
    matrix = question.matrix(moments.values_XKK)
    numerator, denominator = (value.item() for value in question.quadratic(matrix))
    t, e = question.trace, question.empty
    size = covariance.diagonal() / question.batch_size + means.diagonal().abs()
    raw, known = levels.fallback, _Known()
    if denominator > _ROUNDING * (size[t] + size[e]).item():
        raw = numerator / denominator
        known = _known(question, moments, raw, denominator, levels)
    weight = levels.fallback + known.credibility * (raw - levels.fallback)
    delta_sq = question.quadratic(means)[1].item()
    tr_d = question.quadratic(covariance)[1].item()
    q = question.noise(moments.values_XKK).item()
    return AlphaStar(
        alpha=min(1.0, max(0.0, raw)),
        raw=raw,
        **vars(known),
        determined=known.low > 0.0 or known.high < 1.0,
        weight=min(1.0, max(0.0, weight)),
        numerator=numerator,
        denominator=denominator,
        batch_size=question.batch_size,
        q=q,
        kappa=q / tr_d if tr_d > 0 else math.inf,
        batch_mix=tr_d / delta_sq if delta_sq > 0 else math.inf,
        delta_sq=delta_sq,
        tr_trace=covariance[t, t].item(),
        tr_empty=covariance[e, e].item(),
        tr_cross=covariance[t, e].item(),
        mse=(matrix[e, e].item(), -2 * numerator, denominator),
    )
