"""Opacus's ghost clipping on the units of a pack: the norms of their gradients, no inner products.

It wants a batch axis, so a sample is a (unit, kind): its chosen and rejected sequence in one row,
padded to the longest; and it refuses tied parameters, so the head is a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from bvpo_kernels.types import IGNORE_INDEX, TokenPair
from train.model.attention import SDPA

BETA = 0.1


def pad(pairs: list[TokenPair]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and targets [N, L] of N pairs; the padding is a segment of its own."""
    rows: list[tuple[list[int], list[int], list[int]]] = []
    for pair in pairs:
        tokens: list[int] = []
        positions: list[int] = []
        target: list[int] = []
        for response in (pair.chosen, pair.rejected):
            tokens += [*pair.prompt, *response]
            positions += range(len(pair.prompt) + len(response))
            target += [IGNORE_INDEX] * (len(pair.prompt) - 1) + [*response, IGNORE_INDEX]
        rows.append((tokens, positions, target))
    longest = max(len(tokens) for tokens, _, _ in rows)
    padded = [
        (t + [0] * (n := longest - len(t)), [*p, *range(n)], y + [IGNORE_INDEX] * n)
        for t, p, y in rows
    ]
    return tuple(torch.tensor(part) for part in zip(*padded, strict=True))  # type: ignore


def untied(model: Any) -> Any:
    """A copy whose head has a weight of its own, and whose attention reads padded rows."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(SDPA)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model.train()


def norms(model: Any, pairs: list[TokenPair], device: str) -> Callable[[], Tensor]:
    """A call that gives |g_n| of each pair's loss, [N], from one forward and backward."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        untied(model), batch_first=True, loss_reduction="sum", strict=False
    )
    tokens_NL, positions_NL, target_NL = (part.to(device) for part in pad(pairs))
    scored_NL = target_NL != IGNORE_INDEX
    # The second sequence begins where the positions begin again.
    side_NL = (positions_NL == 0).cumsum(1) - 1

    def call() -> Tensor:
        wrapped.zero_grad()
        logits = wrapped(input_ids=tokens_NL, position_ids=positions_NL, use_cache=False).logits
        logp_NL = (
            logits.float().log_softmax(-1).gather(2, target_NL.clamp_min(0)[..., None])[..., 0]
        )
        chosen_N, rejected_N = (
            (logp_NL * (scored_NL & (side_NL == side))).sum(1) for side in (0, 1)
        )
        margin_N = chosen_N - rejected_N
        (-logsigmoid(BETA * (margin_N - 0.9 * margin_N.detach()))).sum().backward()
        return wrapped.get_norm_sample().detach()

    return call
