"""Kernels of the sparse backward: lists of likely columns, sums over the rows that they name, and
products whose extent is known to the device alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvpo_kernels.backends.schedule import MAX, RESCALE, SUM
from bvpo_kernels.backends.triton.configs import config
from bvpo_kernels.backends.triton.logprobs import Scored, finish_logit, head_flags, load_bias
from bvpo_kernels.backends.triton.logprobs_gemm import tile_of
from bvpo_kernels.backends.triton.narrow import narrow
from bvpo_kernels.call import Head

_HIGHEST = tl.constexpr(3.0e38)
# The interpreter pays by the program, not by the element.
_BLOCK_D = 1024 if triton.knobs.runtime.interpret else 256


@triton.jit
def _list_kernel(
    z_ptr, bias_ptr, target_ptr, count_ptr, max_ptr, sum_ptr, rescale_ptr, known_ptr, list_z_ptr,
    list_column_ptr, length_ptr, rest_ptr, z_stride, num_rows, columns, column_start, row_start,
    longest, softcap, inv_temperature, floor,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < num_rows
    scored_R = inside_R & (row_start + row_R < tl.load(count_ptr))
    target_R = tl.load(target_ptr + row_R, mask=scored_R, other=-1) - column_start
    sum_R = tl.load(sum_ptr + row_R, mask=scored_R, other=0.0)
    seen_R = scored_R & (sum_R > 0.0)
    # Rows of which nothing has been seen (all of the tile is the target) get no exponentials.
    max_R = tl.load(max_ptr + row_R, mask=seen_R, other=_HIGHEST)
    bound_R = tl.where(seen_R, max_R + tl.log(tl.maximum(sum_R, 1.0)), -_HIGHEST)
    known_R = tl.load(known_ptr + row_R, mask=scored_R, other=0.0)
    level_R = tl.maximum(bound_R, known_R) + floor
    length_R = tl.load(length_ptr + row_R, mask=scored_R, other=0)
    open_R = scored_R & (length_R <= longest)  # a longer list is given up
    rest_R = tl.load(rest_ptr + row_R, mask=scored_R, other=0.0)
    rest_R *= tl.load(rescale_ptr + row_R, mask=scored_R, other=0.0)
    for start in range(0, columns, BLOCK):
        column_B = start + tl.arange(0, BLOCK)
        mask_RB = scored_R[:, None] & (column_B < columns)[None, :]
        z_RB = z_ptr + row_R[:, None] * z_stride + column_B[None, :]
        z = tl.load(z_RB, mask=mask_RB, other=0.0).to(tl.float32)
        bias = load_bias(bias_ptr, column_start + column_B, column_B < columns, HAS_BIAS)
        z, _ = finish_logit(z, bias, softcap, inv_temperature, HAS_SOFTCAP)
        keep_RB = mask_RB & (column_B[None, :] != target_R[:, None])
        near_RB = keep_RB & open_R[:, None] & (z >= level_R[:, None])
        near = near_RB.to(tl.int32)
        place_RB = length_R[:, None] + tl.cumsum(near, 1) - 1
        stored_RB = near_RB & (place_RB < longest)
        at_RB = row_R[:, None] * longest + place_RB
        tl.store(list_z_ptr + at_RB, z, mask=stored_RB)
        column = (column_start + column_B)[None, :] + tl.zeros([ROWS, BLOCK], tl.int32)
        tl.store(list_column_ptr + at_RB, column, mask=stored_RB)
        length_R += tl.sum(near, 1)
        p = tl.exp(z - max_R[:, None])
        rest_R += tl.sum(tl.where(keep_RB & (near == 0), p, 0.0), 1)
    tl.store(length_ptr + row_R, length_R, mask=scored_R)
    tl.store(rest_ptr + row_R, rest_R, mask=scored_R)


@triton.jit
def _sum_rows_kernel(
    start_ptr, index_ptr, factor_ptr, own_index_ptr, own_factor_ptr, wanted_ptr, rows_ptr, out_ptr,
    dim, rows_stride, out_stride,
    HAS_OWN: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if HAS_OWN:  # noqa: SIM102 (known at compile time, and not)
        if tl.load(wanted_ptr + row) == 0:
            return
    d_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = d_B < dim
    total_B = tl.zeros([BLOCK], tl.float32)
    for entry in range(tl.load(start_ptr + row), tl.load(start_ptr + row + 1)):
        source = rows_ptr + tl.load(index_ptr + entry).to(tl.int64) * rows_stride + d_B
        value_B = tl.load(source, mask=inside_B, other=0.0).to(tl.float32)
        total_B += tl.load(factor_ptr + entry) * value_B
    if HAS_OWN:
        source = rows_ptr + tl.load(own_index_ptr + row).to(tl.int64) * rows_stride + d_B
        value_B = tl.load(source, mask=inside_B, other=0.0).to(tl.float32)
        total_B += tl.load(own_factor_ptr + row) * value_B
    out_B = out_ptr + row * out_stride + d_B
    if ADD:
        total_B += tl.load(out_B, mask=inside_B, other=0.0)
    tl.store(out_B, narrow(total_B, out_ptr.dtype.element_ty), mask=inside_B)


@triton.jit
def _counted_mm_kernel(
    a_ptr, b_ptr, c_ptr, count_ptr, first, M, N, K, a_m, a_k, b_k, b_n, c_m,
    COUNT_ROWS: tl.constexpr, ADD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    count = tl.maximum(tl.load(count_ptr) - first, 0)
    m, n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    if COUNT_ROWS:
        if m * BLOCK_M >= count:
            return
    else:
        K = tl.minimum(K, count)
    row_M = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.arange(0, BLOCK_K).to(tl.int64)
    c_MN = c_ptr + row_M[:, None] * c_m + column_N[None, :]
    mask_MN = (row_M < M)[:, None] & (column_N < N)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ADD:
        total = tl.load(c_MN, mask=mask_MN, other=0.0)
    for start in range(0, K, BLOCK_K):
        in_K = start + k_K < K
        a_MK = a_ptr + row_M[:, None] * a_m + (start + k_K)[None, :] * a_k
        b_KN = b_ptr + (start + k_K)[:, None] * b_k + column_N[None, :] * b_n
        a = tl.load(a_MK, mask=(row_M < M)[:, None] & in_K[None, :], other=0.0)
        b = tl.load(b_KN, mask=in_K[:, None] & (column_N < N)[None, :], other=0.0)
        if UPCAST:  # the interpreter multiplies bf16 wrongly
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(c_MN, total, mask=mask_MN)


class Lists(NamedTuple):
    """Of a chunk: logits [rows, longest] fp32 and columns [rows, longest] int32 of the listed
    entries, how many there are [rows] int32 (above `longest`: given up), the sum of the others'
    exp(z - max) [rows] fp32."""

    z_TK: Tensor
    column_TK: Tensor
    length_T: Tensor
    rest_T: Tensor


def list_rows(
    z: Tensor, scored: Scored, state: Tensor, known_T: Tensor, lists: Lists,
    start: tuple[int, int], *, floor: float, head: Head,
) -> None:  # fmt: skip
    """Append a tile's likely columns to the rows' lists, and sum the others' exp(z - max).

    Args:
        z, scored, start, head: as in `forward_rows`.
        state: what that left for this tile: its maximum and sum are of all columns so far.
        known_T: [rows] fp32, a lower bound of the log-sum-exp that is known beforehand.
        lists: updated.
        floor: log of the probability from which on a column is listed.
    """
    shape = config(z.device).rows
    bias, scales, flags = head_flags(z, head)
    _list_kernel[(triton.cdiv(z.shape[0], shape.rows),)](
        z, bias, *scored, state[MAX], state[SUM], state[RESCALE], known_T, *lists, z.stride(0),
        *z.shape, start[1], start[0], lists.z_TK.shape[1], *scales, floor, **flags,
        ROWS=shape.rows, BLOCK=shape.block, num_warps=shape.num_warps,
    )  # fmt: skip


def sum_rows(
    start: Tensor,
    index: Tensor,
    factor: Tensor,
    rows: Tensor,
    out: Tensor,
    own: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """out[r] += sum over i in [start[r], start[r + 1]) of factor[i] rows[index[i]], in order.

    With `own` = (index, factor, wanted), one more term per row, and out[r] is set, not added to,
    and only where wanted[r] (int8) is not 0. Sums in fp32; no atomics.
    """
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    num_rows, dim = out.shape
    own_index, own_factor, wanted = own or (index, factor, index)
    if num_rows and dim:
        _sum_rows_kernel[(num_rows, triton.cdiv(dim, _BLOCK_D))](
            start, index, factor, own_index, own_factor, wanted, rows, out, dim, rows.stride(0),
            out.stride(0), HAS_OWN=own is not None, ADD=own is None, BLOCK=_BLOCK_D,
        )  # fmt: skip


def counted_mm(
    left: Tensor, right: Tensor, out: Tensor, count: Tensor, first: int, *, rows: bool, add: bool
) -> None:
    """out (+)= left @ right in fp32, of whose extent the device holds a bound, count - first.

    With `rows` only that many rows of `out` are formed (those behind keep what they hold), else
    only that many columns of `left` are read.
    """
    shape = config(left.device)
    tile = shape.gemm_fp32 if left.dtype == torch.float32 else shape.gemm_small
    interpreted = left.device.type == "cpu"
    (m, k), n = left.shape, right.shape[1]
    _counted_mm_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
        left, right, out, count, first, m, n, k, *left.stride(), *right.stride(), out.stride(0),
        COUNT_ROWS=rows, ADD=add, UPCAST=interpreted, PRECISION="ieee",
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_d, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
