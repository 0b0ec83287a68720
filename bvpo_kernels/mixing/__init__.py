"""a*: the mixing weight of least mean squared error, from inner products of per-unit gradients."""

from bvpo_kernels.mixing.estimator import AlphaEstimator
from bvpo_kernels.mixing.moments import MIN_ESS, Moments, StepStats, unbiased
from bvpo_kernels.mixing.optimum import MARGINAL, AlphaStar, Target, alpha_star, mse_matrix
from bvpo_kernels.mixing.simplex import MixingWeights, minimise_on_simplex, mixing_weights
from bvpo_kernels.mixing.traces import (
    TraceWeights,
    importance_weights,
    within_unit,
)

__all__ = [
    "MARGINAL",
    "MIN_ESS",
    "AlphaEstimator",
    "AlphaStar",
    "MixingWeights",
    "Moments",
    "StepStats",
    "Target",
    "TraceWeights",
    "alpha_star",
    "importance_weights",
    "minimise_on_simplex",
    "mixing_weights",
    "mse_matrix",
    "unbiased",
    "within_unit",
]
