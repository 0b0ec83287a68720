"""`pair_reduce`: the weighted sum of weight-gradient tiles and their inner products, in one read.

The tokens of the groups are disjoint, so that their gradients cost the FLOPs of the sum; what they
add is this pass. Of K tiles in fp32 it reads 4 K bytes per element and writes dW: for two, G_t and
G_e, 10 bytes with dW in bf16, 12 where it is added into, 12 and 16 with dW in fp32. Above `FUSED`
tiles the inner products are formed block by block, and the sum in a pass of its own.
"""

# Kernels build tuples of registers in unrolled loops, which no static type of Python describes.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvpo_kernels.backends.triton.narrow import narrow

# Elements per partial. Part of the result: partials are added in an order that depends on it alone.
# For one and two tiles that of csrc/cuda; for more, a layer of 1536 x 1536 fills an H100.
TILE = 1 << 16
_SMALL_TILE = 1 << 14
# Tiles whose products, K (K + 1) / 2 per element, fit a thread's registers.
FUSED = 8
# Elements at a time by number of tiles, at least one for each of `_THREADS`: an element is then
# held by one thread only, which is what lets the sum be written over the first tile.
_BLOCKS = {1: 4096, 2: 4096, 3: 2048, 4: 1024, 5: 512, 6: 512, 7: 512, 8: 512}
_SUM_BLOCK = 2048
_GRAM_BLOCK = 256
MAX_TILES = 64
_THREADS = 256


@triton.jit
def _load(base_ptr, index_B, mask_B):
    return tl.load(base_ptr + index_B, mask=mask_B, other=0.0).to(tl.float32)


@triton.jit
def _store_total(total_ptr, index_B, mask_B, total_B, ADD: tl.constexpr):
    if ADD:
        total_B += _load(total_ptr, index_B, mask_B)
    tl.store(total_ptr + index_B, narrow(total_B, total_ptr.dtype.element_ty), mask=mask_B)


