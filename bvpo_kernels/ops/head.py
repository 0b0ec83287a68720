"""Operators of the LM head: log-probabilities, their gradients, and those with statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bvpo_kernels import backends, checks
from bvpo_kernels.backends import cpp, schedule, sparse, statistics
from bvpo_kernels.backends.eager.engine import TorchEngine
from bvpo_kernels.backends.statistics import Asked
from bvpo_kernels.call import (
    CALL,
    INPUTS,
    KEPT,
    NEED,
    PLAN,
    Call,
    Gradients,
    Inputs,
    Kept,
    Need,
    Plan,
    accumulate_dtype,
    cut,
)
from bvpo_kernels.ops.derivatives import once
from bvpo_kernels.ops.library import define, differentiate


class _Eager:
    """What serves a backend's name. A tolerance permits and does not oblige: exact."""

    engine: Any = TorchEngine

    @classmethod
    def forward(cls, inputs: Inputs, call: Call, unit: bool) -> tuple[Tensor, ...]:
        return schedule.forward(cls.engine(inputs, call), unit)

    @classmethod
    def backward(
        cls, dlogprobs: Tensor, inputs: Inputs, kept: Kept, call: Call, need: Need
    ) -> Gradients:
        return schedule.backward(cls.engine(inputs, call, kept, dlogprobs), need)

    @classmethod
    def head_statistics(
        cls, dlogprobs: Tensor, inputs: Inputs, kept: Kept, call: Call, need: Need, asked: Asked
    ) -> tuple[Tensor, ...]:
        return statistics.backward(dlogprobs, inputs, kept, call, need, asked, cls.engine)


SERVING: dict[str, Any] = {"eager": _Eager, "cpp": cpp}
if not backends.MISSING["triton"]:  # importing these modules needs triton
    from bvpo_kernels.backends.triton import sparse as triton_sparse
    from bvpo_kernels.backends.triton.engine import TritonEngine

    class _Triton(_Eager):
        engine = TritonEngine

        @classmethod
        def forward(cls, inputs: Inputs, call: Call, unit: bool) -> tuple[Tensor, ...]:
            if call.tail_tolerance > 0:
                return triton_sparse.forward(inputs, call)
            return super().forward(inputs, call, unit)

        @classmethod
        def backward(
            cls, dlogprobs: Tensor, inputs: Inputs, kept: Kept, call: Call, need: Need
        ) -> Gradients:
            if call.tail_tolerance > 0:
                return triton_sparse.backward(dlogprobs, inputs, kept, call, need)
            return super().backward(dlogprobs, inputs, kept, call, need)

    SERVING["triton"] = _Triton


def check_targets(inputs: Inputs, call: Call) -> None:
    """Targets lie in [0, V) or are `ignore_index`, and no more rows are scored than was said; on a
    GPU the checks stay on the device."""
    target_T, vocab = inputs.target_T, inputs.weight_VD.shape[0]
    scored_T = target_T != call.ignore_index
    valid_T = ((target_T >= 0) & (target_T < vocab)) | ~scored_T
    checks.require(
        valid_T.all(),
        f"target: expected values in [0, {vocab}) or ignore_index={call.ignore_index}",
        lambda: int(target_T[~valid_T][0]),
    )
    if call.max_scored is not None and call.max_scored < target_T.shape[0]:
        # A bound that is too small would leave rows out.
        checks.require(
            scored_T.sum() <= call.max_scored,
            "max_scored: expected at least as much as there are scored rows",
            lambda: f"{call.max_scored} for {int(scored_T.sum())} rows",
        )


def _forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, call, unit = cut(args, Inputs, Call, bool)
    check_targets(inputs, call)
    return SERVING[call.impl].forward(inputs, call, unit)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, call, unit = cut(args, Inputs, Call, bool)
    hidden, acc = inputs.hidden_TD, accumulate_dtype(inputs.hidden_TD.dtype)
    num_tokens, lists = hidden.shape[0], (0, 0, 0, 0)
    if call.tail_tolerance > 0 and call.impl != "eager":
        longest = sparse.longest_list(inputs.weight_VD.shape[0], call.impl)
        room = sparse.capacity(num_tokens, longest, call.workspace_bytes)
        lists = (num_tokens, num_tokens + 1, room, room)
    dtypes = (acc, torch.int64, torch.int32, acc)
    entropy = hidden.new_empty(num_tokens if call.need_entropy else 0, dtype=acc)
    return (
        *(hidden.new_empty(num_tokens, dtype=acc) for _ in range(3)),
        *(hidden.new_empty(n, dtype=dtype) for n, dtype in zip(lists, dtypes, strict=True)),
        entropy,
        hidden.new_empty(hidden.shape if unit else 0),
    )


