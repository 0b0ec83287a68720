"""The BVPO mixture of a preference loss over the kinds of a packed batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bvpo_kernels import checks, scope
from bvpo_kernels.losses.pairs import LOSSES, LossSpec
from bvpo_kernels.types import EMPTY, TRACE, BVPOLoss, PackedBatch


def _weight(name: str, value: float | Tensor, most: float, device: torch.device) -> float | Tensor:
    """A weight in [0, most], as a float or as a detached fp64 scalar."""
    expected = f"a finite number in [0, {most}]"
    if not isinstance(value, Tensor):
        checks.number(name, value, lambda w: 0 <= w <= most and w < math.inf, expected)
        return float(value)
    if value.ndim != 0 or not value.is_floating_point():
        got = f"{value.dtype} of {list(value.shape)}"
        raise TypeError(f"{name}: expected a number or a 0-dim floating-point Tensor, got {got}")
    if value.device.type != "cpu" and value.device != device:
        raise ValueError(f"{name}: expected device {device} or cpu, got {value.device}")
    value = value.detach().double()
    valid = (value >= 0) & (value <= most) & (value < math.inf)
    checks.require(valid, f"{name}: expected {expected}", value.item)
    return value


def _weights(
    alpha: float | Tensor | Mapping[str, float | Tensor], kinds: Sequence[str], device: torch.device
) -> dict[str, float | Tensor]:
    """The weight of each kind of the batch, in its order."""
    if isinstance(alpha, Mapping):
        _check_kinds("alpha", alpha, kinds)
        return {k: _weight(f"alpha[{k!r}]", alpha[k], math.inf, device) for k in kinds}
    if not set(kinds) <= {TRACE, EMPTY}:
        raise ValueError(f"alpha: expected a mapping kind -> weight for kinds {kinds}, got {alpha}")
    a = _weight("alpha", alpha, 1, device)
    return {kind: a if kind == TRACE else 1 - a for kind in kinds}


def _check_kinds(name: str, mapping: Mapping[str, object], kinds: Sequence[str]) -> None:
    if set(mapping) != set(kinds):
        raise ValueError(f"{name}: expected the kinds {list(kinds)}, got {list(mapping)}")


def check_loss(
    loss: str, options: Mapping[str, object], ref_scores_S: Tensor | None, kl: object
) -> LossSpec:
    """The row of `LOSSES`, after checking that the call gives what it takes."""
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {list(LOSSES)}, got {loss!r}")
    spec = LOSSES[loss]
    unknown = sorted(set(options) - set(spec.options))
    if unknown:
        raise TypeError(f"loss_options: {loss!r} takes {list(spec.options)}, got {unknown}")
    if spec.reference and ref_scores_S is None:
        raise ValueError(f"ref_scores_S: {loss!r} expects the reference's scores, got None")
    if kl is not None and not spec.kl:
        raise ValueError(f"kl: expected None, {loss!r} has no KL term, got {kl}")
    return spec


def _inputs(
    spec: LossSpec, scores_S: Tensor, ref_scores_S: Tensor | None, batch: PackedBatch
) -> dict[str, Tensor]:
    """What the loss takes of each pair, [P], by the names of its arguments."""
    checks.vector_like(batch.scored_lengths_S, "scores_S", scores_S, checks.SCORE_DTYPES)
    by_segment = {"{}": scores_S}
    if spec.reference and ref_scores_S is not None:
        checks.vector_like(scores_S, "ref_scores_S", ref_scores_S, checks.SCORE_DTYPES)
        by_segment["ref_{}"] = ref_scores_S.detach()
    if spec.lengths:
        by_segment["{}_lengths"] = batch.scored_lengths_S
    return {
        name.format(side): value_S[first::2]
        for first, side in enumerate(("chosen", "rejected"))
        for name, value_S in by_segment.items()
    }


def _divisor(kind: str, pairs: Tensor, pair_counts: Mapping[str, int | Tensor] | None) -> Tensor:
    """Number of pairs of a kind in the step, at least 1: without pairs the loss is 0, not NaN."""
    if pair_counts is None:
        return pairs.clamp(min=1)
    given = pair_counts[kind]
    if not isinstance(given, int | Tensor) or (isinstance(given, Tensor) and given.ndim != 0):
        raise TypeError(f"pair_counts[{kind!r}]: expected an int or a 0-dim Tensor, got {given!r}")
    count = given if isinstance(given, Tensor) else pairs.new_full((), given)
    checks.require(
        pairs <= count,
        f"pair_counts[{kind!r}]: expected the pairs of the whole step, at least those of the batch",
        lambda: f"{int(count)} for a batch with {int(pairs)}",
    )
    return count.clamp(min=1)


def _unit_scale(
    weight: float | Tensor,
    share: Tensor,
    batch: PackedBatch,
    kind: int,
    unit_counts: Mapping[str, int] | None,
) -> Tensor:
    """Factor of a unit's mean gradient: weight / units of the step, where those are known; else the
    batch's `share` of the weight over the batch's units."""
    units = (batch.group_kind_G == kind).sum()
    if unit_counts is None:
        return share / units.clamp(min=1)
    name = batch.kinds[kind]
    count = units.new_full((), unit_counts[name])
    checks.require(
        units <= count,
        f"unit_counts[{name!r}]: expected the units of the whole step, at least those of the batch",
        lambda: f"{unit_counts[name]} for a batch with {int(units)}",
    )
    return weight / count.clamp(min=1).double()


class KindWeight(NamedTuple):
    """One kind of a batch: which pairs are of it and how many, its weight in L_c, the divisor N_k;
    weight / N_k, and the factor of a unit's gradient (`BVPOLoss.kind_scale`), fp64."""

    mask_P: Tensor
    pairs: Tensor
    weight: float | Tensor
    divisor: Tensor
    by_pair: Tensor
    by_unit: Tensor


