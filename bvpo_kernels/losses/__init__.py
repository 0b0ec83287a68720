"""Preference losses of pairs, and their BVPO mixture over the kinds of a packed batch."""

from bvpo_kernels.losses.mixture import bvpo_loss
from bvpo_kernels.losses.pairs import (
    LOSSES,
    LossSpec,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    simpo_loss,
)

__all__ = [
    "LOSSES",
    "LossSpec",
    "bvpo_loss",
    "dpo_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "simpo_loss",
]
