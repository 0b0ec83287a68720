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


def segment_spread(
    dsums_S: Tensor, cu_seqlens: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """Each token receives its segment's gradient: a gather, no sum, hence exact."""
    if dsums_S.shape[0] == 0:
        return dsums_S.new_zeros(num_tokens, dtype=dtype)
    position_T = torch.arange(num_tokens, device=dsums_S.device, dtype=cu_seqlens.dtype)
    segment_T = torch.searchsorted(cu_seqlens[1:].contiguous(), position_T, right=True)
    return dsums_S[segment_T].to(dtype)
