"""Launchers of csrc/cuda, with the arguments of their Triton twins."""

from __future__ import annotations

import torch
from torch import Tensor

from bvpo_kernels.kernels.grad_stats import TILE, check_pair_reduce, gram_of_pair


def _fp32(bias_V: Tensor | None) -> Tensor | None:
    return None if bias_V is None else bias_V.to(torch.float32).contiguous()


def forward_rows(
    z: Tensor, target_T: Tensor, count: Tensor, state: Tensor, row_start: int, column_start: int,
    *, bias_V: Tensor | None = None, softcap: float | None = None, temperature: float = 1.0,
    entropy: bool = False, p: Tensor | None = None,
) -> None:  # fmt: skip
    """`kernels.logprobs.forward_rows` by csrc/cuda/rows.cu."""
    torch.ops.bvpo.cuda_rows_forward(
        z, p, _fp32(bias_V), target_T, count, state, row_start, column_start, softcap or 0.0,
        1.0 / temperature, entropy,
    )  # fmt: skip


def backward_rows(
    z: Tensor, dz: Tensor, target_T: Tensor, count: Tensor, upstream_T: Tensor,
    coefficient_T: Tensor, max_T: Tensor, logsum_T: Tensor, row_start: int, column_start: int,
    *, bias_V: Tensor | None = None, softcap: float | None = None, temperature: float = 1.0,
) -> None:  # fmt: skip
    """`kernels.logprobs.backward_rows` by csrc/cuda/rows.cu."""
    torch.ops.bvpo.cuda_rows_backward(
        z, dz, _fp32(bias_V), target_T, count, upstream_T, coefficient_T, max_T, logsum_T,
        row_start, column_start, softcap or 0.0, 1.0 / temperature,
    )  # fmt: skip


def pair_reduce(
    tiles_KRD: Tensor, total_RD: Tensor, weights_K: Tensor | None = None, add: bool = False
) -> Tensor:
    """`kernels.grad_stats.pair_reduce` of two tiles by csrc/cuda/pair_reduce.cu."""
    check_pair_reduce(tiles_KRD, total_RD, weights_K)
    if tiles_KRD.shape[0] != 2:
        raise ValueError(f"tiles: expected 2 of them, got {tiles_KRD.shape[0]}")
    partials = torch.empty(-(-total_RD.numel() // TILE), 3, device=total_RD.device)
    if total_RD.numel():
        torch.ops.bvpo.cuda_pair_reduce(tiles_KRD, weights_K, total_RD, add, partials)
    return gram_of_pair(partials)
