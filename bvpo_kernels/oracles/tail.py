"""Oracle of the sparse backward: the textbook path, with the smallest probabilities set to zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _SparseLogSoftmax(torch.autograd.Function):
    """log softmax(z)_y whose gradient leaves out at most `tolerance` of each row's probability."""

    @staticmethod
    def forward(ctx: Any, z_TV: Tensor, target_T: Tensor, tolerance: float) -> tuple[Tensor, ...]:
        logp_TV = torch.log_softmax(z_TV, -1)
        logp_T = logp_TV.gather(1, target_T[:, None])[:, 0]
        p_TV = logp_TV.exp().scatter(1, target_T[:, None], 0.0)
        sorted_TV, order_TV = p_TV.sort(1)
        left_TV = sorted_TV.double().cumsum(1)
        dropped_TV = torch.zeros_like(p_TV, dtype=torch.bool)
        dropped_TV.scatter_(1, order_TV, left_TV <= tolerance)
        dropped_TV.scatter_(1, target_T[:, None], True)
        tail_T = p_TV.double().masked_fill(~dropped_TV, 0).sum(1)
        ctx.save_for_backward(p_TV.masked_fill(dropped_TV, 0), logp_T, target_T)
        count = (~dropped_TV).sum()
        ctx.mark_non_differentiable(tail_T, count)
        return logp_T, tail_T, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        p_TV, logp_T, target_T = ctx.saved_tensors
        dz_TV = (-p_TV).scatter(1, target_T[:, None], -torch.expm1(logp_T)[:, None])
        return dz_TV * grads[0][:, None], None, None


def linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    tolerance: float,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """`oracles.logprobs` with the backward of the rule in DESIGN.md, section 12.

    Every list is as short as the tolerance allows and none costs too much, so every token is
    sparse. Returns the log-probabilities, the probability left out and the number of entries.
    """
    logits_TV = hidden_TD @ weight_VD.T
    if bias_V is not None:
        logits_TV = logits_TV + bias_V
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    scored_T = target_T != ignore_index
    logprobs_T, tail_T, count = _SparseLogSoftmax.apply(
        logits_TV / temperature, target_T.where(scored_T, 0), tolerance
    )
    return logprobs_T.where(scored_T, 0.0), tail_T.where(scored_T, 0.0), count
