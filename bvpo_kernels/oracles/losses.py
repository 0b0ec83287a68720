"""Oracles of the losses: one pair at a time, in Python floats, from the papers' probabilities.

The arguments are log-probabilities, but each formula is evaluated on the likelihoods themselves, as
the papers write it; scores must be moderate (exp must not underflow).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def dpo_loss(
    chosen: float,
    rejected: float,
    ref_chosen: float,
    ref_rejected: float,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> float:
    """Cross-entropy of the label (flipped with probability `label_smoothing`) under Bradley-Terry:
    p(w > l) = exp R_w / (exp R_w + exp R_l), exp R = (pi / pi_ref)^beta."""
    strength_w = (math.exp(chosen) / math.exp(ref_chosen)) ** beta
    strength_l = (math.exp(rejected) / math.exp(ref_rejected)) ** beta
    right = strength_w / (strength_w + strength_l)
    wrong = strength_l / (strength_w + strength_l)
    return -(1 - label_smoothing) * math.log(right) - label_smoothing * math.log(wrong)


def ipo_loss(
    chosen: float,
    rejected: float,
    ref_chosen: float,
    ref_rejected: float,
    *,
    beta: float,
    chosen_lengths: int = 1,
    rejected_lengths: int = 1,
) -> float:
    """(h - 1 / (2 tau))^2, h = log [pi(w) pi_ref(l)] / [pi(l) pi_ref(w)], on the likelihoods per
    token (geometric means) where lengths are given."""
    policy_w, policy_l, reference_w, reference_l = (
        math.exp(score) ** (1 / length)
        for score, length in (
            (chosen, chosen_lengths),
            (rejected, rejected_lengths),
            (ref_chosen, chosen_lengths),
            (ref_rejected, rejected_lengths),
        )
    )
    h = math.log(policy_w * reference_l / (policy_l * reference_w))
    return (h - 0.5 / beta) ** 2


def hinge_loss(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, *, beta: float
) -> float:
    """beta max(0, delta - log-ratio of the pair), delta = 1 / beta."""
    ratio_w = math.exp(chosen) / math.exp(ref_chosen)
    ratio_l = math.exp(rejected) / math.exp(ref_rejected)
    return beta * max(0.0, 1 / beta - math.log(ratio_w / ratio_l))


def simpo_loss(
    chosen: float,
    rejected: float,
    chosen_lengths: int,
    rejected_lengths: int,
    *,
    beta: float,
    gamma: float,
) -> float:
    """-log p, p = P_w^beta / (P_w^beta + e^gamma P_l^beta), P the likelihood per token."""
    strength_w = math.exp(chosen) ** (beta / chosen_lengths)
    strength_l = math.exp(rejected) ** (beta / rejected_lengths) * math.exp(gamma)
    return -math.log(strength_w / (strength_w + strength_l))


def kto_loss(
    chosen: float,
    rejected: float,
    ref_chosen: float,
    ref_rejected: float,
    kl: float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> float:
    """Mean over the two responses of lambda_y - v(x, y), v the Kahneman-Tversky value."""
    reference_point = max(0.0, kl)
    gain_w = math.exp(chosen) / math.exp(ref_chosen) / math.exp(reference_point)
    gain_l = math.exp(rejected) / math.exp(ref_rejected) / math.exp(reference_point)
    value_w = desirable_weight * gain_w**beta / (1 + gain_w**beta)
    value_l = undesirable_weight / (1 + gain_l**beta)
    return (desirable_weight - value_w + undesirable_weight - value_l) / 2


def bvpo_loss(
    losses: Mapping[str, Sequence[float]],
    weights: Mapping[str, float],
    counts: Mapping[str, int],
) -> float:
    """sum_k w_k / N_k sum_p loss_p; kinds of weight 0 and without pairs contribute nothing."""
    terms = [
        weights[kind] / counts[kind] * loss
        for kind, of_kind in losses.items()
        for loss in of_kind
        if weights[kind] != 0
    ]
    return math.fsum(terms)
