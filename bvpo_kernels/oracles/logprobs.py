"""Oracle of `linear_logprobs`: the textbook path, with all logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row, differentiable in every input.

    z = softcap tanh((h W^T + b) / softcap) / temperature;  logp_t = z_{t,y} - logsumexp_v z_{t,v}.
    The product is rounded to the input dtype as a torch linear layer does; what follows is fp32
    (fp64 for fp64 inputs). Rows whose target is `ignore_index` give 0.
    """
    logits_TV = hidden_TD @ weight_VD.T
    if bias_V is not None:
        logits_TV = logits_TV + bias_V
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    logp_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    scored_T = target_T != ignore_index
    logprobs_T = logp_TV.gather(1, target_T.where(scored_T, 0)[:, None])[:, 0]
    # A masked column, -inf, adds 0.
    entropy_T = -(logp_TV.exp() * logp_TV.clamp_min(torch.finfo(logp_TV.dtype).min)).sum(-1)
    return logprobs_T.where(scored_T, 0.0), entropy_T.where(scored_T, 0.0)
