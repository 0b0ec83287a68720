"""Operators of the gradient statistics: schemas, fakes, and the choice of the backend.

They run in backward passes only and are opaque to the compiler: group ranges are data, so a graph
is traced once for all batches. Results that are not wanted are empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bvpo_kernels import backends
from bvpo_kernels.backends.eager import grad_stats as eager
from bvpo_kernels.call import PLAN, Plan, cut
from bvpo_kernels.ops.head import kept, record, tied_rows
from bvpo_kernels.ops.library import define

# What is kept of gradients is multiplied outside of operators, as their tiles are inside.
inner_products = eager.inner_products
_REDUCE: dict[str, Any] = {"eager": eager.pair_reduce, "cpp": torch.ops.bvpo.cpu_pair_reduce}
if not backends.MISSING["triton"]:  # importing these modules needs triton
    from bvpo_kernels.backends import cuda
    from bvpo_kernels.backends.triton import grad_stats as triton_reduce

    _REDUCE |= {"triton": triton_reduce.pair_reduce, "cuda": cuda.pair_reduce}

# On an H200: 98 % of a copy's bandwidth with dW in bf16, Triton's 79 %; equal in fp32.
_REDUCE_PREFERENCE = ("cuda", "triton", "cpp", "eager")
_COMPILED_DTYPES = (torch.float32, torch.bfloat16)


def _compiled(*tensors: Tensor) -> bool:
    """Whether the C++ passes over group gradients serve these tensors."""
    served = all(t.device.type == "cpu" and t.dtype in _COMPILED_DTYPES for t in tensors)
    return served and not backends.MISSING["cpp"]


def _cannot_reduce(name: str, tiles: Tensor, total: Tensor) -> str:
    """Why a backend that is installed cannot serve this `pair_reduce`; '' when it can."""
    device, count = tiles.device.type, tiles.shape[0]
    if name == "reference":
        return "it has no pair_reduce"
    if name == "cpp" and not _compiled(tiles, total):
        return "it serves CPU tensors in fp32 and bf16"
    if name in ("cuda", "triton"):
        served = device == "cuda" or (name == "triton" and backends.INTERPRETED)
        if not served:
            return f"it serves CUDA tensors, got {device}"
        if torch.float64 in (tiles.dtype, total.dtype):
            return "it serves bf16, fp16 and fp32, got torch.float64"
    if name == "triton" and count > triton_reduce.MAX_TILES:
        return f"it serves at most {triton_reduce.MAX_TILES} tiles, got {count}"
    if name == "cuda" and (count != 2 or torch.float16 in (tiles.dtype, total.dtype)):
        return f"it serves two tiles in fp32 or bf16, got {count} in {tiles.dtype}"
    return ""


def _reduce(
    tiles: Tensor,
    total: Tensor,
    weights: Tensor | None = None,
    add: bool = False,
    impl: str = "auto",
) -> Tensor:
    """total = sum_k w_k A_k of K tiles [K, R, D] (weights None: 1; add: added to what it holds),
    in fp32 (fp64 for fp64), rounded once; returns the Gram matrix <A_k, A_l> [K, K] in fp64. Two
    kinds of a unit give |g_t|^2, |g_e|^2 and <g_t, g_e>. The total may be tiles[0]."""
    chosen = backends.choose(
        impl, lambda name: _cannot_reduce(name, tiles, total), _REDUCE_PREFERENCE
    )
    return _REDUCE[chosen](tiles, total, weights, add)


def _reduce_fake(tiles, total, weights=None, add=False, impl="auto"):
    return tiles.new_empty((tiles.shape[0], tiles.shape[0]), dtype=torch.float64)


def _linear(*args: Any) -> tuple[Tensor, ...]:
    dy, x, need_weight, need_bias, rows, plan, layer = cut(
        args, Tensor, Tensor, bool, bool, Tensor, Plan, int
    )
    with torch.autocast(x.device.type, enabled=False):
        return eager.linear_backward(dy, x, need_weight, need_bias, rows, plan, layer)


def _linear_fake(*args: Any) -> tuple[Tensor, ...]:
    dy, x, need_weight, need_bias, rows, plan, _ = cut(
        args, Tensor, Tensor, bool, bool, Tensor, Plan, int
    )
    shape = (dy.shape[1], x.shape[1])
    return (
        x.new_empty(shape if need_weight else 0),
        dy.new_empty(shape[:1] if need_bias else 0),
        record(plan, x),
        kept(plan, shape, x, need_weight),
        kept(plan, shape[:1], dy, need_bias),
        tied_rows(plan, rows if need_weight and plan.exact else None, x),
    )


def _embedding(*args: Any) -> tuple[Tensor, ...]:
    dy, ids, rows, drows, vocab, padding, plan, layer = cut(
        args, Tensor, Tensor, Tensor, Tensor, int, int, Plan, int
    )
    with torch.autocast(dy.device.type, enabled=False):
        return eager.embedding_backward(dy, ids, (rows, drows), (vocab, padding), plan, layer)


def _embedding_fake(*args: Any) -> tuple[Tensor, ...]:
    dy, _, _, _, vocab, _, plan, _ = cut(args, Tensor, Tensor, Tensor, Tensor, int, int, Plan, int)
    shape = (vocab, dy.shape[1])
    return dy.new_empty(shape), record(plan, dy), kept(plan, shape, dy)


def _norm(*args: Any) -> tuple[Tensor, ...]:
    dy, x, form, plan, layer = cut(args, Tensor, Tensor, eager.NormForm, Plan, int)
    if dy.dtype != x.dtype:  # under autocast
        dtype = torch.promote_types(dy.dtype, x.dtype)
        dy, x = dy.to(dtype), x.to(dtype)
    sums = torch.ops.bvpo.cpu_norm_sums if _compiled(dy, x) else eager.norm_sums
    return eager.norm_statistics(dy, x, form, plan, layer, sums)


def _norm_fake(*args: Any) -> tuple[Tensor, ...]:
    _, x, form, plan, _ = cut(args, Tensor, Tensor, eager.NormForm, Plan, int)
    shape = (x.shape[1],)
    wanted = (form.need_weight, form.need_bias)
    return record(plan, x), *(kept(plan, shape, x, need) for need in wanted)


pair_reduce = define(
    "pair_reduce(Tensor tiles, Tensor(a!) total, Tensor? weights=None, bool add=False, "
    'str impl="auto") -> Tensor gram',
    _reduce,
    _reduce_fake,
)
grouped_linear_backward = define(
    "grouped_linear_backward(Tensor dy, Tensor x, bool need_weight, bool need_bias, Tensor? rows, "
    f"{PLAN}) -> (Tensor dweight, Tensor dbias, Tensor record, Tensor kept_weight, "
    "Tensor kept_bias, Tensor drows)",
    _linear,
    _linear_fake,
)
grouped_embedding_backward = define(
    "grouped_embedding_backward(Tensor dy, Tensor ids, Tensor? rows, Tensor? drows, "
    f"SymInt vocab, int padding_idx, {PLAN}) -> (Tensor dweight, Tensor record, Tensor kept)",
    _embedding,
    _embedding_fake,
)
grouped_norm_statistics = define(
    "grouped_norm_statistics(Tensor dy, Tensor x, float eps, bool centered, bool need_weight, "
    f"bool need_bias, {PLAN}) -> (Tensor record, Tensor kept_weight, Tensor kept_bias)",
    _norm,
    _norm_fake,
)
