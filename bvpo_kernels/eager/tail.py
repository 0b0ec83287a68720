"""The certified sparse backward in plain torch, on CPU tensors.

The forward keeps, per token, the entries of the softmax that leave out little; the backward sums
over the rows that they name. Tokens without such a list take the exact backward, compacted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bvpo_kernels.eager.logprobs import (
    BackwardInputs,
    Head,
    accumulate_dtype,
    backward_scored,
    expand,
    finish_rows,
    logits_tile,
    ranges,
    scored_rows,
    set_target,
    target_column,
    tile_shape,
    weighted_sum,
)
from bvpo_kernels.tail import rule

# Elements that are gathered at a time, in the accumulation dtype.
GATHER_ELEMENTS = 1 << 22


class Entries(NamedTuple):
    """Candidates of a chunk of tokens, [tokens, longest], -inf where there is none."""

    z_TK: Tensor
    column_TK: Tensor


class Lists(NamedTuple):
    """The largest entries of each token first: `count_T` of them, p in `p_TK`."""

    tail_T: Tensor
    count_T: Tensor
    column_TK: Tensor
    p_TK: Tensor


def choose_entries(
    entries: Entries, rest_T: Tensor, abandoned_T: Tensor, lse_T: tuple[Tensor, Tensor],
    logprobs_T: Tensor, tolerance: float,
) -> Lists:  # fmt: skip
    """Of each token's candidates the fewest that leave out at most `tolerance`.

    Args:
        rest_T: probability of the columns that are no candidates, summed on its own.
        abandoned_T: tokens whose candidates are incomplete.
        lse_T: maximum, and log-sum-exp minus it.
    """
    max_T, logsum_T = lse_T
    z_TK = entries.z_TK - max_T[:, None]
    p_TK, order_TK = (z_TK - logsum_T[:, None]).exp().sort(dim=1, descending=True, stable=True)
    # left_TK[:, j] is what goes with entry j and all smaller ones.
    left_TK = rest_T[:, None] + p_TK.double().flip(1).cumsum(1).flip(1)
    left_TK = torch.cat([left_TK, rest_T.double()[:, None]], 1) * rule.ROUND_UP
    stay_TK = (left_TK[:, :-1] > tolerance) & (p_TK > 0)
    count_T = stay_TK.sum(1)
    tail_T = left_TK.gather(1, count_T[:, None])[:, 0]
    listed_T = ~abandoned_T & (tail_T <= rule.GIVE_UP * tolerance)
    unlisted_T = -torch.expm1(logprobs_T.double()) * rule.ROUND_UP
    tail_T = tail_T.where(listed_T, unlisted_T).to(logprobs_T.dtype)
    count_T = count_T.where(listed_T, 0)
    return Lists(tail_T, count_T, entries.column_TK.gather(1, order_TK), p_TK)


def softcap_slope(z_over_temperature: Tensor, head: Head) -> Tensor | float:
    """1 - tanh^2 of the softcap at a final logit; 1 without one."""
    if head.softcap is None:
        return 1.0
    return 1 - (z_over_temperature * (head.temperature / head.softcap)).square()


def target_logits(hidden_TD: Tensor, target_T: Tensor, head: Head) -> Tensor:
    """A lower bound of each row's log-sum-exp before any tile is seen."""
    acc = accumulate_dtype(hidden_TD.dtype)
    z_T = (hidden_TD.to(acc) * head.weight_VD[target_T].to(acc)).sum(1)
    if head.bias_V is not None:
        z_T += head.bias_V[target_T]
    if head.softcap is not None:
        z_T = head.softcap * torch.tanh(z_T / head.softcap)
    return z_T / head.temperature


def _pad(found: list[tuple[Tensor, ...]], abandoned_T: Tensor, longest: int) -> Entries:
    """Candidates (token, column, z), found tile by tile, as rows."""
    token, column, z = (torch.cat(parts) for parts in zip(*found, strict=True))
    kept = ~abandoned_T[token]
    token, column, z = token[kept], column[kept], z[kept]
    token, order = token.sort(stable=True)
    start_T = torch.searchsorted(token, torch.arange(len(abandoned_T)))
    place = torch.arange(len(token)) - start_T[token]
    z_TK = z.new_full((len(abandoned_T), longest), -torch.inf)
    column_TK = column.new_zeros(z_TK.shape, dtype=torch.int32)
    z_TK[token, place] = z[order]
    column_TK[token, place] = column[order].to(torch.int32)
    return Entries(z_TK, column_TK)