def _empty(grads: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradients that are not wanted, as operators must return them: without elements."""
    return tuple(
        inputs.hidden_TD.new_empty(0) if gradient is None else gradient for gradient in grads
    )


def _backward(*args: Any) -> tuple[Tensor, ...]:
    dlogprobs, inputs, kept, call, need = cut(args, Tensor, Inputs, Kept, Call, Need)
    need = need._replace(bias=need.bias and inputs.bias_V is not None)
    return _empty(SERVING[call.impl].backward(dlogprobs, inputs, kept, call, need), inputs)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    _, inputs, _, _, need = cut(args, Tensor, Inputs, Kept, Call, Need)

    def like(tensor: Tensor | None, needed: bool) -> Tensor | None:
        return torch.empty_like(tensor) if needed and tensor is not None else None

    grads = Gradients(
        like(inputs.hidden_TD, need.hidden),
        like(inputs.weight_VD, need.weight),
        like(inputs.bias_V, need.bias),
        like(inputs.low_TR, need.hidden),
        like(inputs.lora_b_VR, True),
    )
    return _empty(grads, inputs)


linear_logprobs_forward = define(
    f"linear_logprobs_forward({INPUTS}, {CALL}, bool need_unit_grad) -> ({KEPT}, Tensor entropy, "
    "Tensor unit_grad)",
    _forward,
    _forward_fake,
)
linear_logprobs_backward = define(
    f"linear_logprobs_backward(Tensor dlogprobs, {INPUTS}, {KEPT}, {CALL}, {NEED}) -> "
    "(Tensor dhidden, Tensor dweight, Tensor dbias, Tensor dlow, Tensor dlora_b)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    given, ctx.call, ctx.unit = cut(inputs, Inputs, Call, bool)
    ctx.num_arguments = len(inputs)
    ctx.save_for_backward(*((output[-1],) if ctx.unit else (*given, *output[: len(Kept._fields)])))
    # Otherwise every backward would fill tensors of zeros, as large as the lists.
    ctx.set_materialize_grads(False)


@once
def _gradients(ctx: Any, dlogprobs: Tensor | None, *_: Tensor | None) -> tuple:
    """Gradients of the log-probabilities only: the other outputs are not differentiable."""
    need = ctx.needs_input_grad
    grads: tuple[Tensor | None, ...] = (None,) * 5
    if dlogprobs is not None and ctx.unit:
        (unit_grad,) = ctx.saved_tensors
        grads = ((unit_grad * dlogprobs[:, None]).to(unit_grad.dtype), *grads[1:])
    elif dlogprobs is not None:
        grads = linear_logprobs_backward(
            dlogprobs, *ctx.saved_tensors, *ctx.call, need[0] or need[4], need[1], need[3]
        )
    dhidden, dweight, dbias, dlow, dlora_b = grads
    wanted = (dhidden, dweight, None, dbias, dlow, dlora_b)
    given = (g if needed else None for g, needed in zip(wanted, need[:6], strict=True))
    return (*given, *[None] * (ctx.num_arguments - 6))


differentiate("linear_logprobs_forward", _gradients, _setup)


def _statistics(*args: Any) -> tuple[Tensor, ...]:
    dlogprobs, inputs, kept, call, need, rows_U, plan, layer = cut(
        args, Tensor, Inputs, Kept, Call, Need, Tensor, Plan, int
    )
    run = SERVING[call.impl].head_statistics
    with torch.autocast(inputs.hidden_TD.device.type, enabled=False):
        return run(dlogprobs, inputs, kept, call, need, Asked(plan, layer, rows_U))


def _statistics_fake(*args: Any) -> tuple[Tensor, ...]:
    _, inputs, _, _, need, rows_U, plan, _ = cut(
        args, Tensor, Inputs, Kept, Call, Need, Tensor, Plan, int
    )
    hidden, weight, _, bias = inputs[:4]
    shape = tuple(weight.shape)
    return (
        hidden.new_empty(hidden.shape if need.hidden else 0),
        weight.new_empty(shape if need.weight else 0),
        weight.new_empty(0) if bias is None or not need.bias else bias.new_empty(bias.shape),
        record(plan, hidden),
        kept(plan, shape, hidden, need.weight),
        kept(plan, shape[:1], hidden, need.bias),
        tied_rows(plan, rows_U if need.weight and plan.exact else None, hidden),
    )


def record(plan: Plan, like: Tensor) -> Tensor:
    size = plan.ranges_G2.shape[0] ** 2 + plan.num_layers
    return like.new_empty(size, dtype=torch.float64)


def kept(plan: Plan, shape: tuple[Any, ...], like: Tensor, needed: bool = True) -> Tensor:
    dtype = accumulate_dtype(like.dtype)
    if not needed or not (plan.sketch or plan.num_kinds):
        return like.new_empty(0, dtype=dtype)
    return like.new_empty(plan.kept_shape(shape), dtype=dtype)


def tied_rows(plan: Plan, rows_U: Tensor | None, like: Tensor) -> Tensor:
    dtype = accumulate_dtype(like.dtype)
    if rows_U is None:
        return like.new_empty(0, dtype=dtype)
    return like.new_empty((plan.ranges_G2.shape[0], rows_U.shape[0], like.shape[1]), dtype=dtype)


linear_logprobs_statistics = define(
    f"linear_logprobs_statistics(Tensor dlogprobs, {INPUTS}, {KEPT}, {CALL}, {NEED}, "
    f"Tensor? rows, {PLAN}) -> (Tensor dhidden, Tensor dweight, Tensor dbias, Tensor record, "
    "Tensor kept_weight, Tensor kept_bias, Tensor drows)",
    _statistics,
    _statistics_fake,
)