def kind_weights(
    batch: PackedBatch,
    alpha: float | Tensor | Mapping[str, float | Tensor],
    device: torch.device,
    pair_counts: Mapping[str, int | Tensor] | None = None,
    unit_counts: Mapping[str, int] | None = None,
) -> dict[str, KindWeight]:
    """Of each kind; see `bvpo_loss`, whose arguments these are."""
    weights = _weights(alpha, batch.kinds, device)
    for name, mapping in (("pair_counts", pair_counts), ("unit_counts", unit_counts)):
        if mapping is not None:
            _check_kinds(name, mapping, batch.kinds)
    result = {}
    for index, (kind, weight) in enumerate(weights.items()):
        mask_P = batch.pair_kind_P == index
        pairs = mask_P.sum()
        divisor = _divisor(kind, pairs, pair_counts)
        by_pair = weight / divisor.double()
        by_unit = _unit_scale(weight, by_pair * pairs, batch, index, unit_counts)
        result[kind] = KindWeight(mask_P, pairs, weight, divisor, by_pair, by_unit)
    return result


def report(weights: Mapping[str, KindWeight], exact: bool) -> None:
    """Tell the collection of gradient statistics that is running, if any, of a loss."""
    if scope.active is not None:
        by_unit = {kind: w.by_unit for kind, w in weights.items()}
        scope.active.report_loss(by_unit, {kind: w.by_pair for kind, w in weights.items()}, exact)


def _may_have_pairs(pairs: Tensor) -> bool:
    """Whether a kind can have pairs, as far as that is known without waiting for a device."""
    return pairs.device.type != "cpu" or torch.compiler.is_compiling() or bool(pairs > 0)


def _sum(value_P: Tensor, mask_P: Tensor) -> Tensor:
    """Sum over the pairs of a mask, in fp64."""
    return torch.where(mask_P, value_P, 0).sum(dtype=torch.float64)


def _kind_loss(
    spec: LossSpec,
    inputs: Mapping[str, Tensor],
    mask_P: Tensor,
    divisor: Tensor,
    arguments: Mapping[str, Any],
) -> Tensor:
    """Sum of the losses of the pairs in the mask over `divisor`.

    The others are replaced by constants before the loss, not only after it: where a score is
    infinite the loss may have an infinite derivative, and 0 times that is NaN.
    """
    masked = {name: torch.where(mask_P, value_P, 1) for name, value_P in inputs.items()}
    loss_P = spec.function(**masked, **arguments)
    return (_sum(loss_P, mask_P) / divisor).to(loss_P.dtype)


def _batch_kl(inputs: Mapping[str, Tensor], mask_P: Tensor, pairs: Tensor) -> Tensor:
    """Mean log-ratio of the responses of the pairs in the mask; the loss clamps and detaches it."""
    ratio_P = inputs["chosen"] - inputs["ref_chosen"] + inputs["rejected"] - inputs["ref_rejected"]
    return _sum(ratio_P, mask_P) / (2 * pairs.clamp(min=1))


@torch.no_grad()
def _kind_metrics(
    spec: LossSpec, inputs: Mapping[str, Tensor], mask_P: Tensor, pairs: Tensor, beta: float
) -> dict[str, Tensor]:
    """TRL's metrics, means over the pairs of the mask."""

    def reward(side: str) -> Tensor:
        ratio_P = inputs[side] - inputs[f"ref_{side}"] if spec.reference else inputs[side]
        return beta * (ratio_P / inputs[f"{side}_lengths"] if spec.lengths else ratio_P)

    chosen_P, rejected_P = reward("chosen"), reward("rejected")
    values = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).to(chosen_P.dtype),
        "rewards/margins": chosen_P - rejected_P,
        "logps/chosen": inputs["chosen"],
        "logps/rejected": inputs["rejected"],
    }
    divisor = pairs.clamp(min=1)
    means = {
        n: (_sum(value_P, mask_P) / divisor).to(value_P.dtype) for n, value_P in values.items()
    }
    return means | {"pairs": pairs}


