"""Operators of the head's one pass over pairs: gradients formed with the scores, scaled later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bvpo_kernels.backends import cpp, one_pass
from bvpo_kernels.backends.one_pass import EngineFormer, Former, Keeper, Measured
from bvpo_kernels.backends.schedule import ranges
from bvpo_kernels.backends.statistics import Asked
from bvpo_kernels.call import (
    CALL,
    INPUTS,
    NEED,
    PAIRS,
    PLAN,
    Call,
    Inputs,
    Need,
    Pairs,
    Plan,
    accumulate_dtype,
    cut,
)
from bvpo_kernels.ops.derivatives import once
from bvpo_kernels.ops.head import SERVING, check_targets, kept, tied_rows
from bvpo_kernels.ops.library import define, differentiate

# Elements that a scaling converts at a time: where its result is narrower than what it multiplies,
# torch makes a copy as wide on a CPU.
_SCALED_ELEMENTS = 1 << 24


def _scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """values * factor, 0-dim or by row, rounded once."""
    result = torch.empty_like(values, dtype=dtype)
    rows = values.shape[0] if values.ndim > 1 else 1
    step = max(_SCALED_ELEMENTS // max(values.numel() // max(rows, 1), 1), 1)
    for part in ranges(values.shape[0], step if values.ndim > 1 else _SCALED_ELEMENTS):
        by_row = factor[part].view(-1, *[1] * (values.ndim - 1)) if factor.ndim else factor
        torch.mul(values[part], by_row, out=result[part])
    return result


scaled = define(
    "scaled(Tensor values, Tensor factor, ScalarType dtype) -> Tensor",
    _scaled,
    lambda values, factor, dtype: torch.empty_like(values, dtype=dtype),
)


def _run(
    inputs: Inputs, call: Call, pairs: Pairs, need: Need, asked: Asked | None
) -> tuple[tuple[Tensor, ...], Measured | None]:
    check_targets(inputs, call)
    need = need._replace(bias=need.bias and inputs.bias_V is not None)
    factor_T, scale_P = one_pass.factor_tokens(pairs, inputs.target_T.shape[0])
    count = len(pairs.scored_P)
    with torch.autocast(inputs.hidden_TD.device.type, enabled=False):
        width, weight_VD = one_pass.trained_width(inputs, need), inputs.weight_VD
        tile = one_pass.tile_bytes(len(weight_VD), width, weight_VD.dtype)
        room = call.workspace_bytes - one_pass.num_tiles(count, asked) * tile
        keeper = None if asked is None else Keeper(inputs, count, need, asked)
        former: Former
        if call.impl == "cpp":
            former = cpp.PairFormer(inputs, call, pairs, factor_T, need, room)
        else:
            engine = SERVING[call.impl].engine(inputs, call)
            former = EngineFormer(engine, inputs, pairs, factor_T, need, room)
        formed, measured = one_pass.run(former, inputs, pairs, scale_P, need, keeper)
    loss = formed.scores_S.new_zeros(())
    return (loss, *formed), measured


def run_pairs(*args: Any) -> tuple[Tensor, ...]:
    inputs, call, pairs, need = cut(args, Inputs, Call, Pairs, Need)
    return _run(inputs, call, pairs, need, None)[0]


def _pair_loss_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, _, pairs, need = cut(args, Inputs, Call, Pairs, Need)
    hidden, weight_VD = inputs.hidden_TD, inputs.weight_VD
    vocab, dim = weight_VD.shape
    rank = 0 if inputs.lora_b_VR is None else inputs.lora_b_VR.shape[1]
    width = one_pass.trained_width(inputs, need)
    acc = accumulate_dtype(hidden.dtype)

    def new(*shape: Any) -> Tensor:
        return hidden.new_empty(shape, dtype=acc)

    return (
        new(),
        new(pairs.cu_seqlens.shape[0] - 1),
        hidden.new_empty(pairs.scored_P.shape[0], dtype=torch.float64),
        hidden.new_empty((hidden.shape[0], dim + rank) if need.hidden else 0),
        new(vocab, width) if width else new(0),
        new(vocab if need.bias and inputs.bias_V is not None else 0),
    )


_FORMED = "Tensor loss, Tensor scores, Tensor slope, Tensor unit, Tensor total, Tensor dbias"
linear_pair_loss = define(
    f"linear_pair_loss({INPUTS}, {CALL}, {PAIRS}, {NEED}) -> ({_FORMED})",
    run_pairs,
    _pair_loss_fake,
)


def gradients(
    dloss: Tensor, cu_seqlens: Tensor, formed: tuple[Tensor, ...], like: tuple, need: Need
) -> tuple[Tensor | None, ...]:
    """Of `Inputs`, each rounded once more at most: dloss times what was formed.

    formed: slope, unit, total, dbias. like: dim, and dtypes of weight, bias and B.
    """
    slope_P, unit_TE, total_VE, dbias_V = formed
    dim, weight_dtype, bias_dtype, lora_dtype = like
    dhidden = dlow = dweight = dlora_b = dbias = None
    if need.hidden:
        slope_S = (dloss * slope_P).to(dloss.dtype).repeat_interleave(2)
        slope_T = one_pass.spread(slope_S, cu_seqlens, unit_TE.shape[0])
        unit_TE = scaled(unit_TE, slope_T, unit_TE.dtype)
        dhidden = unit_TE[:, :dim].contiguous()
        dlow = unit_TE[:, dim:].contiguous() if lora_dtype is not None else None
    first = dim if need.weight else 0
    if need.weight:
        dweight = scaled(total_VE[:, :first], dloss, weight_dtype)
    if lora_dtype is not None:
        dlora_b = scaled(total_VE[:, first:], dloss, lora_dtype)
    if need.bias and bias_dtype is not None:
        dbias = scaled(dbias_V, dloss, bias_dtype)
    return dhidden, dweight, None, dbias, dlow, dlora_b


def shapes_of(inputs: Inputs) -> tuple:
    """What `gradients` must know of the inputs."""
    others = (None if t is None else t.dtype for t in (inputs.bias_V, inputs.lora_b_VR))
    return (inputs.weight_VD.shape[1], inputs.weight_VD.dtype, *others)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    given, _, pairs, ctx.need = cut(inputs, Inputs, Call, Pairs, Need)
    ctx.like, ctx.num_arguments = shapes_of(given), len(inputs)
    ctx.save_for_backward(pairs.cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


@once
def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple:
    """Of the loss only: scores are not differentiable here."""
    if dloss is None:
        return (None,) * ctx.num_arguments
    cu_seqlens, *formed = ctx.saved_tensors
    grads = gradients(dloss, cu_seqlens, tuple(formed), ctx.like, ctx.need)
    wanted = ctx.needs_input_grad
    given = (g if needed else None for g, needed in zip(grads, wanted[:6], strict=True))
    return (*given, *[None] * (ctx.num_arguments - 6))


differentiate("linear_pair_loss", _backward, _setup)


def _measured(*args: Any) -> tuple[Tensor, ...]:
    inputs, call, pairs, need, rows_U, plan, layer = cut(
        args, Inputs, Call, Pairs, Need, Tensor, Plan, int
    )
    formed, measured = _run(inputs, call, pairs, need, Asked(plan, layer, rows_U))
    assert measured is not None
    return *formed, *measured


def _measured_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, call, pairs, need, rows_U, plan, _ = cut(
        args, Inputs, Call, Pairs, Need, Tensor, Plan, int
    )
    hidden, shape = inputs.hidden_TD, tuple(inputs.weight_VD.shape)
    groups = plan.ranges_G2.shape[0]
    has_bias = need.bias and inputs.bias_V is not None
    return (
        *_pair_loss_fake(*inputs, *call, *pairs, *need),
        hidden.new_empty((groups, groups), dtype=torch.float64),
        kept(plan, shape, hidden, need.weight),
        kept(plan, shape[:1], hidden, has_bias),
        tied_rows(plan, rows_U if need.weight and plan.exact else None, hidden),
    )


linear_pair_loss_statistics = define(
    f"linear_pair_loss_statistics({INPUTS}, {CALL}, {PAIRS}, {NEED}, Tensor? rows, {PLAN}) -> "
    f"({_FORMED}, Tensor gram, Tensor kept_weight, Tensor kept_bias, Tensor drows)",
    _measured,
    _measured_fake,
)
