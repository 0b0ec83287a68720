"""The C++ backward of `linear_logprobs` with the statistics of its weight gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bvpo_kernels.eager import head_stats
from bvpo_kernels.eager.grad_stats import Plan, group_bounds, signs


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The op `bvpo::linear_logprobs_statistics`, as `eager.head_stats.backward` has it.

    A panel of the vocabulary is recomputed once for all groups. The groups' panels of dW, fp32,
    take a quarter of the workspace, or 256 D numbers each where that is more.
    """
    *call, need_hidden, need_weight, need_bias, rows_U, plan, layer = arguments
    hidden_TD, weight_VD, bias_V = call[1], call[2], call[4]
    need_bias = need_bias and bias_V is not None
    left_Vk, unit = _left(weight_VD, plan, layer) if need_weight and plan.sketch else (None, 1.0)
    apart = plan.exact or plan.num_kinds or need_bias
    dhidden, dweight, dbias_GV, gram_GG, kinds_KVD, rows_GUD, left_Tk = (
        torch.ops.bvpo.cpu_linear_logprobs_statistics(
            *call, need_hidden, need_weight, need_bias, plan.ranges_G2 if apart else None,
            plan.kinds_G, plan.num_kinds, rows_U if plan.exact else None, left_Vk,
        )
    )  # fmt: skip
    return dhidden, dweight, *head_stats.finish(
        hidden_TD, group_bounds(plan, hidden_TD.shape[0]), bias_V, gram_GG if apart else None,
        kinds_KVD, rows_GUD, dbias_GV if need_bias else None,
        None if left_Vk is None else left_Tk * unit, plan, layer,
    )  # fmt: skip


def _left(weight_VD: Tensor, plan: Plan, layer: int) -> tuple[Tensor, float]:
    """The signs of the sketch as +-1, which bf16 holds exactly, and their factor."""
    vocab, k = weight_VD.shape[0], plan.sketch
    left_Vk = signs(vocab, k, plan.seed, layer, 0, weight_VD)
    return (left_Vk, 1.0) if vocab <= k else (left_Vk.sign(), k**-0.5)