def _forward_rows(
    hidden_TD: Tensor, target_T: Tensor, head: Head, vocab_tile: int, entropy: bool,
    tolerance: float, longest: int,
) -> tuple[Any, Lists]:  # fmt: skip
    """`eager.logprobs` with two sums, of candidates and of the rest, and the candidates."""
    new: Any = {"dtype": accumulate_dtype(hidden_TD.dtype), "device": hidden_TD.device}
    num_tokens = hidden_TD.shape[0]
    minus_inf_T = torch.full((num_tokens,), -torch.inf, **new)
    max_T, kept_T, rest_T = minus_inf_T.clone(), *torch.zeros(2, num_tokens, **new)
    target_z_T, weighted_z_T = torch.zeros(2, num_tokens, **new)
    known_T = target_logits(hidden_TD, target_T, head)
    count_T = torch.zeros(num_tokens, dtype=torch.int64)
    floor_T = torch.full_like(known_T, math.log(tolerance / longest))
    found: list[tuple[Tensor, ...]] = []
    for columns in ranges(head.weight_VD.shape[0], vocab_tile):
        z, _ = logits_tile(hidden_TD, head, columns)
        inside_T, index_T1 = target_column(target_T, columns)
        old_T = set_target(z, inside_T, index_T1, minus_inf_T)
        target_z_T = torch.where(inside_T, old_T, target_z_T)
        new_max_T = torch.maximum(max_T, z.amax(1))
        shift_T = new_max_T.where(new_max_T > -torch.inf, 0.0)
        rescale_T = torch.exp(max_T - shift_T)
        moved_T = torch.where(kept_T + rest_T > 0, max_T - shift_T, 0.0) * (kept_T + rest_T)
        kept_T, rest_T = kept_T * rescale_T, rest_T * rescale_T
        seen_T = shift_T + (kept_T + rest_T).clamp_min(1).log()
        near = z >= (torch.maximum(known_T, seen_T) + floor_T)[:, None]
        token, column = near.nonzero(as_tuple=True)
        found.append((token, column + columns.start, z[token, column]))
        count_T += near.sum(1)
        floor_T = floor_T.masked_fill(count_T > longest, torch.inf)
        shifted = z - shift_T[:, None]
        p = shifted.exp()
        if entropy:
            set_target(shifted, inside_T, index_T1, torch.zeros_like(shift_T))
            weighted_z_T = (weighted_z_T + moved_T) * rescale_T + weighted_sum(p, shifted)
        kept_T += p.masked_fill(~near, 0).sum(1)
        rest_T += p.masked_fill_(near, 0).sum(1)
        max_T = new_max_T
    result = finish_rows(
        hidden_TD.dtype, target_T, head, max_T, kept_T + rest_T, target_z_T, torch.ones(1, **new),
        weighted_z_T if entropy else None, None,
    )  # fmt: skip
    abandoned_T = count_T > longest
    rest_T = rest_T * torch.exp(-result.logsum_T)
    lists = choose_entries(
        _pad(found, abandoned_T, longest), rest_T, abandoned_T, (result.max_T, result.logsum_T),
        result.logprobs_T, tolerance,
    )  # fmt: skip
    return result, lists


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace: int,
    tolerance: float,
    longest: int,
    capacity: int,
    need_entropy: bool,
) -> tuple[Tensor, ...]:
    """The op `bvpo::tail_logprobs_forward`."""
    head = Head(weight_VD, bias_V, temperature, softcap)
    num_tokens, rows = hidden_TD.shape[0], scored_rows(target_T, ignore_index)
    if rows is not None:
        hidden_TD, target_T = hidden_TD[rows], target_T[rows]
    acc = accumulate_dtype(hidden_TD.dtype)
    tokens, vocab_tile = tile_shape(len(target_T), weight_VD.shape[0], target_T.device, workspace)
    vectors: list[tuple[Tensor, ...]] = []
    column, entry = torch.zeros(capacity, dtype=torch.int32), torch.zeros(capacity, dtype=acc)
    used = 0
    for chunk in ranges(max(len(target_T), 1), tokens):
        result, lists = _forward_rows(
            hidden_TD[chunk], target_T[chunk], head, vocab_tile, need_entropy, tolerance, longest
        )
        end_T = used + lists.count_T.cumsum(0)
        fits_T = end_T <= capacity
        count_T = lists.count_T.where(fits_T, 0)
        unlisted_T = -torch.expm1(result.logprobs_T) * rule.ROUND_UP
        tail_T = lists.tail_T.where(fits_T | (lists.count_T == 0), unlisted_T)
        listed_TK = torch.arange(longest) < count_T[:, None]
        lse_T1 = (result.max_T + result.logsum_T)[:, None]
        slope = softcap_slope(lists.p_TK.log() + lse_T1, head)
        stored = slice(used, used + int(count_T.sum()))
        column[stored] = lists.column_TK[listed_TK]
        entry[stored] = (lists.p_TK * slope)[listed_TK]
        used = stored.stop
        entropy_T = [result.entropy_T] if result.entropy_T is not None else []
        vectors.append((*result[:3], tail_T, count_T, *entropy_T))
    logprobs, max_T, logsum, tail, count, *entropy = (
        expand(torch.cat(parts), rows, num_tokens) for parts in zip(*vectors, strict=True)
    )
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    entropy_out = entropy[0] if entropy else hidden_TD.new_empty(0)
    return logprobs, max_T, logsum, entropy_out, tail, offsets, column, entry


