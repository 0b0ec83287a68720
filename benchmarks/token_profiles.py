"""Hidden states whose softmax looks like that of language models: synthetic ones and SmolLM2's."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bvpo_kernels import IGNORE_INDEX, pack

# Entropy in nats at quantiles; between them its logarithm is linear.
# "reasoning": Qwen3-8B's own chains of thought, arXiv 2506.01939: 50.64 % of a million tokens below
# 0.01 and 20 % above 0.672; both ends are ours. "peaked": four tokens of five with p > .99.
QUANTILES = {
    "reasoning": ((0.0, 1e-4), (0.5064, 1e-2), (0.8, 0.672), (1.0, 3.5)),
    "peaked": ((0.0, 1e-4), (0.8, 4e-2), (0.8, 0.1), (1.0, 3.0)),
}
WEIGHT_STD = 0.02
# Rows of the weight around one centre: what could stand in a token's place.
CLUSTER = 128
# How much nearer to its centre a cluster's logits lie than to zero, beyond the softmax's floor.
CENTRE_GAIN, MEMBER_STD = 18.0, 1.5
PAIRS = Path(__file__).parent.parent / "train" / "data" / "smollm2_pairs.jsonl"


def entropy_quantiles(profile: str, share: Tensor) -> Tensor:
    """The profile's entropy at each share in [0, 1]."""
    out = torch.empty_like(share)
    for (x0, h0), (x1, h1) in zip(QUANTILES[profile], QUANTILES[profile][1:], strict=False):
        inside = (share >= x0) & (share <= x1) if x1 > x0 else share == x0
        along = (share[inside] - x0) / max(x1 - x0, 1e-9)
        out[inside] = torch.exp(math.log(h0) * (1 - along) + math.log(h1) * along)
    return out


def _entropy(logits: Tensor) -> Tensor:
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def synthetic(
    profile: str, tokens: int, dim: int, vocab: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, D], weight [V, D] and targets drawn from the softmax itself; seeded.

    "flat": normal states and weight. Else rows of the weight come in clusters around a centre; a
    state lies along a centre, which makes a cluster's members likely, and along one member by a
    gain that gives the entropy of the profile: the gain is read off a table that is measured first.
    """
    generator = torch.Generator(device).manual_seed(0)
    on: dict[str, Any] = {"generator": generator, "device": device}

    def normal(*size: int) -> Tensor:
        return torch.randn(size, **on)

    weight = normal(vocab, dim) * WEIGHT_STD
    hidden = normal(tokens, dim)
    if profile != "flat":
        cluster_V = torch.arange(vocab, device=device) % (vocab // CLUSTER)
        centre = normal(vocab // CLUSTER, dim) * WEIGHT_STD
        weight += centre[cluster_V]
        peak = torch.randint(vocab, (tokens,), **on)
        share = torch.rand(tokens, **on)
        common = centre[cluster_V[peak]]
        common = common / common.square().sum(1, keepdim=True)
        own = weight[peak] - centre[cluster_V[peak]]
        own = own / own.square().sum(1, keepdim=True)
        hidden = hidden * (MEMBER_STD / (WEIGHT_STD * dim**0.5)) + CENTRE_GAIN * common
        gains = torch.linspace(0, 24, 25, device=device)
        few = slice(0, min(tokens, 32))
        table = torch.stack(
            [_entropy((hidden[few] + gain * own[few]) @ weight.T).median() for gain in gains]
        )
        table = table.flip(0).cummax(0).values.log()  # from the largest gain to none
        wanted = entropy_quantiles(profile, share).log()
        above = torch.searchsorted(table, wanted).clamp(1, len(gains) - 1)
        low, high = table[above - 1], table[above]
        part = ((wanted - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
        gain_T = gains.flip(0)[above - 1] * (1 - part) + gains.flip(0)[above] * part
        hidden = hidden + gain_T[:, None] * own
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    target = torch.cat(
        [
            torch.multinomial(rows.float().softmax(-1), 1, generator=generator)[:, 0]
            for rows in ((part @ weight.T) for part in hidden.split(256))
        ]
    )
    return hidden, weight, target


@functools.lru_cache(maxsize=1)
def smollm2(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """SmolLM2-135M on responses that it sampled itself, traces and empty traces in turn.

    Returns hidden states [tokens, 576] of scored tokens, its weight and the sampled tokens, bf16.
    """
    from train.config import ModelConfig
    from train.model.head import FusedHeadLM
    from train.model.models import load_model
    from train.preferences.pairs import load_pairs

    model, _ = load_model(ModelConfig(param_dtype="bfloat16"))
    head = FusedHeadLM(model)
    hidden, target, count = [], [], 0
    with torch.no_grad():
        for unit in load_pairs(PAIRS).units:
            batch = pack([unit])
            scored = batch.target_T != IGNORE_INDEX
            hidden.append(head.hidden(batch)[scored])
            target.append(batch.target_T[scored])
            count += len(target[-1])
            if count >= tokens:
                break
    weight = model.get_output_embeddings().weight.detach().clone()
    return torch.cat(hidden)[:tokens], weight, torch.cat(target)[:tokens]
