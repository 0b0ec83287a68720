"""Several traces per response: importance weights of the marginal, and variance within prompts.

Suffixes: B units, N traces of a response, R replicates of a unit's gradient, K kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bvpo_kernels.mixing.moments import MIN_ESS


@dataclass(frozen=True)
class TraceWeights:
    """weights: [..., N], sum to 1, 0 where masked; `jackknife`: the same with the O(1/N) bias of
    self-normalisation removed (they sum to 1 but may be negative); ess: [...]; usable: ESS >= 2."""

    weights: Tensor
    jackknife: Tensor
    ess: Tensor
    usable: Tensor


def importance_weights(
    log_joint: Tensor, log_proposal: Tensor, mask: Tensor | None = None
) -> TraceWeights:
    """w_k = v_k / sum_j v_j,  v_k = pi(r_k, y | x) / q(r_k | x, y),  ESS = 1 / sum w_k^2.

    sum_k w_k grad log pi(r_k, y | x) estimates grad log pi(y | x), the mean of the gradient of
    log pi(r, y | x) over r | x, y, with a bias of order 1 / N. The jackknife over traces, N m minus
    (N - 1) / N times the sum of the leave-one-out estimates m_(-k), takes it to order 1 / N^2, and
    is linear in the gradients: its weight is N w_k - (N - 1) / N sum_(j != k) w_k / (1 - w_j).

    Args:
        log_joint: [..., N] log pi(r_k, y | x) (prompt and answer the same for all N).
        log_proposal: [..., N] log q(r_k | x, y) of the distribution that drew the traces.
        mask: [..., N] bool, traces that exist; None: all.

    Returns:
        TraceWeights, fp64. A response that is not `usable` has too few traces that count: leave
        its unit out of the step (`StepStats.skipped`). Without any trace the weights are 0.
    """
    if log_joint.shape != log_proposal.shape or log_joint.ndim == 0:
        expected = f"shape {list(log_joint.shape)}, [..., N]"
        raise ValueError(f"log_proposal: expected {expected}, got {list(log_proposal.shape)}")
    if mask is None:
        mask = torch.ones_like(log_joint, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != log_joint.shape:
        got = f"{mask.dtype} of {list(mask.shape)}"
        raise ValueError(f"mask: expected bool of {list(log_joint.shape)}, got {got}")
    log_ratio = (log_joint.double() - log_proposal.double()).where(mask, -torch.inf)
    if not bool((log_ratio[mask] < torch.inf).all()):
        raise ValueError("log_joint - log_proposal: expected values < inf, got NaN or infinity")
    weights = log_ratio.softmax(-1).nan_to_num(0.0)  # a row of -inf alone is a row of NaN
    ess = weights.square().sum(-1).reciprocal().where(weights.any(-1), 0.0)
    count = mask.sum(-1, keepdim=True)
    rest = (1 - weights).where(mask & (weights < 1), torch.inf)
    without = rest.reciprocal().sum(-1, keepdim=True) - rest.reciprocal()
    jackknife = weights * (count - (count - 1) / count.clamp(min=1) * without)
    return TraceWeights(weights, jackknife, ess, ess >= MIN_ESS)


def within_unit(replicates_KKRR: Tensor) -> Tensor:
    """tr Cov(u, v | prompt) = [sum_r <u_r, v_r> - sum_rs <u_r, v_s> / R] / (R - 1).

    It is that of one replicate; for a unit whose gradient is the mean of R of them, divide by R.

    Args:
        replicates_KKRR: [..., K, K, R, R] of <u_r, v_s>: R >= 2 replicates of each kind's gradient,
            independent given the prompt, replicate r of all kinds drawn together.

    Returns:
        [..., K, K].
    """
    if replicates_KKRR.ndim < 4 or replicates_KKRR.shape[-1] != replicates_KKRR.shape[-2]:
        got = list(replicates_KKRR.shape)
        raise ValueError(f"replicates_KKRR: expected shape [..., K, K, R, R], got {got}")
    count = replicates_KKRR.shape[-1]
    if count < 2:
        raise ValueError(f"replicates_KKRR: expected at least 2 replicates, got {count}")
    same = replicates_KKRR.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (same - replicates_KKRR.sum((-2, -1)) / count) / (count - 1)
