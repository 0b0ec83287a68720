"""Fused GEMM + online softmax: statistics of every tile of logits, and no logits in memory.

Each program multiplies one tile [block_m tokens, block_n columns] and reduces it to a maximum, a
sum and (with entropy) a weighted sum per token, its partial. A second kernel merges the partials
of a token in the order of the columns: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bvpo_kernels.backends.triton.configs import GemmConfig, config
from bvpo_kernels.backends.triton.logprobs import Scored, finish_logit, fold_state, head_flags
from bvpo_kernels.call import Head

_LOWEST = tl.constexpr(-3.0e38)
MERGE_ROWS = 128


@triton.jit
def tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Row tiles run fastest, `GROUP_M` of them at a time: each tile of the right factor is read
    from memory once per group, and the group's rows of the left one stay in L2."""
    per_group = GROUP_M * num_n
    first_m = (pid // per_group) * GROUP_M
    size = tl.minimum(num_m - first_m, GROUP_M)
    within = pid % per_group
    return first_m + within % size, within // size


@triton.jit
def _product(
    hidden, weight, m, n, num_tokens, vocab, dim, hidden_stride, weight_stride,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h W^T of one tile in fp32. `hidden` and `weight` are descriptors with TMA, else pointers."""
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for start in range(0, dim, BLOCK_D):
            h = hidden.load([m * BLOCK_M, start])
            w = weight.load([n * BLOCK_N, start])
            accumulator = tl.dot(h, w.T, accumulator)
    else:
        row_M = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        column_N = n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        d_D = tl.arange(0, BLOCK_D)
        h_MD = hidden + row_M[:, None] * hidden_stride + d_D[None, :]
        w_DN = weight + column_N[None, :] * weight_stride + d_D[:, None]
        for start in range(0, dim, BLOCK_D):
            in_D = start + d_D < dim
            h = tl.load(h_MD, mask=(row_M < num_tokens)[:, None] & in_D[None, :], other=0.0)
            w = tl.load(w_DN, mask=(column_N < vocab)[None, :] & in_D[:, None], other=0.0)
            if UPCAST:  # the interpreter multiplies bf16 wrongly
                h, w = h.to(tl.float32), w.to(tl.float32)
            accumulator = tl.dot(h, w, accumulator, input_precision=PRECISION)
            h_MD += BLOCK_D
            w_DN += BLOCK_D
    return accumulator


@triton.jit
def _fused_forward_kernel(
    hidden, weight, bias_ptr, target_ptr, count_ptr, partial_ptr, state_ptr,
    num_tokens, vocab, dim, hidden_stride, weight_stride, tile_stride, kind_stride, state_stride,
    row_start, softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    num_m, num_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(vocab, BLOCK_N)
    m, n = tile_of(tl.program_id(0), num_m, num_n, GROUP_M)
    count = tl.load(count_ptr) - row_start
    if m * BLOCK_M >= count:
        return  # ignored tokens, compacted to the end, cost nothing
    z = _product(
        hidden, weight, m, n, num_tokens, vocab, dim, hidden_stride, weight_stride,
        TMA, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    row_M = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    scored_M = (row_M < num_tokens) & (row_M < count)
    # Columns count from the tile's start, in 32 bits: the accumulator leaves few registers.
    local_N, inside_N = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_N) < vocab - n * BLOCK_N
    bias = 0.0
    if HAS_BIAS:
        bias_N = tl.load(bias_ptr + n * BLOCK_N + local_N, mask=inside_N, other=0.0)
        bias = bias_N.to(tl.float32)[None, :]
    z, _ = finish_logit(z, bias, softcap, inv_temperature, HAS_SOFTCAP)

    target_M = tl.load(target_ptr + row_M, mask=scored_M, other=-1) - n * BLOCK_N
    here_M = (target_M >= 0) & (target_M < BLOCK_N)
    target_M = tl.where(here_M, target_M, -1).to(tl.int32)
    is_target_MN = local_N[None, :] == target_M[:, None]
    target_z_M = tl.sum(tl.where(is_target_MN, z, 0.0), 1)
    tl.store(state_ptr + 3 * state_stride + row_M, target_z_M, mask=here_M)
    if HAS_SOFTCAP:
        tanh_M = target_z_M / (softcap * inv_temperature)
        slope_M = (1.0 - tanh_M) * (1.0 + tanh_M)
        tl.store(state_ptr + 4 * state_stride + row_M, slope_M, mask=here_M)

    keep_MN = inside_N[None, :] & (local_N[None, :] != target_M[:, None])
    # Masked logits, -inf, join the columns that do not count.
    z = tl.where(keep_MN, tl.maximum(z, _LOWEST, tl.PropagateNan.ALL), _LOWEST)
    max_M = tl.max(z, 1)
    partial_M = partial_ptr + n.to(tl.int64) * tile_stride + row_M
    tl.store(partial_M, max_M, mask=scored_M)
    distance = z - max_M[:, None]
    # A tile with nothing but the target has no maximum; exp(lowest - lowest) must not count.
    e = tl.where(z > _LOWEST, tl.exp(distance), 0.0)
    tl.store(partial_M + kind_stride, tl.sum(e, 1), mask=scored_M)
    if HAS_ENTROPY:
        # 0 * distance: finite, because _LOWEST is.
        tl.store(partial_M + 2 * kind_stride, tl.sum(e * distance, 1), mask=scored_M)


@triton.jit
def _merge_kernel(
    partial_ptr, count_ptr, state_ptr, num_tokens, num_tiles, tile_stride, kind_stride,
    state_stride, row_start, HAS_ENTROPY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_R = (row_R < num_tokens) & (row_start + row_R < tl.load(count_ptr))
    max_R = tl.full([ROWS], _LOWEST, tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    weighted_R = tl.zeros([ROWS], tl.float32)
    partial_R = partial_ptr + row_R
    for _ in range(0, num_tiles):
        tile_max_R = tl.load(partial_R, mask=mask_R, other=_LOWEST)
        tile_sum_R = tl.load(partial_R + kind_stride, mask=mask_R, other=0.0)
        new_max_R = tl.maximum(max_R, tile_max_R)
        keep_R, scale_R = tl.exp(max_R - new_max_R), tl.exp(tile_max_R - new_max_R)
        if HAS_ENTROPY:
            tile_R = tl.load(partial_R + 2 * kind_stride, mask=mask_R, other=0.0)
            tile_R = scale_R * (tile_R + (tile_max_R - new_max_R) * tile_sum_R)
            weighted_R = keep_R * (weighted_R + (max_R - new_max_R) * sum_R) + tile_R
        sum_R = sum_R * keep_R + tile_sum_R * scale_R
        max_R = new_max_R
        partial_R += tile_stride
    fold_state(state_ptr, state_stride, row_R, mask_R, max_R, sum_R, weighted_R, HAS_ENTROPY)


def gemm_config(hidden: Tensor, head: Head) -> GemmConfig:
    """Launch shapes of the fused forward."""
    shapes, weight = config(hidden.device), head.weight_VD
    if hidden.dtype == torch.float32:
        return shapes.gemm_fp32
    # A descriptor wants rows that start at multiples of 16 bytes; gathered rows are contiguous.
    row_bytes = hidden.shape[1] * hidden.element_size(), weight.stride(0) * weight.element_size()
    aligned = weight.data_ptr() % 16 == 0 and all(size % 16 == 0 for size in row_bytes)
    plain = head.bias_V is None and head.softcap is None
    return shapes.gemm if aligned and plain else shapes.gemm_small


def partial_bytes_per_token(vocab: int, shape: GemmConfig, entropy: bool) -> int:
    """Scratch of the fused forward: its partials, in place of 4 V bytes of logits."""
    return (3 if entropy else 2) * 4 * triton.cdiv(vocab, shape.block_n)


def _operands(hidden: Tensor, weight: Tensor, shape: GemmConfig) -> tuple[Any, Any]:
    if not shape.tma:
        return hidden, weight
    blocks = ([shape.block_m, shape.block_d], [shape.block_n, shape.block_d])
    descriptors = [
        TensorDescriptor(t, list(t.shape), list(t.stride()), block)
        for t, block in zip((hidden, weight), blocks, strict=True)
    ]
    return descriptors[0], descriptors[1]


def fused_forward(
    hidden_TD: Tensor, head: Head, scored: Scored, state: Tensor, row_start: int, *,
    entropy: bool = False,
) -> None:  # fmt: skip
    """Fold all of softmax(z), z of h W^T as in `finish_logit`, into `state`.

    Args:
        hidden_TD: contiguous, as are the rows of the head's weight. One dtype of bf16, fp16, fp32.
        scored, state: as in `forward_rows`; row_start: the first row's place in the call.
    """
    weight_VD, shape = head.weight_VD, gemm_config(hidden_TD, head)
    (num_tokens, dim), vocab = hidden_TD.shape, weight_VD.shape[0]
    num_m, num_n = triton.cdiv(num_tokens, shape.block_m), triton.cdiv(vocab, shape.block_n)
    partial = hidden_TD.new_empty(3 if entropy else 2, num_n, num_tokens, dtype=torch.float32)
    hidden, weight = _operands(hidden_TD, weight_VD, shape)
    bias, scales, flags = head_flags(scored.target_T, head)
    _fused_forward_kernel[(num_m * num_n,)](
        hidden, weight, bias, *scored, partial, state, num_tokens, vocab, dim,
        hidden_TD.stride(0), weight_VD.stride(0), partial.stride(1), partial.stride(0),
        state.stride(0), row_start, *scales, **flags, HAS_ENTROPY=entropy,
        TMA=shape.tma, UPCAST=not hidden_TD.is_cuda, PRECISION="ieee",
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=shape.block_d,
        GROUP_M=shape.group_m, num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    _merge_kernel[(triton.cdiv(num_tokens, MERGE_ROWS),)](
        partial, scored.num_scored, state, num_tokens, num_n, partial.stride(1), partial.stride(0),
        state.stride(0), row_start, HAS_ENTROPY=entropy, ROWS=MERGE_ROWS, num_warps=4,
    )  # fmt: skip
