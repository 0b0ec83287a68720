"""Oracle of `segment_sum`: one segment after the other."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def segment_sum(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """sum_s = sum of values_T[cu_s : cu_{s+1}], added in fp64, rounded once; differentiable."""
    out_dtype = torch.promote_types(values_T.dtype, torch.float32)
    sums = [
        values_T[start:end].sum(dtype=torch.float64)
        for start, end in itertools.pairwise(cu_seqlens.tolist())
    ]
    if not sums:
        return values_T[:0].to(out_dtype)
    return torch.stack(sums).to(out_dtype)
