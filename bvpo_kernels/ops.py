"""Operator schemas, fakes and autograd formulas; the kernels stand behind the dispatcher.

The public functions validate and choose; an op receives a choice (`impl`, which gradients are
needed) and runs it. Each op allocates its outputs, mutates nothing and is safe under fake tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bvpo_kernels import backends, checks
from bvpo_kernels.derivatives import once
from bvpo_kernels.eager import logprobs as eager_logprobs
from bvpo_kernels.eager import packing as eager_packing

LIB = torch.library.Library("bvpo", "DEF")

LIB.define(
    "linear_logprobs_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
    "float temperature, float? softcap, int ignore_index, int workspace_bytes, bool need_entropy, "
    "bool need_unit_grad, str impl, SymInt? max_scored=None) -> (Tensor logprobs, Tensor max, "
    "Tensor logsum, Tensor entropy, Tensor unit_grad)"
)
LIB.define(
    "linear_logprobs_backward(Tensor dlogprobs, Tensor hidden, Tensor weight, Tensor target, "
    "Tensor? bias, Tensor logprobs, Tensor max, Tensor logsum, float temperature, float? softcap, "
    "int ignore_index, int workspace_bytes, bool need_hidden, bool need_weight, bool need_bias, "
    "str impl, SymInt? max_scored=None) -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
LIB.define("segment_sum(Tensor values, Tensor cu_seqlens, str impl) -> Tensor")
LIB.define(
    "segment_spread(Tensor dsums, Tensor cu_seqlens, int num_tokens, ScalarType dtype, str impl) "
    "-> Tensor"
)

# Implemented in csrc/cpu; the same arguments up to `impl`.
LIB.define(
    "cpu_linear_logprobs_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
    "float temperature, float? softcap, int ignore_index, int workspace_bytes, bool need_entropy, "
    "bool need_unit_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIB.define(
    "cpu_linear_logprobs_backward(Tensor dlogprobs, Tensor hidden, Tensor weight, Tensor target, "
    "Tensor? bias, Tensor logprobs, Tensor max, Tensor logsum, float temperature, float? softcap, "
    "int ignore_index, int workspace_bytes, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)"
)
LIB.define("cpu_path(ScalarType dtype) -> str")

# Implemented in csrc/cuda, called by gpu/cuda_kernels.py. `p` and `dz` may lie over `z`.
LIB.define(
    "cuda_rows_forward(Tensor z, Tensor(a!)? p, Tensor? bias, Tensor target, Tensor count, "
    "Tensor(b!) state, int row_start, int column_start, float softcap, float inv_temperature, "
    "bool entropy) -> ()"
)
LIB.define(
    "cuda_rows_backward(Tensor z, Tensor(a!) dz, Tensor? bias, Tensor target, Tensor count, "
    "Tensor upstream, Tensor coefficient, Tensor max, Tensor logsum, int row_start, "
    "int column_start, float softcap, float inv_temperature) -> ()"
)
LIB.define(
    "cuda_pair_reduce(Tensor tiles, Tensor? weights, Tensor(a!) total, bool add, "
    "Tensor(b!) partials) -> ()"
)


class _Implementation(NamedTuple):
    """What serves `linear_logprobs`: the two ops' arguments up to `impl`, the same results.

    bounded: it takes `max_scored` as well; the others count the scored rows, or compute all.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    bounded: bool = False

    def bound(self, max_scored: int | None) -> dict[str, int | None]:
        return {"max_scored": max_scored} if self.bounded else {}


_LOGPROBS = {
    "eager": _Implementation(eager_logprobs.forward, eager_logprobs.backward),
    "cpp": _Implementation(
        torch.ops.bvpo.cpu_linear_logprobs_forward, torch.ops.bvpo.cpu_linear_logprobs_backward
    ),
}
_SEGMENT_SUM = {"eager": (eager_packing.segment_sum, eager_packing.segment_spread)}

if not backends.MISSING["triton"]:  # importing these modules needs triton
    from bvpo_kernels.gpu import cuda_kernels
    from bvpo_kernels.gpu import logprobs as gpu_logprobs
    from bvpo_kernels.kernels import logprobs as triton_kernels
    from bvpo_kernels.kernels import packing as triton_packing

    for _name, _module in (("triton", triton_kernels), ("cuda", cuda_kernels)):
        _kernels = gpu_logprobs.RowKernels(_module.forward_rows, _module.backward_rows)
        _LOGPROBS[_name] = _Implementation(
            functools.partial(gpu_logprobs.forward, kernels=_kernels),
            functools.partial(gpu_logprobs.backward, kernels=_kernels),
            bounded=True,
        )
    _SEGMENT_SUM["triton"] = (triton_packing.segment_sum, triton_packing.segment_spread)


