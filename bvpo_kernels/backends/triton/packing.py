"""Kernels of packed rows: sums over segments, and ignored rows moved out of the way on the device.

Compaction: `position_T` is the rank of each scored token (a cumulative sum), `index_T` its inverse,
-1 behind the last scored token. Their sizes depend on T only and the count stays on the device, so
that nothing waits for the GPU and a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvpo_kernels.backends.triton.configs import config
from bvpo_kernels.backends.triton.narrow import narrow

_BLOCK = 1024


@triton.jit
def _segment_sum_kernel(values_ptr, bounds_ptr, sums_ptr, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    start = tl.load(bounds_ptr + segment).to(tl.int64)
    end = tl.load(bounds_ptr + segment + 1).to(tl.int64)
    lane_B = tl.arange(0, BLOCK)
    # Positions count from the segment's start: the same bits wherever it lies in the pack.
    total_B = tl.zeros([BLOCK], tl.float64)
    for offset in range(start, end, BLOCK):
        index_B = offset + lane_B
        total_B += tl.load(values_ptr + index_B, mask=index_B < end, other=0.0).to(tl.float64)
    total = tl.sum(total_B, 0)
    tl.store(sums_ptr + segment, narrow(total, sums_ptr.dtype.element_ty))


@triton.jit
def _segment_spread_kernel(dsums_ptr, bounds_ptr, dvalues_ptr, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    start = tl.load(bounds_ptr + segment).to(tl.int64)
    end = tl.load(bounds_ptr + segment + 1).to(tl.int64)
    dsum = narrow(tl.load(dsums_ptr + segment), dvalues_ptr.dtype.element_ty)
    lane_B = tl.arange(0, BLOCK)
    for offset in range(start, end, BLOCK):
        index_B = offset + lane_B
        value_B = tl.full([BLOCK], 0.0, dvalues_ptr.dtype.element_ty) + dsum
        tl.store(dvalues_ptr + index_B, value_B, mask=index_B < end)


@triton.jit
def _invert_kernel(scored_ptr, position_ptr, index_ptr, num_tokens, BLOCK: tl.constexpr):
    token_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_B = token_B < num_tokens
    scored_B = tl.load(scored_ptr + token_B, mask=inside_B, other=0) != 0
    position_B = tl.load(position_ptr + token_B, mask=inside_B, other=0)
    tl.store(index_ptr + position_B, token_B, mask=inside_B & scored_B)


@triton.jit
def _move_rows_kernel(
    source_ptr, index_ptr, out_ptr, source_stride, out_stride, num_rows, columns,
    SCATTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_R, inside_B = row_R < num_rows, column_B < columns
    index_R = tl.load(index_ptr + row_R, mask=inside_R, other=-1).to(tl.int64)
    if SCATTER:
        source_R, out_R, written_R = row_R, index_R, index_R >= 0
    else:
        source_R, out_R, written_R = index_R, row_R, inside_R
    source_RB = source_ptr + source_R[:, None] * source_stride + column_B[None, :]
    value = tl.load(source_RB, mask=(index_R >= 0)[:, None] & inside_B[None, :], other=0.0)
    out_RB = out_ptr + out_R[:, None] * out_stride + column_B[None, :]
    mask_RB = written_R[:, None] & inside_B[None, :]
    tl.store(out_RB, narrow(value, out_ptr.dtype.element_ty), mask=mask_RB)


def segment_sum(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S] sums in fp64, in an order that depends on the segment alone, rounded once."""
    num_segments = cu_seqlens.shape[0] - 1
    out_dtype = torch.promote_types(values_T.dtype, torch.float32)
    sums_S = values_T.new_empty(num_segments, dtype=out_dtype)
    if num_segments:
        values_T = values_T.contiguous()
        _segment_sum_kernel[(num_segments,)](values_T, cu_seqlens.contiguous(), sums_S, _BLOCK)
    return sums_S


def segment_spread(
    dsums_S: Tensor, cu_seqlens: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """[T], the gradient of `segment_sum`: each token receives its segment's."""
    dvalues_T = dsums_S.new_empty(num_tokens, dtype=dtype)
    if num_tokens:
        dsums_S = dsums_S.contiguous()
        grid = (dsums_S.shape[0],)
        _segment_spread_kernel[grid](dsums_S, cu_seqlens.contiguous(), dvalues_T, _BLOCK)
    return dvalues_T


def compact(scored_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks of the scored tokens, their inverse, and their number.

    Args:
        scored_T: [T] bool, T > 0.

    Returns:
        position_T int32 (meaningful where scored), index_T int32 (token of each rank, then -1),
        count int32 [1].
    """
    num_tokens = scored_T.shape[0]
    position_T = scored_T.cumsum(0, dtype=torch.int32) - 1
    index_T = torch.full_like(position_T, -1)
    grid = (triton.cdiv(num_tokens, _BLOCK),)
    _invert_kernel[grid](scored_T.to(torch.int8), position_T, index_T, num_tokens, _BLOCK)
    return position_T, index_T, position_T[-1:] + 1


def _move_rows(source: Tensor, index_R: Tensor, out: Tensor, scatter: bool) -> None:
    num_rows, columns = index_R.shape[0], source.shape[1]
    rows = config(source.device).rows.rows
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(columns, _BLOCK))
    if num_rows and columns:
        _move_rows_kernel[grid](
            source, index_R, out, source.stride(0), out.stride(0), num_rows, columns,
            SCATTER=scatter, ROWS=rows, BLOCK=_BLOCK,
        )  # fmt: skip


def gather_rows(source: Tensor, index_R: Tensor) -> Tensor:
    """out[r] = source[index[r]], zeros where the index is negative; contiguous."""
    if source.stride(1) != 1:
        source = source.contiguous()
    out = source.new_empty(index_R.shape[0], source.shape[1])
    _move_rows(source, index_R, out, scatter=False)
    return out


def scatter_rows(source: Tensor, index_R: Tensor, out: Tensor) -> None:
    """out[index[r]] = source[r] in out's dtype, skipping negative indices (each occurs once)."""
    _move_rows(source, index_R, out, scatter=True)
