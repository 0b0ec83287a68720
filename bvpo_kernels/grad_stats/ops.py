"""Operators of the gradient statistics: schemas, fakes, and the choice of the backend.

They run in backward passes only and are opaque to the compiler: group ranges are data, so a graph
is traced once for all batches. Results that are not wanted are empty. The last seven arguments but
one are a `Plan`; `layer` indexes the record.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bvpo_kernels import backends
from bvpo_kernels.compiled import head_stats as compiled_head_stats
from bvpo_kernels.eager import grad_stats as eager
from bvpo_kernels.eager import head_stats
from bvpo_kernels.eager.grad_stats import Plan, kept_shape
from bvpo_kernels.eager.logprobs import accumulate_dtype
from bvpo_kernels.ops import LIB

_REDUCE: dict[str, Any] = {"eager": eager.pair_reduce}
_HEAD: dict[str, Any] = {"cpp": compiled_head_stats.backward}
if not backends.MISSING["triton"]:  # importing these modules needs triton
    from bvpo_kernels.gpu import cuda_kernels
    from bvpo_kernels.gpu import logprobs as gpu_logprobs
    from bvpo_kernels.kernels import grad_stats as triton_reduce

    _REDUCE |= {"triton": triton_reduce.pair_reduce, "cuda": cuda_kernels.pair_reduce}
    _HEAD |= dict.fromkeys(
        ("triton", "cuda"), functools.partial(head_stats.backward, dlogits=gpu_logprobs.dlogits)
    )

# On an H200: 98 % of a copy's bandwidth with dW in bf16, Triton's 79 %; equal in fp32.
_REDUCE_PREFERENCE = ("cuda", "triton", "cpp", "eager")
_COMPILED_DTYPES = (torch.float32, torch.bfloat16)
_PLAN = (
    "Tensor ranges, Tensor kinds, Tensor seed, int num_layers, bool exact, int sketch, "
    "int num_kinds, int layer"
)
LIB.define(
    "pair_reduce(Tensor tiles, Tensor(a!) total, Tensor? weights=None, bool add=False, "
    'str impl="auto") -> Tensor gram'
)
LIB.define(
    "grouped_linear_backward(Tensor dy, Tensor x, bool need_weight, bool need_bias, Tensor? rows, "
    f"{_PLAN}) -> (Tensor dweight, Tensor dbias, Tensor record, Tensor kept_weight, "
    "Tensor kept_bias, Tensor drows)"
)
LIB.define(
    "grouped_embedding_backward(Tensor dy, Tensor ids, Tensor? rows, Tensor? drows, "
    f"SymInt vocab, int padding_idx, {_PLAN}) -> (Tensor dweight, Tensor record, Tensor kept)"
)
LIB.define(
    "grouped_norm_statistics(Tensor dy, Tensor x, float eps, bool centered, bool need_weight, "
    f"bool need_bias, {_PLAN}) -> (Tensor record, Tensor kept_weight, Tensor kept_bias)"
)
LIB.define(
    "linear_logprobs_statistics(Tensor dlogprobs, Tensor hidden, Tensor weight, Tensor target, "
    "Tensor? bias, Tensor logprobs, Tensor max, Tensor logsum, float temperature, float? softcap, "
    "int ignore_index, int workspace_bytes, str impl, bool need_hidden, bool need_weight, "
    f"bool need_bias, Tensor? rows, {_PLAN}) -> (Tensor dhidden, Tensor dweight, Tensor dbias, "
    "Tensor record, Tensor kept_weight, Tensor kept_bias, Tensor drows)"
)

# Implemented in csrc/cpu, for fp32 and bf16.
LIB.define("cpu_pair_reduce(Tensor tiles, Tensor(a!) total) -> Tensor gram")
LIB.define(
    "cpu_norm_sums(Tensor dy, Tensor x, Tensor ranges, float eps, bool centered, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor)"
)
LIB.define(
    "cpu_linear_logprobs_statistics(Tensor dlogprobs, Tensor hidden, Tensor weight, "
    "Tensor target, Tensor? bias, Tensor logprobs, Tensor max, Tensor logsum, float temperature, "
    "float? softcap, int ignore_index, int workspace_bytes, bool need_hidden, bool need_weight, "
    "bool need_bias, Tensor? ranges, Tensor? kinds, int num_kinds, Tensor? rows, Tensor? left) -> "
    "(Tensor dhidden, Tensor dweight, Tensor dbias, Tensor gram, Tensor kinds, Tensor rows, "
    "Tensor sketched)"
)


def _compiled(*tensors: Tensor) -> bool:
    """Whether the C++ passes over group gradients serve these tensors."""
    served = all(t.device.type == "cpu" and t.dtype in _COMPILED_DTYPES for t in tensors)
    return served and not backends.MISSING["cpp"]


def _record(plan: Plan, like: Tensor) -> Tensor:
    size = plan.ranges_G2.shape[0] ** 2 + plan.num_layers
    return like.new_empty(size, dtype=torch.float64)


def _kept(plan: Plan, shape: tuple[Any, ...], like: Tensor, needed: bool = True) -> Tensor:
    dtype = accumulate_dtype(like.dtype)
    if not needed or not (plan.sketch or plan.num_kinds):
        return like.new_empty(0, dtype=dtype)
    return like.new_empty(kept_shape(plan, shape), dtype=dtype)


def _rows(plan: Plan, rows: Tensor | None, like: Tensor) -> Tensor:
    if rows is None:
        return like.new_empty(0, dtype=accumulate_dtype(like.dtype))
    shape = (plan.ranges_G2.shape[0], rows.shape[0], like.shape[1])
    return like.new_empty(shape, dtype=accumulate_dtype(like.dtype))


def _cannot_reduce(name: str, tiles: Tensor, total: Tensor, plain: bool) -> str:
    """Why a backend that is installed cannot serve this `pair_reduce`; '' when it can."""
    device, count = tiles.device.type, tiles.shape[0]
    if name == "reference":
        return "it has no pair_reduce"
    if name == "cpp" and not (plain and _compiled(tiles, total)):
        return "it serves CPU tensors in fp32 and bf16, without weights, into a new sum"
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


@torch.library.impl(LIB, "pair_reduce", "CompositeExplicitAutograd")
def _pair_reduce(
    tiles: Tensor, total: Tensor, weights: Tensor | None = None, add: bool = False,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """total = sum_k w_k A_k of K tiles [K, R, D] (weights None: 1; add: added to what it holds),
    in fp32 (fp64 for fp64), rounded once; returns the Gram matrix <A_k, A_l> [K, K] in fp64. Two
    kinds of a unit give |g_t|^2, |g_e|^2 and <g_t, g_e>."""
    plain = weights is None and not add
    chosen = backends.choose(
        impl, lambda name: _cannot_reduce(name, tiles, total, plain), _REDUCE_PREFERENCE
    )
    if chosen == "cpp":
        return torch.ops.bvpo.cpu_pair_reduce(tiles, total)
    return _REDUCE[chosen](tiles, total, weights, add)


@torch.library.register_fake("bvpo::pair_reduce", lib=LIB)
def _pair_reduce_fake(tiles, total, weights=None, add=False, impl="auto"):
    return tiles.new_empty((tiles.shape[0], tiles.shape[0]), dtype=torch.float64)


@torch.library.impl(LIB, "grouped_linear_backward", "CompositeExplicitAutograd")
def _linear(dy, x, need_weight, need_bias, rows, *plan_and_layer):
    *plan, layer = plan_and_layer
    with torch.autocast(x.device.type, enabled=False):
        return eager.linear_backward(dy, x, need_weight, need_bias, rows, Plan(*plan), layer)


@torch.library.register_fake("bvpo::grouped_linear_backward", lib=LIB)
def _linear_fake(dy, x, need_weight, need_bias, rows, *plan_and_layer):
    plan = Plan(*plan_and_layer[:-1])
    shape = (dy.shape[1], x.shape[1])
    return (
        x.new_empty(shape if need_weight else 0),
        dy.new_empty(shape[:1] if need_bias else 0),
        _record(plan, x),
        _kept(plan, shape, x, need_weight),
        _kept(plan, shape[:1], dy, need_bias),
        _rows(plan, rows if need_weight and plan.exact else None, x),
    )


@torch.library.impl(LIB, "grouped_embedding_backward", "CompositeExplicitAutograd")
def _embedding(dy, ids, rows, drows, vocab, padding_idx, *plan_and_layer):
    *plan, layer = plan_and_layer
    with torch.autocast(dy.device.type, enabled=False):
        return eager.embedding_backward(
            dy, ids, rows, drows, vocab, padding_idx, Plan(*plan), layer
        )


@torch.library.register_fake("bvpo::grouped_embedding_backward", lib=LIB)
def _embedding_fake(dy, ids, rows, drows, vocab, padding_idx, *plan_and_layer):
    plan, shape = Plan(*plan_and_layer[:-1]), (vocab, dy.shape[1])
    return dy.new_empty(shape), _record(plan, dy), _kept(plan, shape, dy)


@torch.library.impl(LIB, "grouped_norm_statistics", "CompositeExplicitAutograd")
def _norm(dy, x, eps, centered, need_weight, need_bias, *plan_and_layer):
    *plan, layer = plan_and_layer
    if dy.dtype != x.dtype:  # under autocast
        dtype = torch.promote_types(dy.dtype, x.dtype)
        dy, x = dy.to(dtype), x.to(dtype)
    sums = torch.ops.bvpo.cpu_norm_sums if _compiled(dy, x) else eager.norm_sums
    return eager.norm_statistics(
        dy, x, eps, centered, need_weight, need_bias, Plan(*plan), layer, sums
    )


@torch.library.register_fake("bvpo::grouped_norm_statistics", lib=LIB)
def _norm_fake(dy, x, eps, centered, need_weight, need_bias, *plan_and_layer):
    plan, shape = Plan(*plan_and_layer[:-1]), (x.shape[1],)
    kept = (_kept(plan, shape, x, need) for need in (need_weight, need_bias))
    return _record(plan, x), *kept


@torch.library.impl(LIB, "linear_logprobs_statistics", "CompositeExplicitAutograd")
def _head(*arguments):
    *call, impl = arguments[:13]
    *plan, layer = arguments[17:]
    backward = _HEAD.get(impl, head_stats.backward)
    with torch.autocast(arguments[1].device.type, enabled=False):
        return backward(*call, *arguments[13:17], Plan(*plan), layer)


@torch.library.register_fake("bvpo::linear_logprobs_statistics", lib=LIB)
def _head_fake(
    dlogprobs, hidden, weight, target, bias, logprobs, max, logsum, temperature, softcap,
    ignore_index, workspace_bytes, impl, need_hidden, need_weight, need_bias, rows,
    *plan_and_layer,
):  # fmt: skip
    plan, shape = Plan(*plan_and_layer[:-1]), tuple(weight.shape)
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(shape if need_weight else 0),
        weight.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
        _record(plan, hidden),
        _kept(plan, shape, hidden, need_weight),
        _kept(plan, shape[:1], hidden, need_bias),
        _rows(plan, rows if need_weight and plan.exact else None, hidden),
    )
