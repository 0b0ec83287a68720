"""`impl="cuda"` of `pair_reduce`: the kernel of csrc/cuda."""

from __future__ import annotations

import torch
from torch import Tensor

from bvpo_kernels.backends.triton.grad_stats import TILE, check_pair_reduce, gram_of_partials


def pair_reduce(
    tiles_KRD: Tensor, total_RD: Tensor, weights_K: Tensor | None = None, add: bool = False
) -> Tensor:
    """`triton.grad_stats.pair_reduce` of two tiles by csrc/cuda/pair_reduce.cu."""
    check_pair_reduce(tiles_KRD, total_RD, weights_K)
    if tiles_KRD.shape[0] != 2:
        raise ValueError(f"tiles: expected 2 of them, got {tiles_KRD.shape[0]}")
    partials = torch.empty(-(-total_RD.numel() // TILE), 3, device=total_RD.device)
    if total_RD.numel():
        torch.ops.bvpo.cuda_pair_reduce(tiles_KRD, weights_K, total_RD, add, partials)
    return gram_of_partials(partials, 2)
