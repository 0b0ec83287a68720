"""Row kernels over a tile of logits [rows, columns]: softmax statistics in one read, dZ in place.

The GEMM in front writes z = h W^T in fp32; what follows it (bias, softcap, temperature, softmax)
happens here, in registers. The target's column stays out of the running sum, as in
`schedule.py`: logp = logsigmoid(z_y - m - log s) and dz_y = -expm1(logp) dlogp do not cancel. A
row's state over the vocabulary tiles is one column of a fp32 tensor [6, rows], as named there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvpo_kernels.backends import schedule
from bvpo_kernels.backends.triton.configs import config
from bvpo_kernels.backends.triton.narrow import narrow
from bvpo_kernels.call import Head

STATE_ROWS = 6
# Stands for -inf where -inf - -inf would be NaN. Far below any logit, and finite when subtracted.
_LOWEST = tl.constexpr(-3.0e38)
# The maximum of rows that are not scored: their exponentials are 0, not infinite.
_HIGHEST = tl.constexpr(3.0e38)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def exp_or_zero(x):
    """exp(x), or 0 below 2^-126: two instructions where denormal results take five."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 - tanh(x)^2 to a few ulp. There is no tanh that the interpreter can run."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = 1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835))))
    # 1 - e cancels near 0, where the series is exact to fp32.
    tanh = tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0.0, -far, far))
    return tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def finish_logit(z, bias, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """The final logit of a product z, and the softcap's derivative there (1 without one)."""
    if bias is not None:
        z = z + bias
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        z, slope = tanh_and_slope(z / softcap)
        z = z * softcap
    return z * inv_temperature, slope


@triton.jit
def load_bias(bias_ptr, index, mask, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return tl.load(bias_ptr + index, mask=mask, other=0.0).to(tl.float32)
    else:
        return None


@triton.jit
def load_block(z_row_R, wanted_R, column_B, columns):
    mask_RB = wanted_R[:, None] & (column_B < columns)[None, :]
    return tl.load(z_row_R[:, None] + column_B[None, :], mask=mask_RB, other=0.0).to(tl.float32)


@triton.jit
def fold_state(
    state_ptr, state_stride, row_R, mask_R, max_R, sum_R, weighted_R, HAS_ENTROPY: tl.constexpr
):
    """Merge the statistics of one tile into the rows' state; returns the new maximum.

    Warps that share a row all read its state and one writes it. Whether they read the old or the
    new maximum, the new one comes out; nothing else is used by a warp that does not write.
    """
    old_max_R = tl.load(state_ptr + row_R, mask=mask_R, other=_LOWEST)
    old_max_R = tl.maximum(old_max_R, _LOWEST)
    old_sum_R = tl.load(state_ptr + state_stride + row_R, mask=mask_R, other=0.0)
    new_max_R = tl.maximum(old_max_R, max_R)
    keep_R = tl.exp(old_max_R - new_max_R)
    scale_R = tl.exp(max_R - new_max_R)
    if HAS_ENTROPY:
        weighted_ptr = state_ptr + 2 * state_stride + row_R
        old_R = tl.load(weighted_ptr, mask=mask_R, other=0.0)
        old_R = keep_R * (old_R + (old_max_R - new_max_R) * old_sum_R)
        new_R = scale_R * (weighted_R + (max_R - new_max_R) * sum_R)
        tl.store(weighted_ptr, old_R + new_R, mask=mask_R)
    sum_R = old_sum_R * keep_R + sum_R * scale_R
    # A tile may hold nothing but the target: the maximum of the others is then still -inf.
    stored_R = tl.where(sum_R > 0.0, new_max_R, -float("inf"))
    tl.store(state_ptr + row_R, stored_R, mask=mask_R)
    tl.store(state_ptr + state_stride + row_R, sum_R, mask=mask_R)
    tl.store(state_ptr + 5 * state_stride + row_R, keep_R, mask=mask_R)
    return new_max_R


@triton.jit
def _forward_kernel(
    z_ptr, p_ptr, bias_ptr, target_ptr, count_ptr, state_ptr,
    z_stride, p_stride, state_stride, num_rows, columns, column_start, row_start,
    softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < num_rows
    scored_R = inside_R & (row_start + row_R < tl.load(count_ptr))
    target_R = tl.load(target_ptr + row_R, mask=scored_R, other=-1) - column_start
    here_R = scored_R & (target_R >= 0) & (target_R < columns)
    target_R = tl.where(here_R, target_R, -1).to(tl.int32)
    z_row_R = z_ptr + row_R * z_stride
    # Rows behind the scored ones are not read.
    end = tl.where(tl.max(scored_R.to(tl.int32), 0) > 0, columns, 0)

    # Almost all blocks are whole and hold no target: one branch for these, nothing per logit.
    first_target = tl.min(tl.where(here_R, target_R, columns), 0)
    last_target = tl.max(target_R, 0)
    # Each lane runs its own online softmax: the maximum of its logits in a block first, then one
    # exp for each of them and one to rescale. Lanes meet once, at the end.
    max_RL = tl.full([ROWS, LANES], _LOWEST, tl.float32)
    sum_RL = tl.zeros([ROWS, LANES], tl.float32)
    weighted_RL = tl.zeros([ROWS, LANES], tl.float32)
    # Copied to shared memory `STAGES` - 1 blocks ahead: loads into registers wait for their use.
    for start in tl.range(0, end, BLOCK, num_stages=STAGES):
        column_B = start + tl.arange(0, BLOCK)
        mask_RB = scored_R[:, None] & (column_B < columns)[None, :]
        z = tl.load(z_row_R[:, None] + column_B[None, :], mask=mask_RB, other=0.0).to(tl.float32)
        bias = load_bias(bias_ptr, column_start + column_B, column_B < columns, HAS_BIAS)
        z, _ = finish_logit(z, bias, softcap, inv_temperature, HAS_SOFTCAP)
        if (start + BLOCK > end) | ((first_target < start + BLOCK) & (last_target >= start)):
            index_B = tl.arange(0, BLOCK)
            keep_RB = (index_B < end - start)[None, :] & (
                index_B[None, :] != target_R[:, None] - start
            )
            z = tl.where(keep_RB, z, -float("inf"))
        # A lane's logits lie `LANES` columns apart, in one thread.
        z_RSL = tl.reshape(z, [ROWS, BLOCK // LANES, LANES])
        higher_RL = tl.maximum(max_RL, tl.max(z_RSL, 1))
        moved_RL = max_RL - higher_RL
        scale_RL = exp_or_zero(moved_RL)
        distance = z_RSL - higher_RL[:, None, :]
        e = exp_or_zero(distance)
        if HAS_ENTROPY:
            # A masked logit, -inf, adds 0.
            added = e * tl.where(e == 0.0, 0.0, distance)
            weighted_RL = scale_RL * (weighted_RL + moved_RL * sum_RL) + tl.sum(added, 1)
        sum_RL = scale_RL * sum_RL + tl.sum(e, 1)
        max_RL = higher_RL
    max_R = tl.max(max_RL, 1)
    distance = max_RL - max_R[:, None]
    scale_RL = tl.exp(distance)
    sum_R = tl.sum(sum_RL * scale_RL, 1)
    weighted_R = tl.sum(scale_RL * (weighted_RL + distance * sum_RL), 1)
    new_max_R = fold_state(
        state_ptr, state_stride, row_R, scored_R, max_R, sum_R, weighted_R, HAS_ENTROPY
    )
    z_R = tl.load(z_row_R + target_R, mask=here_R, other=0.0).to(tl.float32)
    bias_R = load_bias(bias_ptr, column_start + target_R, here_R, HAS_BIAS)
    z_R, slope_R = finish_logit(z_R, bias_R, softcap, inv_temperature, HAS_SOFTCAP)
    tl.store(state_ptr + 3 * state_stride + row_R, z_R, mask=here_R)
    tl.store(state_ptr + 4 * state_stride + row_R, slope_R, mask=here_R)

    if HAS_P:
        shift_R = tl.where(scored_R, new_max_R, _HIGHEST)
        for start in range(0, columns, BLOCK):
            column_B = start + tl.arange(0, BLOCK)
            mask_RB = scored_R[:, None] & (column_B < columns)[None, :]
            z = tl.load(z_row_R[:, None] + column_B[None, :], mask=mask_RB, other=0.0)
            # p may lie over z (half the bytes): all of this block must be read before it is
            # written, and what is written lies before every block that is still to be read. Here,
            # a barrier also has all loads of the block under way before the first is used.
            tl.debug_barrier()
            bias = load_bias(bias_ptr, column_start + column_B, column_B < columns, HAS_BIAS)
            z, slope = finish_logit(z.to(tl.float32), bias, softcap, inv_temperature, HAS_SOFTCAP)
            keep_RB = mask_RB & (column_B[None, :] != target_R[:, None])
            p = tl.where(keep_RB, exp_or_zero(z - shift_R[:, None]) * slope, 0.0)
            p_RB = p_ptr + row_R[:, None] * p_stride + column_B[None, :]
            mask_RB = inside_R[:, None] & (column_B < columns)[None, :]
            tl.store(p_RB, narrow(p, p_ptr.dtype.element_ty), mask=mask_RB)


@triton.jit
def _backward_kernel(
    z_ptr, dz_ptr, bias_ptr, target_ptr, count_ptr, upstream_ptr, coefficient_ptr, max_ptr,
    logsum_ptr, z_stride, dz_stride, num_rows, columns, column_start, row_start,
    softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < num_rows
    scored_R = inside_R & (row_start + row_R < tl.load(count_ptr))
    upstream_R = tl.load(upstream_ptr + row_R, mask=scored_R, other=0.0)
    # A row without upstream gradient (a saturated pair) is written, but not read.
    used_R = scored_R & (upstream_R != 0.0)
    target_R = tl.load(target_ptr + row_R, mask=scored_R, other=-1) - column_start
    target_R = tl.where(target_R < columns, target_R, -1).to(tl.int32)
    coefficient_R = tl.load(coefficient_ptr + row_R, mask=used_R, other=0.0)
    max_R = tl.load(max_ptr + row_R, mask=used_R, other=_HIGHEST)
    logsum_R = tl.load(logsum_ptr + row_R, mask=used_R, other=0.0)
    z_row_R = z_ptr + row_R * z_stride
    following = load_block(z_row_R, used_R, tl.arange(0, BLOCK), columns)
    for start in range(0, columns, BLOCK):
        column_B = start + tl.arange(0, BLOCK)
        in_tile_B = column_B < columns
        z = following
        # One block ahead: under way while this block is computed and stored.
        following = load_block(z_row_R, used_R, column_B + BLOCK, columns)
        tl.debug_barrier()  # dz may lie over z, as p above
        bias = load_bias(bias_ptr, column_start + column_B, in_tile_B, HAS_BIAS)
        z, slope = finish_logit(z, bias, softcap, inv_temperature, HAS_SOFTCAP)
        # The maximum first: an offset common to all logits must not eat the fraction.
        p = exp_or_zero((z - max_R[:, None]) - logsum_R[:, None])
        is_target_RB = column_B[None, :] == target_R[:, None]
        # 0 in rows that are not used: their upstream, coefficient and p are.
        dz = tl.where(is_target_RB, coefficient_R[:, None], -upstream_R[:, None] * p) * slope
        dz_RB = dz_ptr + row_R[:, None] * dz_stride + column_B[None, :]
        stored_RB = inside_R[:, None] & in_tile_B[None, :]
        tl.store(dz_RB, narrow(dz, dz_ptr.dtype.element_ty), mask=stored_RB)


class Scored(NamedTuple):
    """Rows of a chunk, in compact order: column of the whole vocabulary of each target, [rows]
    int64, and on the device, [1] int32, how many rows of the call are scored; a chunk that starts
    at row s has num_scored - s of them, at its beginning."""

    target_T: Tensor
    num_scored: Tensor


class Upstream(NamedTuple):
    """dlogp / temperature, that times -expm1(logp), and what the forward kept; [rows] fp32."""

    upstream_T: Tensor
    coefficient_T: Tensor
    max_T: Tensor
    logsum_T: Tensor

    def of(self, tokens: slice) -> Upstream:
        return Upstream(*(values[tokens] for values in self))


def new_state(num_rows: int, device: torch.device) -> Tensor:
    """The state [6, rows] before the first tile."""
    state = torch.zeros(STATE_ROWS, num_rows, device=device)
    state[schedule.MAX].fill_(-torch.inf)
    state[schedule.TARGET_SLOPE].fill_(1.0)
    return state


def head_flags(z: Tensor, head: Head) -> tuple[Tensor, tuple[float, float], dict[str, bool]]:
    """The bias (or what stands for it), softcap and 1 / temperature, and what is there at all."""
    flags = {"HAS_BIAS": head.bias_V is not None, "HAS_SOFTCAP": head.softcap is not None}
    scales = (float(head.softcap or 1.0), 1.0 / head.temperature)
    return z if head.bias_V is None else head.bias_V, scales, flags


def forward_rows(
    z: Tensor, scored: Scored, state: Tensor, start: tuple[int, int], head: Head, *,
    entropy: bool = False, p: Tensor | None = None,
) -> None:  # fmt: skip
    """Fold a tile of products into `state`; with `p` also write exp(z_v - m) slope_v, 0 at y.

    Args:
        z: [rows, columns] fp32, h W^T of tokens start[0].. and columns start[1].. .
        state: [6, rows] fp32, updated (`schedule`).
        head: its bias is indexed by column of the whole vocabulary.
        p: [rows, columns], any float dtype; may be a view of z's memory with elements of at most
            z's size and rows that start where z's do. Rows that are not scored become 0.
    """
    shapes = config(z.device)
    shape = shapes.rows if p is None else shapes.rows_twice
    (num_rows, columns), (row_start, column_start) = z.shape, start
    bias, scales, flags = head_flags(z, head)
    itemsize = min(z.element_size(), (z if p is None else p).element_size())
    _forward_kernel[(triton.cdiv(num_rows, shape.rows),)](
        z, z if p is None else p, bias, scored.target_T, scored.num_scored, state, z.stride(0),
        0 if p is None else p.stride(0), state.stride(0), num_rows, columns, column_start,
        row_start, *scales, **flags, HAS_ENTROPY=entropy, HAS_P=p is not None, ROWS=shape.rows,
        BLOCK=shape.block, LANES=shape.lanes(itemsize), STAGES=shape.stages,
        num_warps=shape.num_warps,
    )  # fmt: skip


def backward_rows(
    z: Tensor, dz: Tensor, scored: Scored, values: Upstream, start: tuple[int, int], head: Head
) -> None:
    """dz_v = (-upstream exp(z_v - max - logsum) | coefficient at v = y) slope_v, over a tile.

    Args:
        z, scored, start, head: as in `forward_rows`.
        dz: [rows, columns], any float dtype; may lie over z as `p` there.
    """
    shape = config(z.device).rows
    (num_rows, columns), (row_start, column_start) = z.shape, start
    bias, scales, flags = head_flags(z, head)
    _backward_kernel[(triton.cdiv(num_rows, shape.rows),)](
        z, dz, bias, *scored, *values, z.stride(0), dz.stride(0), num_rows, columns, column_start,
        row_start, *scales, **flags, ROWS=shape.rows, BLOCK=shape.block,
        num_warps=shape.num_warps,
    )  # fmt: skip
