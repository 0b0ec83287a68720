"""The marginal preference loss, log pi(y | x) = log sum_r pi(r, y | x), from traces of one answer.

With N traces r_k from the sampler's posterior q(r | x, y) and v_k = pi(r_k, y | x) / q(r_k, y | x),
pi(y | x) / pi_ref(y | x) is sum v_k / sum v_ref,k, and grad log pi(y | x) is the mean of grad log
pi(r_k, y | x) with weights v_k / sum v: what `bvpo_kernels.mixing.importance_weights` gives.
Suffixes: U units, N traces of a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.losses import bvpo_loss
from bvpo_kernels.mixing import MARGINAL, StepStats
from bvpo_kernels.mixing.traces import importance_weights
from bvpo_kernels.packing import pack, segment_sum
from bvpo_kernels.types import EMPTY, KINDS, TRACE, Unit
from train.model.head import FusedHeadLM
from train.study.preferences import score_all


@dataclass(frozen=True)
class Posterior:
    """Of the marginal's traces of each unit, [2, N] with chosen first: log pi_ref(r, y | x), and
    log q(r, y | x) under the temperature that they were drawn at."""

    reference: Mapping[str, Tensor]
    proposal: Mapping[str, Tensor]


def marginal_rows(unit: Unit, most: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(prompt, response) of up to `most` traces of the chosen answer, then of the rejected one."""
    pairs = unit.pairs[MARGINAL][:most]
    sides = [[(pair.prompt, getattr(pair, side)) for pair in pairs] for side in SIDES]
    return [row for side in sides for row in side]


SIDES = ("chosen", "rejected")


def score_posterior(base: PreTrainedModel, units: Sequence[Unit], temperature: float) -> Posterior:
    """Both scores of every trace, under the model that wrote them."""
    by_unit = [marginal_rows(unit, len(unit.pairs[MARGINAL])) for unit in units]
    rows = [row for group in by_unit for row in group]
    sizes = [len(group) for group in by_unit]
    scored = []
    for heat in (1.0, temperature):
        parts = score_all(base, rows, heat).split(sizes)
        names = [unit.unit_id for unit in units]
        scored.append({n: part.view(2, -1) for n, part in zip(names, parts, strict=True)})
    return Posterior(*scored)


def margin_and_weights(
    scores_2N: Tensor, unit: Unit, posterior: Posterior
) -> tuple[Tensor, Tensor, Tensor]:
    """log pi(y+) / pi_ref(y+) - the same of y-, the jackknifed weights [2, N], the least ESS."""
    count = scores_2N.shape[1]
    log_q = posterior.proposal[unit.unit_id][:, :count].double()
    log_ref = posterior.reference[unit.unit_id][:, :count].double()
    scores_2N = scores_2N.detach().double()
    ratio_2 = (scores_2N - log_q).logsumexp(1) - (log_ref - log_q).logsumexp(1)
    weights = importance_weights(scores_2N, log_q)
    return ratio_2[0] - ratio_2[1], weights.jackknife, weights.ess.min()


def marginal_loss(scores_2N: Tensor, unit: Unit, posterior: Posterior, beta: float) -> Tensor:
    """A loss whose gradient is that of -log sigma(beta margin), the weights held fixed."""
    margin, weights_2N, _ = margin_and_weights(scores_2N, unit, posterior)
    slope = -beta * torch.sigmoid(-beta * margin)
    signed_2N = weights_2N * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    return (slope * (signed_2N * scores_2N).sum()).to(scores_2N.dtype)


def measure(
    policy: FusedHeadLM, stats: GradStats, units: Sequence[Unit], posterior: Posterior,
    references: Mapping[str, Tensor], traces: int, beta: float,
) -> StepStats:  # fmt: skip
    """The three kinds' statistics of a step; no optimizer moves and no gradient is left behind.

    Units whose effective sample size is below 2 are left out and counted. references: unit id ->
    scores [4] of trace and empty pair under the reference model.
    """
    rows = [marginal_rows(unit, traces) for unit in units]
    flat = score_all(policy.model, [row for group in rows for row in group])
    scored = flat.split([len(group) for group in rows])
    kept = [
        replace(unit, pairs={**unit.pairs, MARGINAL: unit.pairs[MARGINAL][:traces]})
        for unit, scores in zip(units, scored, strict=True)
        if margin_and_weights(scores.view(2, -1), unit, posterior)[2] >= 2
    ]
    for unit in kept:
        _collect(policy, stats, unit, posterior, references, beta)
    policy.zero_grad(set_to_none=True)
    return replace(stats.result(), skipped=len(units) - len(kept))


def _collect(
    policy: FusedHeadLM, stats: GradStats, unit: Unit, posterior: Posterior,
    references: Mapping[str, Tensor], beta: float,
) -> None:  # fmt: skip
    """One unit's backward: its losses of all kinds, each with weight 1."""
    kinds = (*KINDS, MARGINAL)
    batch = pack([unit], kinds=kinds)
    with stats.collect(batch) as scale:
        scale.scale({MARGINAL: 1.0})
        scores_S = segment_sum(policy(batch), batch.cu_seqlens)
        reference_S = torch.cat([references[unit.unit_id], scores_S.new_zeros(len(scores_S) - 4)])
        weights = {TRACE: 1.0, EMPTY: 1.0, MARGINAL: 0.0}
        loss = bvpo_loss(scores_S, reference_S, batch, weights, beta=beta).loss
        scores_2N = scores_S[4:].view(-1, 2).T
        (loss + marginal_loss(scores_2N, unit, posterior, beta)).backward()
