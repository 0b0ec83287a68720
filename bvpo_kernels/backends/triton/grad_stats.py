"""`pair_reduce`: the weighted sum of weight-gradient tiles and their inner products, in one read.

The tokens of the groups are disjoint, so that their gradients cost the FLOPs of the sum; what they
add is this pass. For two tiles, G_t and G_e, it reads 8 bytes per element in fp32 and writes dW:
10 bytes with dW in bf16, 12 where it is added into, 12 and 16 with dW in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvpo_kernels.backends.triton.narrow import narrow

# Elements per partial. Part of the result: partials are added in an order that depends on it alone.
TILE = 1 << 16
_BLOCK = 4096
# Of more than two tiles: as many products as are summed in fp32, and tiles of one matrix product.
GROUP_TILE = 1 << 12
_GROUP_ELEMENTS = 2048
MAX_TILES = 64


@triton.jit
def _store_total(total_ptr, index_B, mask_B, total_B, ADD: tl.constexpr):
    if ADD:
        total_B += tl.load(total_ptr + index_B, mask=mask_B, other=0.0).to(tl.float32)
    tl.store(total_ptr + index_B, narrow(total_B, total_ptr.dtype.element_ty), mask=mask_B)


@triton.jit
def _pair_reduce_kernel(
    trace_ptr, empty_ptr, weights_ptr, total_ptr, partials_ptr, numel,
    HAS_WEIGHTS: tl.constexpr, ADD: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * TILE
    trace_B = tl.zeros([BLOCK], tl.float32)
    empty_B = tl.zeros([BLOCK], tl.float32)
    cross_B = tl.zeros([BLOCK], tl.float32)
    for start in range(0, TILE, BLOCK):
        index_B = first + start + tl.arange(0, BLOCK)
        mask_B = index_B < numel
        g_trace = tl.load(trace_ptr + index_B, mask=mask_B, other=0.0).to(tl.float32)
        g_empty = tl.load(empty_ptr + index_B, mask=mask_B, other=0.0).to(tl.float32)
        trace_B += g_trace * g_trace
        empty_B += g_empty * g_empty
        cross_B += g_trace * g_empty
        if HAS_WEIGHTS:
            g_trace *= tl.load(weights_ptr)
            g_empty *= tl.load(weights_ptr + 1)
        _store_total(total_ptr, index_B, mask_B, g_trace + g_empty, ADD)
    partial = partials_ptr + 3 * tile
    tl.store(partial, tl.sum(trace_B, 0))
    tl.store(partial + 1, tl.sum(empty_B, 0))
    tl.store(partial + 2, tl.sum(cross_B, 0))


@triton.jit
def _group_reduce_kernel(
    tiles_ptr, weights_ptr, total_ptr, partials_ptr, tiles_stride, numel, num_tiles,
    HAS_WEIGHTS: tl.constexpr, ADD: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    k_K = tl.arange(0, PADDED)
    inside_K = k_K < num_tiles
    tiles_K = tiles_ptr + k_K.to(tl.int64) * tiles_stride
    gram_KK = tl.zeros([PADDED, PADDED], tl.float32)
    for start in range(0, TILE, BLOCK):
        index_B = tile * TILE + start + tl.arange(0, BLOCK)
        mask_B = index_B < numel
        mask_KB = inside_K[:, None] & mask_B[None, :]
        g_KB = tl.load(tiles_K[:, None] + index_B[None, :], mask=mask_KB, other=0.0)
        g_KB = g_KB.to(tl.float32)
        gram_KK = tl.dot(g_KB, tl.trans(g_KB), gram_KK, input_precision="ieee")
        if HAS_WEIGHTS:
            g_KB *= tl.load(weights_ptr + k_K, mask=inside_K, other=0.0)[:, None]
        _store_total(total_ptr, index_B, mask_B, tl.sum(g_KB, 0), ADD)
    partial_K = partials_ptr + (tile * num_tiles + k_K) * num_tiles
    mask_KK = inside_K[:, None] & inside_K[None, :]
    tl.store(partial_K[:, None] + k_K[None, :], gram_KK, mask=mask_KK)


def check_pair_reduce(tiles_KRD: Tensor, total_RD: Tensor, weights_K: Tensor | None) -> None:
    """What both twins ask for: tiles and total contiguous, a weight in fp32 for each tile.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    if tiles_KRD.ndim != 3 or not tiles_KRD.is_contiguous():
        got = f"{tuple(tiles_KRD.shape)} with strides {tiles_KRD.stride()}"
        raise ValueError(f"tiles: expected a contiguous [K, R, D], got {got}")
    if total_RD.shape != tiles_KRD.shape[1:] or not total_RD.is_contiguous():
        expected = f"a contiguous tensor of shape {tuple(tiles_KRD.shape[1:])}"
        raise ValueError(f"total: expected {expected}, got {tuple(total_RD.shape)}")
    count = tiles_KRD.shape[0]
    if weights_K is not None and (weights_K.shape != (count,) or weights_K.dtype != torch.float32):
        got = f"{tuple(weights_K.shape)} {weights_K.dtype}"
        raise ValueError(f"weights: expected ({count},) torch.float32, got {got}")