def check_target_values(target_T: Tensor, vocab: int, ignore_index: int) -> None:
    """Targets must lie in [0, V) or be `ignore_index`; on a GPU the check stays on the device."""
    valid_T = ((target_T >= 0) & (target_T < vocab)) | (target_T == ignore_index)
    if target_T.is_cuda:
        torch._assert_async(valid_T.all())
    elif not bool(valid_T.all()):
        bad = int(target_T[~valid_T][0])
        raise ValueError(
            f"target: expected values in [0, {vocab}) or ignore_index={ignore_index}, got {bad}"
        )


def _check_max_scored(target_T: Tensor, ignore_index: int, max_scored: int | None) -> None:
    """A bound that is too small would leave rows out; on a GPU the check stays on the device."""
    if max_scored is None or max_scored >= target_T.shape[0]:
        return
    scored = (target_T != ignore_index).sum()
    checks.require(
        scored <= max_scored, "max_scored: expected at least as much as there are scored rows",
        lambda: f"{max_scored} for {int(scored)} rows",
    )  # fmt: skip


@torch.library.impl(LIB, "linear_logprobs_forward", "CompositeExplicitAutograd")
def _logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int,
    need_entropy: bool,
    need_unit_grad: bool,
    impl: str,
    max_scored: int | None = None,
) -> tuple[Tensor, ...]:
    check_target_values(target, weight.shape[0], ignore_index)
    _check_max_scored(target, ignore_index, max_scored)
    chosen = _LOGPROBS[impl]
    return chosen.forward(
        hidden, weight, target, bias, temperature, softcap, ignore_index, workspace_bytes,
        need_entropy, need_unit_grad, **chosen.bound(max_scored),
    )  # fmt: skip


def _forward_buffers(hidden: Tensor, entropy: bool, unit: bool, make: Any) -> tuple[Tensor, ...]:
    acc = torch.promote_types(hidden.dtype, torch.float32)
    num_tokens, device = hidden.shape[0], hidden.device
    vectors = [make(num_tokens, dtype=acc, device=device) for _ in range(3)]
    entropy_T = make(num_tokens if entropy else 0, dtype=acc if entropy else hidden.dtype,
                     device=device)  # fmt: skip
    unit_TD = make(hidden.shape if unit else 0, dtype=hidden.dtype, device=device)
    return (*vectors, entropy_T, unit_TD)


@torch.library.register_fake("bvpo::linear_logprobs_forward", lib=LIB)
def _logprobs_forward_fake(
    hidden, weight, target, bias, temperature, softcap, ignore_index, workspace_bytes,
    need_entropy, need_unit_grad, impl, max_scored=None,
):  # fmt: skip
    return _forward_buffers(hidden, need_entropy, need_unit_grad, torch.empty)


@torch.library.impl(LIB, "linear_logprobs_backward", "CompositeExplicitAutograd")
def _logprobs_backward(
    dlogprobs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logprobs: Tensor,
    max: Tensor,
    logsum: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
    max_scored: int | None = None,
) -> tuple[Tensor, ...]:
    chosen = _LOGPROBS[impl]
    return chosen.backward(
        dlogprobs, hidden, weight, target, bias, logprobs, max, logsum, temperature, softcap,
        ignore_index, workspace_bytes, need_hidden, need_weight, need_bias,
        **chosen.bound(max_scored),
    )  # fmt: skip


def backward_buffers(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need: tuple[bool, bool, bool], make: Any
) -> tuple[Tensor, ...]:
    dhidden = make(hidden.shape if need[0] else 0, dtype=hidden.dtype, device=hidden.device)
    dweight = make(weight.shape if need[1] else 0, dtype=weight.dtype, device=weight.device)
    if need[2] and bias is not None:
        return dhidden, dweight, make(bias.shape, dtype=bias.dtype, device=bias.device)
    return dhidden, dweight, make(0, dtype=weight.dtype, device=weight.device)


@torch.library.register_fake("bvpo::linear_logprobs_backward", lib=LIB)
def _logprobs_backward_fake(
    dlogprobs, hidden, weight, target, bias, logprobs, max, logsum, temperature, softcap,
    ignore_index, workspace_bytes, need_hidden, need_weight, need_bias, impl, max_scored=None,
):  # fmt: skip
    need = (need_hidden, need_weight, need_bias)
    return backward_buffers(hidden, weight, bias, need, torch.empty)


