"""`pair_reduce`: inner products of two weight-gradient tiles and their weighted sum, in one read.

Trace and empty tokens are disjoint, so that G_t and G_e cost the FLOPs of their sum; what they add
is this pass. Per element it reads G_t, G_e and dW and writes dW: 16 bytes in fp32, 12 with dW in
bf16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvpo_kernels.kernels.narrow import narrow

# Elements per partial. Part of the result: partials are added in an order that depends on it alone.
TILE = 1 << 16
_BLOCK = 4096


@triton.jit
def _pair_reduce_kernel(
    trace_ptr, empty_ptr, weights_ptr, dweight_ptr, partials_ptr, numel,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * TILE
    weight_trace, weight_empty = tl.load(weights_ptr), tl.load(weights_ptr + 1)
    trace_B = tl.zeros([BLOCK], tl.float32)
    empty_B = tl.zeros([BLOCK], tl.float32)
    cross_B = tl.zeros([BLOCK], tl.float32)
    for start in range(0, TILE, BLOCK):
        index_B = first + start + tl.arange(0, BLOCK)
        mask_B = index_B < numel
        g_trace = tl.load(trace_ptr + index_B, mask=mask_B, other=0.0).to(tl.float32)
        g_empty = tl.load(empty_ptr + index_B, mask=mask_B, other=0.0).to(tl.float32)
        dweight = tl.load(dweight_ptr + index_B, mask=mask_B, other=0.0).to(tl.float32)
        trace_B += g_trace * g_trace
        empty_B += g_empty * g_empty
        cross_B += g_trace * g_empty
        dweight += weight_trace * g_trace + weight_empty * g_empty
        tl.store(dweight_ptr + index_B, narrow(dweight, dweight_ptr.dtype.element_ty), mask=mask_B)
    partial = partials_ptr + 3 * tile
    tl.store(partial, tl.sum(trace_B, 0))
    tl.store(partial + 1, tl.sum(empty_B, 0))
    tl.store(partial + 2, tl.sum(cross_B, 0))


def pair_reduce(g_trace: Tensor, g_empty: Tensor, weights: Tensor, dweight: Tensor) -> Tensor:
    """dW += w_t G_t + w_e G_e; returns |G_t|^2, |G_e|^2, <G_t, G_e> per `TILE` elements.

    Args:
        g_trace, g_empty: contiguous, one shape, fp32 or bf16. weights: [2] fp32 on the device.
        dweight: contiguous, of that shape, updated in fp32 and rounded once.

    Returns:
        [tiles, 3] fp32, to be added in fp64: `.double().sum(0)`.
    """
    for name, tensor in (("g_trace", g_trace), ("g_empty", g_empty), ("dweight", dweight)):
        if tensor.shape != g_trace.shape or not tensor.is_contiguous():
            expected = f"a contiguous tensor of shape {tuple(g_trace.shape)}"
            raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")
    num_tiles = triton.cdiv(g_trace.numel(), TILE)
    partials = torch.empty(num_tiles, 3, device=g_trace.device)
    if num_tiles:
        _pair_reduce_kernel[(num_tiles,)](
            g_trace, g_empty, weights, dweight, partials, g_trace.numel(),
            TILE=TILE, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return partials
