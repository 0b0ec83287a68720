"""Segment sums in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of each segment, added in fp64 in the order of the tokens, rounded once.

    Each segment is reduced on its own (`segment_reduce` walks it), so its sum does not depend on
    what else is in the pack. A difference of cumulative sums would.
    """
    out_dtype = torch.promote_types(values_T.dtype, torch.float32)
    sums = torch.segment_reduce(
        values_T.to(torch.float64), "sum", offsets=cu_seqlens.to(torch.int64), initial=0.0
    )
    return sums.to(out_dtype)
