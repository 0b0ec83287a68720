"""Preference losses of pairs of responses, element by element.

Scores are sums of log-probabilities over a response, log pi(y|x), in nats. r = log pi(y|x) -
log pi_ref(y|x) is the log-ratio; w is the chosen ("winning") and l the rejected response.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bvpo_kernels import checks


def _check_beta(beta: float) -> None:
    checks.number("beta", beta, lambda b: 0 < b < math.inf, "a finite number > 0")


def _check_lengths(scores_P: Tensor, name: str, length_P: Tensor) -> None:
    checks.vector_like(scores_P, name, length_P, checks.INDEX_DTYPES)
    expected = f"{name}: expected numbers >= 1"
    checks.require((length_P >= 1).all(), expected, lambda: int(length_P.min()))


def _log_ratios(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """r_w and r_l. Policy and reference are close, so that their difference is nearly exact."""
    for name, tensor in (
        ("chosen", chosen),
        ("rejected", rejected),
        ("ref_chosen", ref_chosen),
        ("ref_rejected", ref_rejected),
    ):
        checks.vector_like(chosen, name, tensor, checks.SCORE_DTYPES)
    return chosen - ref_chosen, rejected - ref_rejected


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - e) log sigma(beta (r_w - r_l)) - e log sigma(-beta (r_w - r_l)).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [P] scores, fp32 or fp64.
        beta: strength of the KL constraint, > 0.
        label_smoothing: e, the probability that a label is flipped, in [0, 0.5); cDPO when > 0.

    Returns:
        [P], dtype of the scores.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

    Source: Rafailov et al., arXiv 2305.18290, equation 7; smoothing: Mitchell, "A note on DPO with
    noisy preferences and relationship to IPO", 2023.
    """
    _check_beta(beta)
    checks.number(
        "label_smoothing", label_smoothing, lambda e: 0 <= e < 0.5, "a number in [0, 0.5)"
    )
    ratio_chosen, ratio_rejected = _log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    logits = beta * (ratio_chosen - ratio_rejected)
    if label_smoothing == 0:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """(r_w - r_l - 1 / (2 beta))^2, with r_w / |y_w| and r_l / |y_l| where lengths are given.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [P] scores, fp32 or fp64.
        beta: tau of the paper, > 0.
        chosen_lengths, rejected_lengths: [P], int32 or int64, >= 1, both or neither. None: sums
            over the response, as in the paper. Given: means over its tokens, as TRL computes it.

    Returns:
        [P], dtype of the scores.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

    Source: Azar et al., arXiv 2310.12036, equation 17.
    """
    _check_beta(beta)
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("chosen_lengths, rejected_lengths: expected both or neither, got one")
    ratio_chosen, ratio_rejected = _log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    if chosen_lengths is not None and rejected_lengths is not None:
        _check_lengths(chosen, "chosen_lengths", chosen_lengths)
        _check_lengths(chosen, "rejected_lengths", rejected_lengths)
        ratio_chosen = ratio_chosen / chosen_lengths
        ratio_rejected = ratio_rejected / rejected_lengths
    return (ratio_chosen - ratio_rejected - 1 / (2 * beta)) ** 2