def bvpo_loss(
    scores_S: Tensor,
    ref_scores_S: Tensor | None,
    batch: PackedBatch,
    alpha: float | Tensor | Mapping[str, float | Tensor],
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    pair_counts: Mapping[str, int | Tensor] | None = None,
    unit_counts: Mapping[str, int] | None = None,
    kl: Tensor | Mapping[str, Tensor] | None = None,
    **loss_options: float,
) -> BVPOLoss:
    """L_c = a L_trace + (1 - a) L_empty,  L_k = (1 / N_k) sum over the pairs p of kind k of loss_p.

    Args:
        scores_S: [S] log-probabilities of the responses, fp32 or fp64 (`segment_sum`).
        ref_scores_S: the same under the reference model, a constant; None for a loss without one.
        batch: what was scored.
        alpha: a in [0, 1], a number or a 0-dim Tensor, a constant; or a mapping kind -> weight >= 0
            for other kinds. A kind of weight 0 is left out, not multiplied: it may be infinite.
        loss: a name in `LOSSES`. "ipo" and "simpo" take the means over `batch.scored_lengths_S`.
        beta: beta of the loss; the default is DPO's (SimPO's paper uses 2 and more).
        pair_counts: N_k, pairs of each kind in the whole step, over all micro-batches and ranks:
            then their losses add up. None: those of this batch.
        unit_counts: units that have each kind in the whole step, for `kind_scale` alone. None: as
            many as follows from `pair_counts` and the pairs per unit in this batch; gradient
            statistics ask for them where units have different numbers of pairs.
        kl: KL(pi || pi_ref) of "kto", 0-dim, for all kinds or per kind. None: an estimate from this
            batch and kind, max(0, mean log-ratio of its responses), which differs from one
            micro-batch to the next. (TRL's KTO takes responses of other prompts for it, averages
            over the ranks and clamps likewise; its former "kto_pair" used the pairs' other side.)
        loss_options: further arguments of the loss: `LOSSES[loss].options`.

    Returns:
        BVPOLoss: `loss`, 0-dim, in the dtype of the scores, summed in fp64; `kind_losses`, each
        with its own gradient, 0 (and connected) for a kind without pairs; `metrics`, detached 0-dim
        Tensors: loss, alpha (the weight of the traces) and, with the kind in front, loss,
        rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen,
        logps/rejected, pairs. Losses of micro-batches add up; rewards and logps are means over
        `pairs`, to be combined with those as weights. A kind without pairs has no metrics on the
        CPU; elsewhere, where asking would mean waiting, it has zeros and pairs = 0. `kind_scale`:
        see `BVPOLoss`; a collection of gradient statistics that is running is told by itself.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given. The values
            of CUDA tensors are asserted on the device, without waiting for it.

    Source: arXiv 2510.05095 (BVPO).
    """
    spec = check_loss(loss, loss_options, ref_scores_S, kl)
    inputs = _inputs(spec, scores_S, ref_scores_S, batch)
    weights = kind_weights(batch, alpha, scores_S.device, pair_counts, unit_counts)
    if isinstance(kl, Mapping):
        _check_kinds("kl", kl, batch.kinds)
    total = scores_S[:0].sum()  # 0, with a gradient (of zeros) whatever is left out below
    kind_losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    for kind, (mask_P, pairs, weight, divisor, *_) in weights.items():
        arguments: dict[str, Any] = {"beta": beta, **loss_options}
        if spec.kl:
            given = kl[kind] if isinstance(kl, Mapping) else kl
            arguments["kl"] = _batch_kl(inputs, mask_P, pairs) if given is None else given
        kind_losses[kind] = _kind_loss(spec, inputs, mask_P, divisor, arguments)
        if isinstance(weight, Tensor):
            counted = _kind_loss(spec, inputs, mask_P & (weight != 0), divisor, arguments)
            total = total + weight.to(counted.dtype) * counted
        elif weight != 0:
            total = total + weight * kind_losses[kind]
        if _may_have_pairs(pairs):
            kind_metrics = _kind_metrics(spec, inputs, mask_P, pairs, beta)
            kind_metrics["loss"] = kind_losses[kind].detach()
            metrics |= {f"{kind}/{name}": value for name, value in kind_metrics.items()}
    metrics["loss"] = total.detach()
    if TRACE in weights:
        a = weights[TRACE].weight
        metrics["alpha"] = a.to(total) if isinstance(a, Tensor) else total.new_full((), a)
    if torch.is_grad_enabled() and total.requires_grad:
        report(weights, pair_counts is None or unit_counts is not None)
    scale = {kind: w.by_unit for kind, w in weights.items()}
    return BVPOLoss(total, kind_losses, metrics, scale, scores_S)
