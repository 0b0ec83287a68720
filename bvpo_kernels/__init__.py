"""Fused log-prob kernels, per-sample gradient statistics and the optimal mixing weight for BVPO."""

from bvpo_kernels import losses
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.logprobs import linear_logprobs
from bvpo_kernels.lora import lora_logprobs
from bvpo_kernels.losses import bvpo_loss
from bvpo_kernels.mixing import AlphaEstimator, StepStats, alpha_star, mixing_weights
from bvpo_kernels.packing import PackPlan, pack, plan_packs, segment_sum, unpack
from bvpo_kernels.tail import Certificate, tail_certificates
from bvpo_kernels.types import (
    EMPTY,
    IGNORE_INDEX,
    KINDS,
    TRACE,
    BVPOLoss,
    PackedBatch,
    TokenPair,
    Unit,
)

__all__ = [
    "EMPTY",
    "IGNORE_INDEX",
    "KINDS",
    "TRACE",
    "AlphaEstimator",
    "BVPOLoss",
    "Certificate",
    "GradStats",
    "PackPlan",
    "PackedBatch",
    "StepStats",
    "TokenPair",
    "Unit",
    "alpha_star",
    "bvpo_loss",
    "linear_logprobs",
    "lora_logprobs",
    "losses",
    "mixing_weights",
    "pack",
    "plan_packs",
    "segment_sum",
    "tail_certificates",
    "unpack",
]
__version__ = "0.1.0"
