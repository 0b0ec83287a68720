"""Every operator of the package: importing this registers them all."""

from bvpo_kernels.ops.grad_stats import (
    grouped_embedding_backward,
    grouped_linear_backward,
    grouped_norm_statistics,
    pair_reduce,
)
from bvpo_kernels.ops.head import (
    linear_logprobs_backward,
    linear_logprobs_forward,
    linear_logprobs_statistics,
)
from bvpo_kernels.ops.packing import segment_sum
from bvpo_kernels.ops.pair_loss import linear_pair_loss, linear_pair_loss_statistics

__all__ = [
    "grouped_embedding_backward",
    "grouped_linear_backward",
    "grouped_norm_statistics",
    "linear_logprobs_backward",
    "linear_logprobs_forward",
    "linear_logprobs_statistics",
    "linear_pair_loss",
    "linear_pair_loss_statistics",
    "pair_reduce",
    "segment_sum",
]