@triton.jit
def _pair_reduce_kernel(
    tiles_ptr, weights_ptr, total_ptr, partials_ptr, numel,
    COUNT: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ADD: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    sums = ()
    for _ in tl.static_range(COUNT * (COUNT + 1) // 2):
        sums += (tl.zeros([BLOCK], tl.float32),)
    for start in range(0, TILE, BLOCK):
        index_B = tile * TILE + start + tl.arange(0, BLOCK)
        mask_B = index_B < numel
        gradients = ()
        base_ptr = tiles_ptr
        for _ in tl.static_range(COUNT):
            gradients += (_load(base_ptr, index_B, mask_B),)
            base_ptr += numel
        moved = ()
        for k in tl.static_range(COUNT):
            for other in tl.static_range(k + 1):
                product_B = gradients[k] * gradients[other]
                moved += (sums[k * (k + 1) // 2 + other] + product_B,)
        sums = moved
        total_B = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(COUNT):
            weighted_B = gradients[k]
            if HAS_WEIGHTS:
                weighted_B *= tl.load(weights_ptr + k)
            total_B = weighted_B if k == 0 else total_B + weighted_B
        _store_total(total_ptr, index_B, mask_B, total_B, ADD)
    partials_ptr += tile * (COUNT * (COUNT + 1) // 2)
    for pair in tl.static_range(COUNT * (COUNT + 1) // 2):
        tl.store(partials_ptr + pair, tl.sum(sums[pair], 0))


@triton.jit
def _gram_block_kernel(
    tiles_ptr, partials_ptr, numel, num_tiles,
    SIDE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of `SIDE` tiles with as many others. Programs of one stretch of elements follow one
    another, so that what several of them read may be found in L2."""
    blocks = tl.cdiv(num_tiles, SIDE)
    tile = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    row = (tl.program_id(0) // blocks % blocks * SIDE).to(tl.int64)
    column = (tl.program_id(0) % blocks * SIDE).to(tl.int64)
    if column > row:
        return
    sums = ()
    for _ in tl.static_range(SIDE * SIDE):
        sums += (tl.zeros([BLOCK], tl.float32),)
    first = tile * TILE
    for start in range(0, tl.minimum(TILE, numel - first), BLOCK):
        index_B = first + start + tl.arange(0, BLOCK)
        mask_B = index_B < numel
        left, right = (), ()
        for k in tl.static_range(SIDE):
            left_ptr, right_ptr = tiles_ptr + (row + k) * numel, tiles_ptr + (column + k) * numel
            left += (_load(left_ptr, index_B, mask_B & (row + k < num_tiles)),)
            right += (_load(right_ptr, index_B, mask_B & (column + k < num_tiles)),)
        moved = ()
        for pair in tl.static_range(SIDE * SIDE):
            moved += (sums[pair] + left[pair // SIDE] * right[pair % SIDE],)
        sums = moved
    partials_ptr += tile * num_tiles * num_tiles
    for pair in tl.static_range(SIDE * SIDE):
        k, other = row + pair // SIDE, column + pair % SIDE
        inside = (k < num_tiles) & (other <= k)
        value = tl.sum(sums[pair], 0)
        tl.store(partials_ptr + k * num_tiles + other, value, mask=inside)
        tl.store(partials_ptr + other * num_tiles + k, value, mask=inside)


@triton.jit
def _sum_kernel(
    tiles_ptr, weights_ptr, total_ptr, numel, num_tiles,
    HAS_WEIGHTS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_B = index_B < numel
    total_B = tl.zeros([BLOCK], tl.float32)
    for k in range(num_tiles):
        weighted_B = _load(tiles_ptr, index_B, mask_B)
        tiles_ptr += numel
        if HAS_WEIGHTS:
            weighted_B *= tl.load(weights_ptr + k)
        total_B += weighted_B
    _store_total(total_ptr, index_B, mask_B, total_B, ADD)


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


def reduce_shape(count: int) -> dict[str, int]:
    """Launch shape of the fused kernel for `count` tiles: elements of a partial and of a step."""
    return {"COUNT": count, "TILE": TILE if count <= 2 else _SMALL_TILE, "BLOCK": _BLOCKS[count]}


def gram_of_partials(partials: Tensor, count: int) -> Tensor:
    """[count, count] fp64 from fp32 partials [tiles, count (count + 1) / 2], the lower triangle row
    by row; added in their order."""
    sums = iter(partials.sum(0, dtype=torch.float64).unbind())
    rows = [[next(sums) for _ in range(k + 1)] for k in range(count)]
    every = [rows[max(i, j)][min(i, j)] for i in range(count) for j in range(count)]
    return torch.stack(every).view(count, count)


def _gram_partials(tiles_KRD: Tensor, numel: int) -> Tensor:
    """fp32 inner products [stretches, K, K] of any number of tiles, by blocks of `FUSED`."""
    count = tiles_KRD.shape[0]
    stretches, blocks = triton.cdiv(numel, _SMALL_TILE), triton.cdiv(count, FUSED)
    partials = torch.empty(stretches, count, count, device=tiles_KRD.device)
    if numel:
        _gram_block_kernel[(stretches * blocks**2,)](
            tiles_KRD, partials, numel, count, SIDE=FUSED, TILE=_SMALL_TILE, BLOCK=_GRAM_BLOCK,
            num_warps=_THREADS // 32,
        )  # fmt: skip
    return partials


def pair_reduce(
    tiles_KRD: Tensor, total_RD: Tensor, weights_K: Tensor | None = None, add: bool = False
) -> Tensor:
    """total = sum_k w_k A_k, with `add` added to what it holds; returns <A_k, A_l>.

    Args:
        tiles_KRD: contiguous, fp32, bf16 or fp16, at most `MAX_TILES` of them.
        total_RD: contiguous, any float dtype; formed in fp32 and rounded once. May be
            tiles_KRD[0]: an element is read by the thread that writes it, before it does.
        weights_K: fp32, on the device; None is 1 for each. The inner products have no weights.

    Returns:
        [K, K] fp64: fp32 partials of stretches of fixed length, added in fp64 in their order.
    """
    check_pair_reduce(tiles_KRD, total_RD, weights_K)
    count, numel = tiles_KRD.shape[0], total_RD.numel()
    if not 1 <= count <= MAX_TILES:
        raise ValueError(f"tiles: expected 1 to {MAX_TILES} of them, got {count}")
    weights = total_RD if weights_K is None else weights_K
    flags = {"HAS_WEIGHTS": weights_K is not None, "ADD": add, "num_warps": _THREADS // 32}
    if count > FUSED:
        partials = _gram_partials(tiles_KRD, numel)
        if numel:  # after the products have been read: the sum may lie over the first tile
            _sum_kernel[(triton.cdiv(numel, _SUM_BLOCK),)](
                tiles_KRD, weights, total_RD, numel, count, **flags, BLOCK=_SUM_BLOCK
            )
        return partials.sum(0, dtype=torch.float64)
    shape = reduce_shape(count)
    stretches, pairs = triton.cdiv(numel, shape["TILE"]), count * (count + 1) // 2
    partials = torch.empty(stretches, pairs, device=tiles_KRD.device)
    if numel:
        _pair_reduce_kernel[(stretches,)](
            tiles_KRD, weights, total_RD, partials, numel, **flags, **shape
        )
    return gram_of_partials(partials, count)
