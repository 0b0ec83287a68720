"""Fused log-prob kernels, per-sample gradient statistics and the optimal mixing weight for BVPO."""

from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.head import linear_bvpo_loss, linear_logprobs
from bvpo_kernels.losses import bvpo_loss
from bvpo_kernels.mixing import AlphaEstimator, alpha_star
from bvpo_kernels.packing import pack, segment_sum
from bvpo_kernels.types import IGNORE_INDEX, BVPOLoss, PackedBatch, TokenPair, Unit

__all__ = [
    "IGNORE_INDEX",
    "AlphaEstimator",
    "BVPOLoss",
    "GradStats",
    "PackedBatch",
    "TokenPair",
    "Unit",
    "alpha_star",
    "bvpo_loss",
    "linear_bvpo_loss",
    "linear_logprobs",
    "pack",
    "segment_sum",
]
__version__ = "0.1.0"
