"""Derivatives of the losses that are functions of a pair's margin.

The margin is m = r_w - r_l, log-ratios to the reference where the loss has one, divided by the
responses' lengths where it takes means. Then every token of a response has the same upstream
gradient, f'(m) up to a factor that is known before the scores are: what the one-pass schedule
needs. The losses themselves: `bvpo_kernels/losses/pairs.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _dpo(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """f(m) = -(1 - e) log sigma(beta m) - e log sigma(-beta m)."""
    z_P = beta * margin_P
    kept_P = (1 - label_smoothing) * torch.sigmoid(-z_P)
    return beta * (label_smoothing * torch.sigmoid(z_P) - kept_P)


def _ipo(margin_P: Tensor, beta: float) -> Tensor:
    """f(m) = (m - 1 / (2 beta))^2."""
    return 2 * (margin_P - 1 / (2 * beta))


def _hinge(margin_P: Tensor, beta: float) -> Tensor:
    """f(m) = max(0, 1 - beta m); 0 in the kink, as autograd has it."""
    return -beta * (beta * margin_P < 1).to(margin_P.dtype)


def _simpo(margin_P: Tensor, beta: float, gamma: float = 0.5) -> Tensor:
    """f(m) = -log sigma(beta m - gamma)."""
    return -beta * torch.sigmoid(gamma - beta * margin_P)


# Name of the loss -> (m [P], beta, options of the loss) -> f'(m) [P].
SLOPES: dict[str, Callable[..., Tensor]] = {
    "dpo": _dpo,
    "ipo": _ipo,
    "ipo_sum": _ipo,
    "hinge": _hinge,
    "simpo": _simpo,
}