class _Sparse:
    """The non-zero gradients dz of the sparse tokens: their lists' and their targets' entries."""

    def __init__(self, token: Tensor, column: Tensor, dz: Tensor, hidden_TD: Tensor) -> None:
        self.token, self.column, self.dz, self.hidden_TD = token, column, dz, hidden_TD
        self._step = max(GATHER_ELEMENTS // max(hidden_TD.shape[1], 1), 1)
        order = column.argsort(stable=True)
        self._by_column = column[order], token[order], dz[order]

    def add_hidden(self, dhidden_TD: Tensor, weight_VD: Tensor) -> None:
        for part in ranges(len(self.dz), self._step):
            rows = weight_VD[self.column[part]].to(dhidden_TD.dtype)
            dhidden_TD.index_add_(0, self.token[part], rows.mul_(self.dz[part, None]))

    def add_columns(self, columns: slice, dweight: Tensor | None, dbias: Tensor) -> None:
        """Adds to a tile of dW and of dbias, token by token in order."""
        column, token, dz = self._by_column
        edges = torch.tensor([columns.start, columns.stop])
        first, last = torch.searchsorted(column, edges).tolist()
        for part in ranges(last - first, self._step):
            part = slice(first + part.start, first + part.stop)
            place = column[part] - columns.start
            dbias.index_add_(0, place, dz[part])
            if dweight is not None:
                rows = self.hidden_TD[token[part]].to(dweight.dtype)
                dweight.index_add_(0, place, rows.mul_(dz[part, None]))


def _gather_sparse(
    sparse_T: Tensor, inputs: BackwardInputs, lists: tuple[Tensor, Tensor, Tensor], head: Head
) -> _Sparse:
    offsets, column, entry = lists
    used_T = sparse_T & (inputs.dlogprobs_T != 0)
    token = torch.repeat_interleave(offsets.diff())
    stored = slice(0, len(token))
    of_used = used_T[token]
    upstream_T = inputs.dlogprobs_T.to(entry.dtype) / head.temperature
    z_T = inputs.logprobs_T + inputs.logsum_T + inputs.max_T
    own_T = -torch.expm1(inputs.logprobs_T) * upstream_T * softcap_slope(z_T, head)
    target_token = used_T.nonzero()[:, 0]
    token, column, entry = token[of_used], column[stored][of_used], entry[stored][of_used]
    return _Sparse(
        torch.cat([token, target_token]),
        torch.cat([column.to(torch.int64), inputs.target_T[target_token]]),
        torch.cat([-upstream_T[token] * entry, own_T[target_token]]),
        inputs.hidden_TD,
    )


def backward(
    dlogprobs_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    logprobs_T: Tensor,
    max_T: Tensor,
    logsum_T: Tensor,
    tail_T: Tensor,
    offsets: Tensor,
    columns: Tensor,
    entries: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace: int,
    tolerance: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """The op `bvpo::tail_logprobs_backward`; gradients that are not wanted are empty."""
    head = Head(weight_VD, bias_V, temperature, softcap)
    scored_T = target_T != ignore_index
    inputs = BackwardInputs(
        dlogprobs_T.masked_fill(~scored_T, 0), hidden_TD, target_T, logprobs_T, max_T, logsum_T
    )
    sparse_T = rule.sparse_tokens(inputs.dlogprobs_T, tail_T, scored_T, tolerance)
    dense = (scored_T & ~sparse_T).nonzero()[:, 0]
    sparse = _gather_sparse(sparse_T, inputs, (offsets, columns, entries), head)
    dhidden, dweight, dbias = backward_scored(
        BackwardInputs(*(tensor[dense] for tensor in inputs)), head, workspace,
        (need_hidden, need_weight, need_bias), sparse.add_columns,
    )  # fmt: skip
    dhidden_TD = hidden_TD.new_empty(0)
    if dhidden is not None:
        dhidden_TD = torch.zeros_like(hidden_TD, dtype=accumulate_dtype(hidden_TD.dtype))
        sparse.add_hidden(dhidden_TD, weight_VD)
        dhidden_TD = dhidden_TD.to(hidden_TD.dtype).index_copy_(0, dense, dhidden)
    return (
        dhidden_TD,
        weight_VD.new_empty(0) if dweight is None else dweight,
        weight_VD.new_empty(0) if dbias is None else dbias,
    )
