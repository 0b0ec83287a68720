"""Fused log-prob kernels, per-sample gradient statistics and the optimal mixing weight for BVPO."""

from bvpo_kernels.logprobs import linear_logprobs
from bvpo_kernels.types import EMPTY, IGNORE_INDEX, KINDS, TRACE, BVPOLoss, PackedBatch, TokenPair, Unit

__version__ = "0.1.0"
