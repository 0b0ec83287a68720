"""What the tests of the losses share: scalar oracles, options away from their defaults."""

import torch

from bvpo_kernels.losses import LOSSES
from bvpo_kernels.oracles import losses as reference

ORACLES = {name: getattr(reference, spec.function.__name__) for name, spec in LOSSES.items()}
# Every option away from its default, so that one which is dropped on the way shows.
OPTIONS = {
    "dpo": {"label_smoothing": 0.2},
    "simpo": {"gamma": 0.7},
    "kto": {"desirable_weight": 1.3, "undesirable_weight": 0.6},
}


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)
