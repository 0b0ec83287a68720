"""The loss on log pi(y | x) = log sum_r pi(r, y | x), measured beside the step but not trained on.

A unit's pairs of kind "marginal" hold N traces of one chosen and of one rejected answer, drawn by
the reference model at temperature 1, hence from its posterior q(r | x, y) = pi_ref(r, y | x) /
pi_ref(y | x). Then pi(y | x) / pi_ref(y | x) is the mean over k of exp(score_k - ref_score_k), and
its gradient has the weights of `importance_weights`. Suffixes: N traces of a response, U units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bvpo_kernels.losses import LOSSES
from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.mixing.traces import importance_weights
from bvpo_kernels.types import TRACE, PackedBatch, Unit
from train.config import RunConfig
from train.steps import lacks_a_kind

MIN_TRACES = 2
# The factor of the measured losses in what is differentiated. Their gradient enters `.grad` far
# below the rounding of fp32 and, where nothing else does (a token of these traces alone), far below
# Adam's eps of 1e-8; its squares stay above fp32's smallest number. A power of two divides out.
UNTRAINED = 2.0**-36
LOSS_NAMES = ("dpo", "hinge")  # of log-ratios of whole responses


@dataclass(frozen=True)
class MarginalLoss:
    """total: the units' losses, summed; ess: unit id -> effective sample size, of both responses
    the smaller one."""

    total: Tensor
    ess: dict[str, float]


def _log_ratio(ratio_N: Tensor) -> tuple[Tensor, float]:
    """log mean exp(ratio), with the jackknifed weights in its gradient; the effective size."""
    fixed_N = ratio_N.detach()
    weights = importance_weights(fixed_N, torch.zeros_like(fixed_N))
    value = fixed_N.logsumexp(0) - math.log(len(fixed_N))
    change = (weights.jackknife.to(ratio_N.dtype) * (ratio_N - fixed_N)).sum()
    return value + change, weights.ess.item()


def marginal_loss(
    scores_S: Tensor,
    ref_scores_S: Tensor,
    batch: PackedBatch,
    loss: str,
    options: Mapping[str, Any],
) -> MarginalLoss:
    """Per unit, `loss` of log pi(y+ | x) / pi_ref(y+ | x) against the same of y-.

    The slope of the loss is taken at the estimated margin, whose own O(1/N) bias remains.
    """
    ratio_P2 = (scores_S - ref_scores_S).view(-1, 2)
    group_P = batch.pair_group_P
    ess: dict[str, float] = {}
    total = scores_S[:0].sum()
    for group in (batch.group_kind_G == batch.kinds.index(MARGINAL)).nonzero()[:, 0].tolist():
        chosen_N, rejected_N = ratio_P2[group_P == group].unbind(1)
        (chosen, size), (rejected, other) = _log_ratio(chosen_N), _log_ratio(rejected_N)
        zero = torch.zeros_like(chosen)[None]
        total = (
            total + LOSSES[loss].function(chosen[None], rejected[None], zero, zero, **options).sum()
        )
        ess[batch.unit_ids[int(batch.group_unit_G[group])]] = min(size, other)
    return MarginalLoss(total, ess)


def check_traces(units: Sequence[Unit], cfg: RunConfig) -> list[Unit]:
    """The units as the estimate of alpha needs them; without it, without their extra traces.

    Raises:
        ValueError: naming the field of the configuration and the first units that lack traces.
    """
    estimate = cfg.alpha.estimate
    if estimate is None or estimate.reference != MARGINAL:
        units = [without_extra(unit) for unit in units]
    else:
        if cfg.loss.name not in LOSS_NAMES:
            raise ValueError(
                f"alpha.estimate.reference: 'marginal' expects loss.name in {LOSS_NAMES}, got "
                f"{cfg.loss.name!r}"
            )
        if estimate.target == "batch" or (estimate.mode == "exact" and estimate.cross == "exact"):
            raise ValueError(
                f"alpha.estimate: reference 'marginal' expects target 'population' and cross "
                f"'sketch' (units of few effective traces are left out), got {estimate.target!r} "
                f"and {estimate.cross!r}"
            )
        # A unit that lacks a kind is not measured, so its further traces have no use.
        units = [without_extra(unit) if lacks_a_kind(unit) else unit for unit in units]
        _require(units, MARGINAL, "alpha.estimate.reference: 'marginal'")
    if estimate is not None and estimate.target == "batch":
        if estimate.mode != "exact":
            raise ValueError(
                f"alpha.estimate.target: 'batch' expects mode 'exact', got {estimate.mode!r}"
            )
        _require(units, TRACE, "alpha.estimate.target: 'batch'")
    return list(units)


def _require(units: Sequence[Unit], kind: str, what: str) -> None:
    """Enough traces in every unit that is measured."""
    units = [unit for unit in units if not lacks_a_kind(unit)]
    few = [unit.unit_id for unit in units if len(unit.pairs.get(kind, ())) < MIN_TRACES]
    if few:
        raise ValueError(
            f"{what} expects at least {MIN_TRACES} pairs of kind {kind!r} in every measured unit "
            f"of train.pairs (several traces of the same prompt), got fewer in {len(few)} of "
            f"{len(units)}: {few[:3]}"
        )


def without_extra(unit: Unit) -> Unit:
    """The unit's trained kinds alone."""
    return replace(unit, pairs={k: pairs for k, pairs in unit.pairs.items() if k != MARGINAL})