def _logprobs_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, target, bias = inputs[:4]
    logprobs, max_T, logsum, _, unit_grad = output
    ctx.options = inputs[4:8]
    ctx.unit, ctx.impl, ctx.max_scored = inputs[9:12]
    if ctx.unit:
        ctx.save_for_backward(unit_grad)
    else:
        ctx.save_for_backward(hidden, weight, target, bias, logprobs, max_T, logsum)


@once
def _logprobs_autograd(ctx: Any, dlogprobs: Tensor, *_: Tensor) -> tuple:
    """Gradients of the log-probabilities only: the other outputs are not differentiable."""
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    dhidden = dweight = dbias = None
    if ctx.unit:
        (unit_grad,) = ctx.saved_tensors
        dhidden = (unit_grad * dlogprobs[:, None]).to(unit_grad.dtype)
    else:
        hidden, weight, target, bias, *kept = ctx.saved_tensors
        grads = torch.ops.bvpo.linear_logprobs_backward(
            dlogprobs, hidden, weight, target, bias, *kept, *ctx.options,
            need_hidden, need_weight, need_bias, ctx.impl, ctx.max_scored,
        )  # fmt: skip
        dhidden = grads[0] if need_hidden else None
        dweight = grads[1] if need_weight else None
        dbias = grads[2] if need_bias else None
    return dhidden, dweight, None, dbias, *[None] * 8


torch.library.register_autograd(
    "bvpo::linear_logprobs_forward", _logprobs_autograd, setup_context=_logprobs_setup, lib=LIB
)


@torch.library.impl(LIB, "segment_sum", "CompositeExplicitAutograd")
def _segment_sum(values: Tensor, cu_seqlens: Tensor, impl: str) -> Tensor:
    # Here and not in the public function: a graph cannot be traced through checks of values.
    checks.cu_seqlens_values(cu_seqlens, values.shape[0])
    return _SEGMENT_SUM[impl][0](values, cu_seqlens)


@torch.library.register_fake("bvpo::segment_sum", lib=LIB)
def _segment_sum_fake(values: Tensor, cu_seqlens: Tensor, impl: str) -> Tensor:
    acc = torch.promote_types(values.dtype, torch.float32)
    return values.new_empty(cu_seqlens.shape[0] - 1, dtype=acc)


@torch.library.impl(LIB, "segment_spread", "CompositeExplicitAutograd")
def _segment_spread(
    dsums: Tensor, cu_seqlens: Tensor, num_tokens: int, dtype: torch.dtype, impl: str
) -> Tensor:
    return _SEGMENT_SUM[impl][1](dsums, cu_seqlens, num_tokens, dtype)


@torch.library.register_fake("bvpo::segment_spread", lib=LIB)
def _segment_spread_fake(
    dsums: Tensor, cu_seqlens: Tensor, num_tokens: int, dtype: torch.dtype, impl: str
) -> Tensor:
    return dsums.new_empty(num_tokens, dtype=dtype)


def _segment_sum_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    values, cu_seqlens, ctx.impl = inputs
    ctx.num_tokens, ctx.dtype = values.shape[0], values.dtype
    ctx.save_for_backward(cu_seqlens)


def _segment_sum_autograd(ctx: Any, dsums: Tensor) -> tuple:
    (cu_seqlens,) = ctx.saved_tensors
    dvalues = torch.ops.bvpo.segment_spread(dsums, cu_seqlens, ctx.num_tokens, ctx.dtype, ctx.impl)
    return dvalues, None, None


def _segment_spread_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dsums, cu_seqlens, _, _, ctx.impl = inputs
    ctx.dtype = dsums.dtype
    ctx.save_for_backward(cu_seqlens)


def _segment_spread_autograd(ctx: Any, dvalues: Tensor) -> tuple:
    (cu_seqlens,) = ctx.saved_tensors
    dsums = torch.ops.bvpo.segment_sum(dvalues, cu_seqlens, ctx.impl)
    return dsums.to(ctx.dtype), None, None, None, None


# Each is the other's transpose, so derivatives of any order are right.
torch.library.register_autograd(
    "bvpo::segment_spread", _segment_spread_autograd, setup_context=_segment_spread_setup, lib=LIB
)
torch.library.register_autograd(
    "bvpo::segment_sum", _segment_sum_autograd, setup_context=_segment_sum_setup, lib=LIB
)
