"""LM-head schedules over [tokens, vocab] tiles in plain torch.

A tile of logits is formed, consumed and dropped, so memory is bounded by `workspace_bytes`
whatever T and V are. The target's column is kept out of the running sum: with
s = sum_{v != y} exp(z_v - m) the log-probability is logsigmoid(z_y - m - log s), which does not
cancel when p_y -> 1, and neither does the target's gradient 1 - p_y = -expm1(logp).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of a tile on CPU. A fp32 tile of this size stays in the last-level cache, so that the
# four row passes over it do not go to memory; the GEMM is still large enough to run at full speed.
CPU_TILE_ELEMENTS = 1 << 20
TOKENS_PER_TILE = 1024
# A sum over the vocabulary is that of tiles, a tile's that of stretches: some BLAS kernels keep one
# chain of additions, however long, where others (for products of another shape, say those of naive
# torch) have blocks. Over V = 49 152 a chain loses nine times as much.
CPU_TILE_COLUMNS = 8192
CPU_STRETCH = 256
# Bytes that one logit costs while a tile is alive: product, fp32 copy, fp32 temporary, downcast.
BYTES_PER_LOGIT = 16


class Head(NamedTuple):
    """The linear head: z = softcap tanh((h W^T + b) / softcap) / temperature."""

    weight_VD: Tensor
    bias_V: Tensor | None
    temperature: float
    softcap: float | None


class ForwardResult(NamedTuple):
    """Per-token results; lse = max_T + logsum_T. `unit_grad_TD` is d logp_t / d hidden_t."""

    logprobs_T: Tensor
    max_T: Tensor
    logsum_T: Tensor
    entropy_T: Tensor | None
    unit_grad_TD: Tensor | None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has a fast CPU product for `dtype`; without oneDNN's, that of two-byte numbers
    runs at the hundredth part of the speed of fp32."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if dtype not in names:
        return True
    name = f"_is_mkldnn_{names[dtype]}_supported"
    return hasattr(torch.ops.mkldnn, name) and getattr(torch.ops.mkldnn, name)()


def mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in the accumulation dtype.

    On CUDA the GEMM writes fp32 directly. CPU torch has no such GEMM for half inputs: where it has
    one at all, the product is rounded to the input dtype once per tile (the error of a naive head),
    then widened; elsewhere the operands are widened.
    """
    out_dtype = accumulate_dtype(left.dtype)
    if left.is_cuda and out_dtype != left.dtype:
        return torch.mm(left, right, out_dtype=out_dtype)
    if left.is_cuda or (out_dtype != left.dtype and cpu_multiplies(left.dtype)):
        return torch.mm(left, right).to(out_dtype)
    total = left.new_zeros(left.shape[0], right.shape[1], dtype=out_dtype)
    for part in ranges(left.shape[1], CPU_STRETCH):
        total.addmm_(left[:, part].to(out_dtype), right[part].to(out_dtype))
    return total


