"""Operator schemas, fakes and autograd formulas; the kernels stand behind the dispatcher.

The public functions validate and choose; an op receives a choice (`impl`, which gradients are
needed) and runs it. Each op allocates its outputs, mutates nothing and is safe under fake tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bvpo_kernels import checks, compiled
from bvpo_kernels.eager import logprobs as eager_logprobs
from bvpo_kernels.eager import packing as eager_packing

LIB = torch.library.Library("bvpo", "DEF")

LIB.define(
    "linear_logprobs_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
    "float temperature, float? softcap, int ignore_index, int workspace_bytes, bool need_entropy, "
    "bool need_unit_grad, str impl) -> (Tensor logprobs, Tensor max, Tensor logsum, "
    "Tensor entropy, Tensor unit_grad)"
)
LIB.define(
    "linear_logprobs_backward(Tensor dlogprobs, Tensor hidden, Tensor weight, Tensor target, "
    "Tensor? bias, Tensor logprobs, Tensor max, Tensor logsum, float temperature, float? softcap, "
    "int ignore_index, int workspace_bytes, bool need_hidden, bool need_weight, bool need_bias, "
    "str impl) -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
LIB.define("segment_sum(Tensor values, Tensor cu_seqlens) -> Tensor")

_LOGPROBS = {"eager": eager_logprobs}
if not compiled.why_missing("cpu"):
    from bvpo_kernels.compiled import logprobs as cpp_logprobs

    _LOGPROBS["cpp"] = cpp_logprobs


def _check_target_values(target_T: Tensor, vocab: int, ignore_index: int) -> None:
    """Targets must lie in [0, V) or be `ignore_index`; on a GPU the check stays on the device."""
    valid_T = ((target_T >= 0) & (target_T < vocab)) | (target_T == ignore_index)
    if target_T.is_cuda:
        torch._assert_async(valid_T.all())
    elif not bool(valid_T.all()):
        bad = int(target_T[~valid_T][0])
        raise ValueError(
            f"target: expected values in [0, {vocab}) or ignore_index={ignore_index}, got {bad}"
        )


def _scored_rows(target_T: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows to compute; None means all of them.

    Ignored rows are compacted away where that needs no host synchronisation; on a GPU they run
    through the GEMM with a placeholder target and their results are masked.
    """
    if target_T.is_cuda:
        return None
    scored_T = target_T != ignore_index
    return None if bool(scored_T.all()) else scored_T.nonzero()[:, 0]


def _expand(values: Tensor, rows: Tensor | None, num_tokens: int) -> Tensor:
    if rows is None:
        return values
    full = values.new_zeros((num_tokens, *values.shape[1:]))
    return full.index_copy_(0, rows, values)


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
) -> tuple[Tensor, ...]:
    _check_target_values(target, weight.shape[0], ignore_index)
    head = eager_logprobs.Head(weight, bias, temperature, softcap)
    rows = _scored_rows(target, ignore_index)
    hidden_rows = hidden if rows is None else hidden[rows]
    target_rows = target if rows is None else target[rows]
    ignored = target_rows == ignore_index
    target_rows = target_rows.masked_fill(ignored, 0)
    if hidden_rows.shape[0] == 0:
        return _forward_buffers(hidden, need_entropy, need_unit_grad, torch.zeros)
    result = _LOGPROBS[impl].forward(
        hidden_rows, target_rows, head, workspace_bytes, need_entropy, need_unit_grad
    )
    out = [
        hidden.new_empty(0) if value is None else _expand(value, rows, hidden.shape[0])
        for value in result
    ]
    if rows is None and hidden.is_cuda:
        out[0] = out[0].masked_fill(ignored, 0)
        out[3] = out[3].masked_fill(ignored, 0) if need_entropy else out[3]
    return tuple(out)


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
    need_entropy, need_unit_grad, impl,
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
) -> tuple[Tensor, ...]:
    head = eager_logprobs.Head(weight, bias, temperature, softcap)
    rows = _scored_rows(target, ignore_index)
    ignored = target == ignore_index
    inputs = eager_logprobs.BackwardInputs(
        dlogprobs.masked_fill(ignored, 0), hidden, target.masked_fill(ignored, 0),
        logprobs, max, logsum,
    )  # fmt: skip
    if rows is not None:
        inputs = eager_logprobs.BackwardInputs(*(tensor[rows] for tensor in inputs))
    need = (need_hidden, need_weight, need_bias)
    if inputs.hidden_TD.shape[0] == 0:
        return _backward_buffers(hidden, weight, bias, need, torch.zeros)
    dhidden, dweight, dbias = _LOGPROBS[impl].backward(inputs, head, workspace_bytes, need)
    return (
        hidden.new_empty(0) if dhidden is None else _expand(dhidden, rows, hidden.shape[0]),
        weight.new_empty(0) if dweight is None else dweight,
        weight.new_empty(0) if dbias is None else dbias,
    )


def _backward_buffers(
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
    ignore_index, workspace_bytes, need_hidden, need_weight, need_bias, impl,
):  # fmt: skip
    need = (need_hidden, need_weight, need_bias)
    return _backward_buffers(hidden, weight, bias, need, torch.empty)


def _logprobs_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, target, bias = inputs[:4]
    logprobs, max_T, logsum, _, unit_grad = output
    ctx.options = inputs[4:8]
    ctx.unit, ctx.impl = inputs[9], inputs[10]
    if ctx.unit:
        ctx.save_for_backward(unit_grad)
    else:
        ctx.save_for_backward(hidden, weight, target, bias, logprobs, max_T, logsum)


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
            need_hidden, need_weight, need_bias, ctx.impl,
        )  # fmt: skip
        dhidden = grads[0] if need_hidden else None
        dweight = grads[1] if need_weight else None
        dbias = grads[2] if need_bias else None
    return dhidden, dweight, None, dbias, *[None] * 7


torch.library.register_autograd(
    "bvpo::linear_logprobs_forward", _logprobs_autograd, setup_context=_logprobs_setup, lib=LIB
)


@torch.library.impl(LIB, "segment_sum", "CompositeExplicitAutograd")
def _segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    # Here and not in the public function: a graph cannot be traced through checks of values.
    checks.cu_seqlens_values(cu_seqlens, values.shape[0])
    return eager_packing.segment_sum(values, cu_seqlens)


@torch.library.register_fake("bvpo::segment_sum", lib=LIB)
def _segment_sum_fake(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    acc = torch.promote_types(values.dtype, torch.float32)
    return values.new_empty(cu_seqlens.shape[0] - 1, dtype=acc)


def _segment_sum_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    values, cu_seqlens = inputs
    ctx.num_tokens, ctx.dtype = values.shape[0], values.dtype
    ctx.save_for_backward(cu_seqlens)


def _segment_sum_autograd(ctx: Any, dsums: Tensor) -> tuple:
    """Each token receives its segment's gradient: a gather, no sum, hence exact."""
    (cu_seqlens,) = ctx.saved_tensors
    if dsums.shape[0] == 0:
        return dsums.new_zeros(ctx.num_tokens, dtype=ctx.dtype), None
    position_T = torch.arange(ctx.num_tokens, device=dsums.device, dtype=cu_seqlens.dtype)
    segment_T = torch.searchsorted(cu_seqlens[1:].contiguous(), position_T, right=True)
    return dsums[segment_T].to(ctx.dtype), None


torch.library.register_autograd(
    "bvpo::segment_sum", _segment_sum_autograd, setup_context=_segment_sum_setup, lib=LIB
)