def hinge_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """max(0, 1 - beta (r_w - r_l)).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [P] scores, fp32 or fp64.
        beta: gamma of the paper, > 0; 1 / beta is the margin delta of SLiC.

    Returns:
        [P], dtype of the scores.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

    Source: the rank calibration loss of SLiC-HF (Zhao et al., arXiv 2305.10425) on log-ratios,
    "hinge-norm" of Liu et al., arXiv 2309.06657.
    """
    _check_beta(beta)
    ratio_chosen, ratio_rejected = _log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return torch.relu(1 - beta * (ratio_chosen - ratio_rejected))


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
) -> Tensor:
    """-log sigma(beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - gamma); no reference.

    Args:
        chosen, rejected: [P] scores, fp32 or fp64.
        chosen_lengths, rejected_lengths: [P] scored tokens, int32 or int64, >= 1.
        beta: scale of the reward, > 0; 2 and more in the paper.
        gamma: target margin of the rewards, >= 0 (not divided by beta).

    Returns:
        [P], dtype of the scores.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

    Source: Meng et al., arXiv 2405.14734, equation 6.
    """
    _check_beta(beta)
    checks.number("gamma", gamma, lambda g: 0 <= g < math.inf, "a finite number >= 0")
    checks.vector_like(chosen, "chosen", chosen, checks.SCORE_DTYPES)
    checks.vector_like(chosen, "rejected", rejected, checks.SCORE_DTYPES)
    _check_lengths(chosen, "chosen_lengths", chosen_lengths)
    _check_lengths(chosen, "rejected_lengths", rejected_lengths)
    return -logsigmoid(beta * (chosen / chosen_lengths - rejected / rejected_lengths) - gamma)


def kto_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """(lambda_D sigma(-beta (r_w - z)) + lambda_U sigma(-beta (z - r_l))) / 2, z = max(0, kl).

    The paper's loss is the mean over single responses of lambda_y - v(x, y) with
    v = lambda_D sigma(beta (r - z)) for desirable ones, lambda_U sigma(beta (z - r)) for others. A
    pair holds one of each; its loss is their mean, so that the mean over pairs is the paper's.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [P] scores, fp32 or fp64.
        kl: 0-dim, an estimate of KL(pi || pi_ref) in nats. No gradient flows through it.
        beta: risk aversion, > 0.
        desirable_weight, undesirable_weight: lambda_D and lambda_U, >= 0.

    Returns:
        [P], dtype of the scores.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

    Source: Ethayarajh et al., arXiv 2402.01306, section 4.1 (v and L_KTO).
    """
    _check_beta(beta)
    for name, weight in (
        ("desirable_weight", desirable_weight),
        ("undesirable_weight", undesirable_weight),
    ):
        checks.number(name, weight, lambda w: 0 <= w < math.inf, "a finite number >= 0")
    ratio_chosen, ratio_rejected = _log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    if not isinstance(kl, Tensor) or not kl.is_floating_point() or kl.ndim != 0:
        got = f"{kl.dtype} of {list(kl.shape)}" if isinstance(kl, Tensor) else type(kl).__name__
        raise TypeError(f"kl: expected a 0-dim floating-point Tensor, got {got}")
    z = kl.detach().clamp(min=0)
    # 1 - sigma(a) is written sigma(-a): it keeps its digits, and its gradient, where sigma(a) is 1.
    desirable = torch.sigmoid(beta * (z - ratio_chosen))
    undesirable = torch.sigmoid(beta * (ratio_rejected - z))
    return (desirable_weight * desirable + undesirable_weight * undesirable) / 2


@dataclass(frozen=True)
class LossSpec:
    """How `bvpo_loss` calls a loss of pairs, [P] -> [P].

    function: takes `chosen`, `rejected`, with `reference` `ref_chosen` and `ref_rejected`, with
        `lengths` `chosen_lengths` and `rejected_lengths`, with `kl` `kl`; always `beta`.
    options: the names of its further arguments.
    """

    function: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    reference: bool = True
    lengths: bool = False
    kl: bool = False


# A new loss is a new row. "ipo" averages over tokens as TRL does, "ipo_sum" sums as its paper does.
LOSSES: dict[str, LossSpec] = {
    "dpo": LossSpec(dpo_loss, options=("label_smoothing",)),
    "ipo": LossSpec(ipo_loss, lengths=True),
    "ipo_sum": LossSpec(ipo_loss),
    "hinge": LossSpec(hinge_loss),
    "simpo": LossSpec(simpo_loss, options=("gamma",), reference=False, lengths=True),
    "kto": LossSpec(kto_loss, options=("desirable_weight", "undesirable_weight"), kl=True),
}