def tile_shape(
    num_tokens: int, vocab: int, device: torch.device, workspace: int
) -> tuple[int, int]:
    """Tokens and vocabulary columns of a tile that fits the workspace."""
    elements = max(workspace // BYTES_PER_LOGIT, 1)
    if device.type == "cpu":
        elements, vocab = min(elements, CPU_TILE_ELEMENTS), min(vocab, CPU_TILE_COLUMNS)
    tokens = max(min(num_tokens, TOKENS_PER_TILE, elements), 1)
    return tokens, max(min(vocab, elements // tokens), 1)


def ranges(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def logits_tile(hidden_TD: Tensor, head: Head, columns: slice) -> tuple[Tensor, Tensor | None]:
    """A tile of final logits and, with a softcap, its derivative factor 1 - tanh^2."""
    z = mm(hidden_TD, head.weight_VD[columns].T)
    if head.bias_V is not None:
        z += head.bias_V[columns]
    slope = None
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = 1 - z * z
        z.mul_(head.softcap)
    return z.div_(head.temperature) if head.temperature != 1.0 else z, slope


def target_column(target_T: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in this tile (mask) and a column index that is valid for all rows."""
    inside_T = (target_T >= columns.start) & (target_T < columns.stop)
    index_T1 = (target_T - columns.start).clamp(0, columns.stop - columns.start - 1)[:, None]
    return inside_T, index_T1


def set_target(tile: Tensor, inside_T: Tensor, index_T1: Tensor, value_T: Tensor) -> Tensor:
    """Overwrite each row's target entry where it is inside the tile; return the old entries."""
    old_T1 = tile.gather(1, index_T1)
    tile.scatter_(1, index_T1, torch.where(inside_T[:, None], value_T[:, None], old_T1))
    return old_T1[:, 0]


def weighted_sum(p: Tensor, z: Tensor) -> Tensor:
    """sum_v p_v z_v of each row, in place over z; a masked column, p = 0 at z = -inf, adds 0."""
    return z.clamp_min_(torch.finfo(z.dtype).min).mul_(p).sum(1)


def p_log_p(logprobs_T: Tensor) -> Tensor:
    """p log p, 0 for p = 0."""
    return logprobs_T.exp() * logprobs_T.clamp_min(torch.finfo(logprobs_T.dtype).min)


def _forward_rows(
    hidden_TD: Tensor, target_T: Tensor, head: Head, vocab_tile: int, entropy: bool, unit: bool
) -> ForwardResult:
    """Online softmax over the vocabulary tiles for one chunk of tokens (all of them scored)."""
    acc = accumulate_dtype(hidden_TD.dtype)
    new: Any = {"dtype": acc, "device": hidden_TD.device}
    num_tokens = hidden_TD.shape[0]
    minus_inf_T = torch.full((num_tokens,), -torch.inf, **new)
    max_T, sum_T = minus_inf_T.clone(), torch.zeros(num_tokens, **new)
    target_z_T, target_slope_T = torch.zeros(num_tokens, **new), torch.ones(num_tokens, **new)
    weighted_z_T = torch.zeros(num_tokens, **new)
    unit_TD = torch.zeros(hidden_TD.shape, **new) if unit else None
    for columns in ranges(head.weight_VD.shape[0], vocab_tile):
        z, slope = logits_tile(hidden_TD, head, columns)
        inside_T, index_T1 = target_column(target_T, columns)
        old_T = set_target(z, inside_T, index_T1, minus_inf_T)
        target_z_T = torch.where(inside_T, old_T, target_z_T)
        new_max_T = torch.maximum(max_T, z.amax(1))
        # A tile may hold nothing but the target: then its maximum is -inf, and shifting by it NaN.
        shift_T = new_max_T.where(new_max_T > -torch.inf, 0.0)
        rescale_T = torch.exp(max_T - shift_T)
        if entropy:
            # Entropy needs sum p z; the excluded target's -inf must not meet a zero.
            shifted = z - shift_T[:, None]
            p = shifted.exp()
            weighted_z_T.add_(torch.where(sum_T > 0, max_T - shift_T, 0.0) * sum_T)
            set_target(shifted, inside_T, index_T1, torch.zeros_like(shift_T))
            weighted_z_T.mul_(rescale_T).add_(weighted_sum(p, shifted))
        else:
            p = z.sub_(shift_T[:, None]).exp_()
        sum_T.mul_(rescale_T).add_(p.sum(1))
        if unit_TD is not None:
            if slope is not None:
                slope_y_T = slope.gather(1, index_T1)[:, 0]
                target_slope_T = torch.where(inside_T, slope_y_T, target_slope_T)
                p.mul_(slope)
            unit_TD.mul_(rescale_T[:, None])
            unit_TD.add_(mm(p.to(hidden_TD.dtype), head.weight_VD[columns]))
        max_T = new_max_T
    return finish_rows(
        hidden_TD.dtype, target_T, head, max_T, sum_T, target_z_T, target_slope_T,
        weighted_z_T if entropy else None, unit_TD,
    )  # fmt: skip


def finish_rows(
    dtype: torch.dtype,
    target_T: Tensor,
    head: Head,
    max_T: Tensor,
    sum_T: Tensor,
    target_z_T: Tensor,
    target_slope_T: Tensor,
    weighted_z_T: Tensor | None,
    unit_TD: Tensor | None,
) -> ForwardResult:
    """Join the target's own entry to the sums over the other columns."""
    # logsigmoid(z_y - lse_others), the difference taken before log s is added: exact for offsets.
    shift_T = max_T.where(max_T > -torch.inf, target_z_T)  # V = 1: the others are empty
    relative_T, others_T = target_z_T - shift_T, sum_T.log()
    logprobs_T = torch.nn.functional.logsigmoid(relative_T - others_T)
    # Kept apart from the shift: a large offset of all logits must not eat the fraction. And not
    # z_y - logp, which cancels for a target far below the maximum.
    logsum_T = torch.logaddexp(relative_T, others_T)
    entropy_T = None
    if weighted_z_T is not None:
        # H = -p_y log p_y - sum_{v != y} p_v (z_v - lse), with sum_{v != y} p_v = 1 - p_y.
        rest_T = weighted_z_T * torch.exp(-logsum_T) + logsum_T * torch.expm1(logprobs_T)
        entropy_T = -(p_log_p(logprobs_T) + rest_T)
    if unit_TD is not None:
        unit_TD.mul_(-torch.exp(-logsum_T)[:, None])
        coefficient_T = -torch.expm1(logprobs_T) * target_slope_T
        unit_TD.addcmul_(coefficient_T[:, None], head.weight_VD[target_T].to(unit_TD.dtype))
        unit_TD.div_(head.temperature)
        unit_TD = unit_TD.to(dtype)
    return ForwardResult(logprobs_T, shift_T, logsum_T, entropy_T, unit_TD)


def forward_scored(
    hidden_TD: Tensor, target_T: Tensor, head: Head, workspace: int, entropy: bool, unit: bool
) -> ForwardResult:
    """Schedules "scores only" (2 TVD) and, with `unit`, "frozen weight" (4 TVD).

    Every row is scored: the caller leaves ignored rows out.
    """
    num_tokens, vocab = hidden_TD.shape[0], head.weight_VD.shape[0]
    tokens, columns = tile_shape(num_tokens, vocab, hidden_TD.device, workspace)
    parts = [
        _forward_rows(hidden_TD[rows], target_T[rows], head, columns, entropy, unit)
        for rows in ranges(max(num_tokens, 1), tokens)
    ]
    fields: Any = zip(*parts, strict=True)
    return ForwardResult._make(None if f[0] is None else torch.cat(f) for f in fields)


class BackwardInputs(NamedTuple):
    """Rows to differentiate: the upstream gradient and what the forward kept."""

    dlogprobs_T: Tensor
    hidden_TD: Tensor
    target_T: Tensor
    logprobs_T: Tensor
    max_T: Tensor
    logsum_T: Tensor


def dlogits(rows: BackwardInputs, head: Head, columns: slice) -> Tensor:
    """d loss / d (h W^T + b) for one tile, recomputed, in the accumulation dtype."""
    z, slope = logits_tile(rows.hidden_TD, head, columns)
    z.sub_(rows.max_T[:, None]).sub_(rows.logsum_T[:, None]).exp_()
    upstream_T = rows.dlogprobs_T / head.temperature
    z.mul_(-upstream_T[:, None])
    inside_T, index_T1 = target_column(rows.target_T, columns)
    set_target(z, inside_T, index_T1, -torch.expm1(rows.logprobs_T) * upstream_T)
    return z.mul_(slope) if slope is not None else z


def backward_scored(
    inputs: BackwardInputs,
    head: Head,
    workspace: int,
    need: tuple[bool, bool, bool],
    add_columns: Callable[[slice, Tensor | None, Tensor], None] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Exact gradients of hidden, weight and bias by recomputing each tile once (8 TVD in all).

    `add_columns` adds what other tokens contribute to a tile of dW and of dbias, before rounding.

    Both weight and hidden need a fp32 accumulator unless one of them is finished tile by tile.
    Vocabulary tiles run outermost, so dW is finished tile by tile and dH accumulates over T x D
    fp32 numbers. Where those do not fit half the workspace, dH gets a sweep of its own with tokens
    outermost (10 TVD): memory is never traded away.
    """
    need_hidden, need_weight, need_bias = need
    hidden_TD = inputs.hidden_TD
    acc = accumulate_dtype(hidden_TD.dtype)
    fits = acc == hidden_TD.dtype or hidden_TD.numel() * acc.itemsize <= workspace // 2
    if need_hidden and (need_weight or need_bias) and not fits:
        dhidden_TD, _, _ = backward_scored(inputs, head, workspace, (True, False, False))
        _, dweight_VD, dbias_V = backward_scored(
            inputs, head, workspace, (False, need_weight, need_bias), add_columns
        )
        return dhidden_TD, dweight_VD, dbias_V
    if need_hidden and not (need_weight or need_bias):
        return backward_hidden(inputs, head, workspace), None, None

    num_tokens, vocab = hidden_TD.shape[0], head.weight_VD.shape[0]
    tokens, vocab_tile = tile_shape(num_tokens, vocab, hidden_TD.device, workspace)
    dhidden_TD = torch.zeros_like(hidden_TD, dtype=acc) if need_hidden else None
    dweight_VD = torch.empty_like(head.weight_VD) if need_weight else None
    dbias_V = torch.empty_like(head.bias_V) if need_bias and head.bias_V is not None else None
    for columns in ranges(vocab, vocab_tile):
        weight_tile = head.weight_VD[columns]
        dweight_tile = torch.zeros_like(weight_tile, dtype=acc) if need_weight else None
        dbias_tile = torch.zeros(weight_tile.shape[0], dtype=acc, device=weight_tile.device)
        for rows in ranges(num_tokens, tokens):
            chunk = BackwardInputs(*(tensor[rows] for tensor in inputs))
            dz = dlogits(chunk, head, columns)
            dbias_tile += dz.sum(0)
            dz = dz.to(hidden_TD.dtype)
            if dweight_tile is not None:
                dweight_tile += mm(dz.T, chunk.hidden_TD)
            if dhidden_TD is not None:
                dhidden_TD[rows] += mm(dz, weight_tile)
        if add_columns is not None:
            add_columns(columns, dweight_tile, dbias_tile)
        if dweight_VD is not None and dweight_tile is not None:
            dweight_VD[columns] = dweight_tile
        if dbias_V is not None:
            dbias_V[columns] = dbias_tile
    if dhidden_TD is not None:
        dhidden_TD = dhidden_TD.to(hidden_TD.dtype)
    return dhidden_TD, dweight_VD, dbias_V


def backward_hidden(inputs: BackwardInputs, head: Head, workspace: int) -> Tensor:
    """dH alone: tokens outermost, so that the accumulator is one chunk of rows."""
    hidden_TD = inputs.hidden_TD
    num_tokens, vocab = hidden_TD.shape[0], head.weight_VD.shape[0]
    tokens, vocab_tile = tile_shape(num_tokens, vocab, hidden_TD.device, workspace)
    dhidden_TD = torch.empty_like(hidden_TD)
    for rows in ranges(num_tokens, tokens):
        chunk = BackwardInputs(*(tensor[rows] for tensor in inputs))
        part = torch.zeros_like(chunk.hidden_TD, dtype=accumulate_dtype(hidden_TD.dtype))
        for columns in ranges(vocab, vocab_tile):
            dz = dlogits(chunk, head, columns).to(hidden_TD.dtype)
            part += mm(dz, head.weight_VD[columns])
        dhidden_TD[rows] = part
    return dhidden_TD


def scored_rows(target_T: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows to compute; None means all of them.

    Ignored rows are compacted away where that needs no host synchronisation; on a GPU they run
    through the GEMM with a placeholder target and their results are masked.
    """
    if target_T.is_cuda:
        return None
    scored_T = target_T != ignore_index
    return None if bool(scored_T.all()) else scored_T.nonzero()[:, 0]


def expand(values: Tensor, rows: Tensor | None, num_tokens: int) -> Tensor:
    if rows is None:
        return values
    full = values.new_zeros((num_tokens, *values.shape[1:]))
    return full.index_copy_(0, rows, values)


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace: int,
    need_entropy: bool,
    need_unit_grad: bool,
) -> tuple[Tensor, ...]:
    """The op `bvpo::linear_logprobs_forward`; results that are not wanted are empty."""
    head = Head(weight_VD, bias_V, temperature, softcap)
    num_tokens, rows = hidden_TD.shape[0], scored_rows(target_T, ignore_index)
    ignored_T = target_T == ignore_index
    target_T = target_T.masked_fill(ignored_T, 0)
    if rows is not None:
        hidden_TD, target_T = hidden_TD[rows], target_T[rows]
    result = forward_scored(hidden_TD, target_T, head, workspace, need_entropy, need_unit_grad)
    out = [hidden_TD.new_empty(0) if v is None else expand(v, rows, num_tokens) for v in result]
    if rows is None:
        out[0] = out[0].masked_fill(ignored_T, 0)
        out[3] = out[3].masked_fill(ignored_T, 0) if need_entropy else out[3]
    return tuple(out)


def backward(
    dlogprobs_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    logprobs_T: Tensor,
    max_T: Tensor,
    logsum_T: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """The op `bvpo::linear_logprobs_backward`; gradients that are not wanted are empty."""
    head = Head(weight_VD, bias_V, temperature, softcap)
    num_tokens, rows = hidden_TD.shape[0], scored_rows(target_T, ignore_index)
    ignored_T = target_T == ignore_index
    inputs = BackwardInputs(
        dlogprobs_T.masked_fill(ignored_T, 0), hidden_TD, target_T.masked_fill(ignored_T, 0),
        logprobs_T, max_T, logsum_T,
    )  # fmt: skip
    if rows is not None:
        inputs = BackwardInputs(*(tensor[rows] for tensor in inputs))
    need = (need_hidden, need_weight, need_bias)
    dhidden, dweight, dbias = backward_scored(inputs, head, workspace, need)
    return (
        hidden_TD.new_empty(0) if dhidden is None else expand(dhidden, rows, num_tokens),
        weight_VD.new_empty(0) if dweight is None else dweight,
        weight_VD.new_empty(0) if dbias is None else dbias,
    )
