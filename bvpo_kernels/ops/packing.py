"""Operators of packed rows: the sum of each segment, and its transpose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bvpo_kernels import backends, checks
from bvpo_kernels.backends.eager import packing as eager
from bvpo_kernels.ops.library import define, differentiate

_MODULES: dict[str, Any] = {"eager": eager}
if not backends.MISSING["triton"]:  # importing this module needs triton
    from bvpo_kernels.backends.triton import packing as triton_packing

    _MODULES["triton"] = triton_packing


def _unsupported(backend: str, device: str) -> str:
    """Why a backend that is installed cannot serve `segment_sum`; '' when it can."""
    if backend == "triton" and device != "cuda" and not backends.INTERPRETED:
        return f"it serves CUDA tensors, got {device}"
    return "" if backend in ("reference", "eager", "triton") else "it has no kernel of segment_sum"


def choose_sum(impl: str, device: str) -> str:
    """The backend of `segment_sum` for a type of device."""
    return backends.choose(impl, lambda name: _unsupported(name, device))


def _sum(values: Tensor, cu_seqlens: Tensor, impl: str) -> Tensor:
    # Here and not in the public function: a graph cannot be traced through checks of values.
    checks.cu_seqlens_values(cu_seqlens, values.shape[0])
    return _MODULES[impl].segment_sum(values, cu_seqlens)


def _sum_fake(values: Tensor, cu_seqlens: Tensor, impl: str) -> Tensor:
    acc = torch.promote_types(values.dtype, torch.float32)
    return values.new_empty(cu_seqlens.shape[0] - 1, dtype=acc)


def _spread(
    dsums: Tensor, cu_seqlens: Tensor, num_tokens: int, dtype: torch.dtype, impl: str
) -> Tensor:
    return _MODULES[impl].segment_spread(dsums, cu_seqlens, num_tokens, dtype)


def _spread_fake(dsums, cu_seqlens, num_tokens, dtype, impl):
    return dsums.new_empty(num_tokens, dtype=dtype)


segment_sum = define(
    "segment_sum(Tensor values, Tensor cu_seqlens, str impl) -> Tensor", _sum, _sum_fake
)
segment_spread = define(
    "segment_spread(Tensor dsums, Tensor cu_seqlens, int num_tokens, ScalarType dtype, str impl) "
    "-> Tensor",
    _spread,
    _spread_fake,
)


def _sum_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    values, cu_seqlens, ctx.impl = inputs
    ctx.num_tokens, ctx.dtype = values.shape[0], values.dtype
    ctx.save_for_backward(cu_seqlens)


def _sum_backward(ctx: Any, dsums: Tensor) -> tuple:
    (cu_seqlens,) = ctx.saved_tensors
    return segment_spread(dsums, cu_seqlens, ctx.num_tokens, ctx.dtype, ctx.impl), None, None


def _spread_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dsums, cu_seqlens, _, _, ctx.impl = inputs
    ctx.dtype = dsums.dtype
    ctx.save_for_backward(cu_seqlens)


def _spread_backward(ctx: Any, dvalues: Tensor) -> tuple:
    (cu_seqlens,) = ctx.saved_tensors
    return segment_sum(dvalues, cu_seqlens, ctx.impl).to(ctx.dtype), None, None, None, None


# Each is the other's transpose, so derivatives of any order are right.
differentiate("segment_sum", _sum_backward, _sum_setup)
differentiate("segment_spread", _spread_backward, _spread_setup)
