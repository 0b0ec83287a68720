"""Which tokens go without the exact backward, and how long their lists may get.

The rule: token t is sparse iff |dlogp_t| tail_t <= tolerance max_s |dlogp_s|, tail_t being the
probability that its list leaves out of the softmax. A token without a list (one that would cost
more than its share of the GEMMs, or for which the byte budget was used up) has tail_t = 1 - p_y.
A tolerance permits and does not oblige: `eager` takes the exact backward, which its lists did not
beat (1.0 to 1.2 x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bvpo_kernels.backends import extensions

# The cost model: an entry of a list costs what this many columns of the exact backward cost a token
# (both are proportional to D), and more where products are faster. DESIGN.md, section 12.
COLUMNS_PER_ENTRY = {
    "cpp": 64 if "AMX" in extensions.cpu_detail() else 16,
    "triton": 256,  # an H200 measured 75, on lists that this allows; longer ones are unmeasured
}
# A list may leave out this many times the tolerance: its token's upstream gradient may be small.
GIVE_UP = 4.0
# What is left out is rounded up by more than fp32 sums lose.
ROUND_UP = 1 + 2**-10
# int32 column and fp32 probability.
ENTRY_BYTES = 8


def longest_list(vocab: int, impl: str) -> int:
    """Entries at which a list costs as much as the exact backward of its token."""
    return max(vocab // COLUMNS_PER_ENTRY[impl], 1)


def capacity(num_tokens: int, longest: int, workspace: int) -> int:
    """Entries that are stored at most: the lists of a call take no more than the workspace."""
    return torch.sym_min(num_tokens * longest, max(workspace // ENTRY_BYTES, 1))


def sparse_tokens(
    dlogprobs_T: Tensor, tail_T: Tensor, scored_T: Tensor, tolerance: float
) -> Tensor:
    """The rule, for tokens that are scored; on a GPU without waiting for it."""
    weight_T = dlogprobs_T.abs().masked_fill(~scored_T, 0)
    if weight_T.shape[0] == 0:
        return scored_T
    return scored_T & (weight_T * tail_T <= tolerance * weight_T.max())