def group_shape(count: int) -> dict[str, int]:
    """Launch shape for `count` tiles: rows of a matrix product, and columns that fit registers."""
    padded = max(triton.next_power_of_2(count), 16)
    return {"PADDED": padded, "BLOCK": _GROUP_ELEMENTS // padded, "TILE": GROUP_TILE}


def gram_of_pair(partials: Tensor) -> Tensor:
    """[2, 2] fp64 from partials [tiles, 3]: |G_t|^2, |G_e|^2, <G_t, G_e>; added in their order."""
    trace, empty, cross = partials.sum(0, dtype=torch.float64).unbind()
    return torch.stack([trace, cross, cross, empty]).view(2, 2)


def pair_reduce(
    tiles_KRD: Tensor, total_RD: Tensor, weights_K: Tensor | None = None, add: bool = False
) -> Tensor:
    """total = sum_k w_k A_k, with `add` added to what it holds; returns <A_k, A_l>.

    Args:
        tiles_KRD: contiguous, fp32, bf16 or fp16, at most `MAX_TILES` of them.
        total_RD: contiguous, any float dtype; formed in fp32 and rounded once.
        weights_K: fp32, on the device; None is 1 for each. The inner products have no weights.

    Returns:
        [K, K] fp64: fp32 partials of stretches of fixed length, added in fp64 in their order.
    """
    check_pair_reduce(tiles_KRD, total_RD, weights_K)
    count, numel = tiles_KRD.shape[0], total_RD.numel()
    if not 1 <= count <= MAX_TILES:
        raise ValueError(f"tiles: expected 1 to {MAX_TILES} of them, got {count}")
    weights = total_RD if weights_K is None else weights_K
    flags = {"HAS_WEIGHTS": weights_K is not None, "ADD": add}
    device = tiles_KRD.device
    if count == 2:
        partials = torch.empty(triton.cdiv(numel, TILE), 3, device=device)
        if numel:
            _pair_reduce_kernel[(partials.shape[0],)](
                tiles_KRD[0], tiles_KRD[1], weights, total_RD, partials, numel,
                **flags, TILE=TILE, BLOCK=_BLOCK, num_warps=8,
            )  # fmt: skip
        return gram_of_pair(partials)
    partials = torch.empty(triton.cdiv(numel, GROUP_TILE), count, count, device=device)
    if numel:
        _group_reduce_kernel[(partials.shape[0],)](
            tiles_KRD, weights, total_RD, partials, tiles_KRD.stride(0), numel, count, **flags,
            **group_shape(count), num_warps=4,
        )  # fmt: skip
    return partials.sum(0, dtype=torch.float64)
