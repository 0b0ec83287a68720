"""The certified sparse backward on GPUs.

Lists have room for `longest` entries per token while the vocabulary passes by and are then moved
together. Which tokens are dense is known on the device alone: they are compacted there, and the
products of the exact backward stop at their number. Nothing waits for the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bvpo_kernels.eager.logprobs import Head, finish_rows, mm, ranges
from bvpo_kernels.eager.tail import Entries, choose_entries, softcap_slope, target_logits
from bvpo_kernels.gpu.logprobs import LOGIT_BYTES, RowKernels, _over, _Rows, _tile
from bvpo_kernels.kernels import logprobs as triton_rows
from bvpo_kernels.kernels import packing, tail
from bvpo_kernels.tail import rule

# fp32 logit and int32 column of a candidate, and what choosing among them takes beside.
CANDIDATE_BYTES = 32


def _options(head: Head) -> dict[str, Any]:
    return {"bias_V": head.bias_V, "softcap": head.softcap, "temperature": head.temperature}


class _Chunk(NamedTuple):
    """Results of a chunk of tokens in compact order; lists with room for `longest` entries."""

    vectors: tuple[Tensor, ...]
    tail_T: Tensor
    count_T: Tensor
    column_TK: Tensor
    entry_TK: Tensor


def _forward_chunk(
    hidden: Tensor, target_T: Tensor, count: Tensor, start: int, head: Head, columns: int,
    entropy: bool, tolerance: float, longest: int, kernels: RowKernels,
) -> _Chunk:  # fmt: skip
    num_rows, device = hidden.shape[0], hidden.device
    state = triton_rows.new_state(num_rows, device)
    z_TK = torch.full((num_rows, longest), -torch.inf, device=device)
    column_TK = torch.zeros(num_rows, longest, dtype=torch.int32, device=device)
    length_T = torch.zeros(num_rows, dtype=torch.int32, device=device)
    rest_T = torch.zeros(num_rows, device=device)
    known_T = target_logits(hidden, target_T, head)
    floor = math.log(tolerance / longest)
    for tile in ranges(head.weight_VD.shape[0], columns):
        z = mm(hidden, head.weight_VD[tile].T)
        kernels.forward(z, target_T, count, state, start, tile.start, entropy=entropy,
                        **_options(head))  # fmt: skip
        tail.list_rows(z, target_T, count, state, known_T, (z_TK, column_TK, length_T, rest_T),
                       start, tile.start, floor, **_options(head))  # fmt: skip
        del z  # before the next tile is made
    result = finish_rows(
        hidden.dtype, target_T, head, state[triton_rows.MAX], state[triton_rows.SUM],
        state[triton_rows.TARGET_Z], state[triton_rows.TARGET_SLOPE],
        state[triton_rows.WEIGHTED] if entropy else None, None,
    )  # fmt: skip
    lists = choose_entries(
        Entries(z_TK, column_TK), rest_T * torch.exp(-result.logsum_T), length_T > longest,
        (result.max_T, result.logsum_T), result.logprobs_T, tolerance,
    )  # fmt: skip
    lse_T1 = (result.max_T + result.logsum_T)[:, None]
    entry_TK = lists.p_TK * softcap_slope(lists.p_TK.log() + lse_T1, head)
    vectors: Any = result[:4] if entropy else result[:3]
    scored_T = start + torch.arange(num_rows, device=device) < count
    count_T = lists.count_T.where(scored_T, 0)
    return _Chunk(vectors, lists.tail_T, count_T, lists.column_TK, entry_TK)


class _Storage:
    """All lists, one behind the other; those that do not fit are dropped, in order."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        # One element more, where everything goes that is not stored.
        self.columns = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
        self.entries = torch.zeros(capacity + 1, device=device)
        self._used = torch.zeros((), dtype=torch.int64, device=device)

    def append(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """Store a chunk's lists; returns their lengths, and which were dropped."""
        end_T = self._used + chunk.count_T.cumsum(0)
        fits_T = end_T <= self.capacity
        start_T1 = (end_T - chunk.count_T)[:, None]
        place_K = torch.arange(chunk.column_TK.shape[1], device=end_T.device)
        stored_TK = (place_K < chunk.count_T[:, None]) & fits_T[:, None]
        at = (start_T1 + place_K).where(stored_TK, self.capacity).flatten()
        self.columns.scatter_(0, at, chunk.column_TK.flatten())
        self.entries.scatter_(0, at, chunk.entry_TK.flatten())
        self._used = end_T[-1]
        return chunk.count_T.where(fits_T, 0), ~fits_T & (chunk.count_T > 0)


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
    *,
    kernels: RowKernels,
) -> tuple[Tensor, ...]:
    """The op `bvpo::tail_logprobs_forward`."""
    head = Head(weight_VD, bias_V, temperature, softcap)
    (num_tokens, dim), device = hidden_TD.shape, hidden_TD.device
    storage = _Storage(capacity, device)
    nothing = hidden_TD.new_empty(0)
    if num_tokens == 0:
        zeros = [torch.zeros(0, device=device) for _ in range(5)]
        offsets = torch.zeros(1, dtype=torch.int64, device=device)
        entropy = zeros[4] if need_entropy else nothing
        return (*zeros[:3], entropy, zeros[3], offsets, storage.columns[:-1],
                storage.entries[:-1])  # fmt: skip
    scored_T = target_T != ignore_index
    rows = _Rows(*packing.compact(scored_T))
    target_T = rows.take(target_T)
    token_bytes = dim * hidden_TD.element_size() + longest * CANDIDATE_BYTES
    tile = _tile(num_tokens, weight_VD.shape[0], workspace, token_bytes, 0)
    parts: list[tuple[Tensor, ...]] = []
    for tokens in ranges(num_tokens, tile.tokens):
        hidden = packing.gather_rows(hidden_TD, rows.index_R[tokens])
        chunk = _forward_chunk(
            hidden, target_T[tokens], rows.num_scored, tokens.start, head, tile.columns,
            need_entropy, tolerance, longest, kernels,
        )  # fmt: skip
        count_T, dropped_T = storage.append(chunk)
        unlisted_T = -torch.expm1(chunk.vectors[0]) * rule.ROUND_UP
        parts.append((*chunk.vectors, chunk.tail_T.where(~dropped_T, unlisted_T), count_T))
    logprobs, max_T, logsum, *entropy_T, tail_T, count = (
        rows.put_back(torch.cat(values), scored_T) for values in zip(*parts, strict=True)
    )
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return (logprobs, max_T, logsum, entropy_T[0] if need_entropy else nothing, tail_T, offsets,
            storage.columns[:-1], storage.entries[:-1])  # fmt: skip


class _Sparse:
    """The lists of the sparse tokens, by token and by column."""

    def __init__(
        self, sparse_T: Tensor, upstream_T: Tensor, own_T: Tensor, target_T: Tensor,
        lists: tuple[Tensor, Tensor, Tensor], vocab: int,
    ) -> None:  # fmt: skip
        offsets, columns, entries = lists
        num_tokens, device = sparse_T.shape[0], sparse_T.device
        place = torch.arange(columns.shape[0], device=device)
        token = torch.searchsorted(offsets[1:], place, right=True)
        stored = token < num_tokens
        token = token.clamp(max=num_tokens - 1)
        used = stored & sparse_T[token]
        self.start, self.index = offsets, columns
        self.factor = (-upstream_T[token] * entries).masked_fill(~used, 0)
        self.own = (target_T, own_T.masked_fill(~sparse_T, 0), sparse_T.to(torch.int8))
        # The targets' entries join the lists; what is not used goes behind the last column.
        column = torch.cat([columns.to(torch.int64).where(used, vocab),
                            target_T.where(sparse_T, vocab)])  # fmt: skip
        column, order = column.sort(stable=True)
        tokens = torch.cat([token, torch.arange(num_tokens, device=device)])
        self.by_column = torch.searchsorted(column, torch.arange(vocab + 1, device=device))
        self.token = tokens[order].to(torch.int32)
        self.dz = torch.cat([self.factor, self.own[1]])[order]

    def add_hidden(self, weight_VD: Tensor, dhidden_TD: Tensor) -> None:
        tail.sum_rows(self.start, self.index, self.factor, weight_VD, dhidden_TD, self.own)

    def add_weight(self, columns: slice, hidden_TD: Tensor, dweight: Tensor) -> None:
        start = self.by_column[columns.start : columns.stop + 1]
        tail.sum_rows(start, self.token, self.dz, hidden_TD, dweight)

    def add_bias(self, columns: slice, dbias: Tensor) -> None:
        start = self.by_column[columns.start : columns.stop + 1]
        one = torch.ones(1, 1, device=dbias.device)
        tail.sum_rows(start, torch.zeros_like(self.token), self.dz, one, dbias[:, None])


class _Dense:
    """The exact backward of the dense tokens, compacted; see `gpu.logprobs._Backward`."""

    def __init__(
        self, dense_T: Tensor, hidden_TD: Tensor, target_T: Tensor, values: tuple[Tensor, ...],
        head: Head, workspace: int, kernels: RowKernels,
    ) -> None:  # fmt: skip
        self.rows = rows = _Rows(*packing.compact(dense_T))
        self.hidden_TD, self.head, self.workspace = hidden_TD, head, workspace
        self.kernels = kernels
        self.target_T = rows.take(target_T)
        self.values = tuple(rows.take(value) for value in values)

    def dlogits(self, hidden: Tensor, tokens: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """dZ of one tile, recomputed; rows behind the last dense token hold nothing."""
        weight = self.head.weight_VD[columns]
        z = torch.empty(hidden.shape[0], weight.shape[0], device=hidden.device)
        count = self.rows.num_scored
        tail.counted_mm(hidden, weight.T, z, count, tokens.start, rows=True, add=False)
        dz = _over(z, dtype)
        self.kernels.backward(
            z, dz, self.target_T[tokens], count, *(value[tokens] for value in self.values),
            tokens.start, columns.start, **_options(self.head),
        )  # fmt: skip
        return dz

    def sweep(
        self, need_weight: bool, need_bias: bool, dhidden_TD: Tensor | None, sparse: _Sparse
    ) -> tuple[Tensor | None, Tensor | None]:
        """dW and db tile by tile, sparse tokens' part included; adds dH of dense tokens (fp32,
        compact order) into `dhidden_TD`."""
        head, dtype = self.head, self.hidden_TD.dtype
        (num_tokens, dim), vocab = self.hidden_TD.shape, head.weight_VD.shape[0]
        reserved = 0 if dhidden_TD is None else dhidden_TD.numel() * LOGIT_BYTES
        tile = _tile(num_tokens, vocab, self.workspace - reserved, dim * dtype.itemsize,
                     dim * LOGIT_BYTES if need_weight else 0)  # fmt: skip
        dweight_VD = torch.empty_like(head.weight_VD) if need_weight else None
        dbias_V = torch.empty_like(head.bias_V) if need_bias and head.bias_V is not None else None
        count = self.rows.num_scored
        for columns in ranges(vocab, tile.columns):
            weight = head.weight_VD[columns]
            dweight = torch.zeros(weight.shape, device=weight.device)
            dbias = torch.zeros(weight.shape[0], device=weight.device)
            for tokens in ranges(num_tokens, tile.tokens):
                hidden = packing.gather_rows(self.hidden_TD, self.rows.index_R[tokens])
                dz = self.dlogits(hidden, tokens, columns, torch.float32 if need_bias else dtype)
                if need_bias:  # summed before dZ is rounded
                    behind = torch.arange(tokens.start, tokens.start + len(dz), device=dz.device)
                    dbias += dz.masked_fill_((behind >= count)[:, None], 0).sum(0)
                    dz = dz.to(dtype)
                if need_weight:
                    tail.counted_mm(dz.T, hidden, dweight, count, tokens.start, rows=False,
                                    add=True)  # fmt: skip
                if dhidden_TD is not None:
                    tail.counted_mm(dz, weight, dhidden_TD[tokens], count, tokens.start,
                                    rows=True, add=True)  # fmt: skip
            if dweight_VD is not None:
                sparse.add_weight(columns, self.hidden_TD, dweight)
                dweight_VD[columns] = dweight
            if dbias_V is not None:
                sparse.add_bias(columns, dbias)
                dbias_V[columns] = dbias
        return dweight_VD, dbias_V

    def hidden(self, dhidden_TD: Tensor) -> None:
        """dH of the dense tokens into their rows: tokens outermost, a chunk's sum at a time."""
        (num_tokens, dim), vocab = self.hidden_TD.shape, self.head.weight_VD.shape[0]
        dtype = self.hidden_TD.dtype
        tile = _tile(num_tokens, vocab, self.workspace, dim * (dtype.itemsize + LOGIT_BYTES), 0)
        for tokens in ranges(num_tokens, tile.tokens):
            hidden = packing.gather_rows(self.hidden_TD, self.rows.index_R[tokens])
            part = torch.zeros_like(hidden, dtype=torch.float32)
            for columns in ranges(vocab, tile.columns):
                dz = self.dlogits(hidden, tokens, columns, dtype)
                tail.counted_mm(dz, self.head.weight_VD[columns], part, self.rows.num_scored,
                                tokens.start, rows=True, add=True)  # fmt: skip
            packing.scatter_rows(part, self.rows.index_R[tokens], dhidden_TD)


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
    *,
    kernels: RowKernels,
) -> tuple[Tensor, ...]:
    """The op `bvpo::tail_logprobs_backward`; gradients that are not wanted are empty."""
    head = Head(weight_VD, bias_V, temperature, softcap)
    need_bias = need_bias and bias_V is not None
    nothing = hidden_TD.new_empty(0)
    dhidden_TD = hidden_TD.new_zeros(hidden_TD.shape) if need_hidden else nothing
    if hidden_TD.shape[0] == 0:
        dweight = torch.zeros_like(weight_VD) if need_weight else nothing.clone()
        dbias = torch.zeros_like(bias_V) if need_bias and bias_V is not None else nothing.clone()
        return dhidden_TD, dweight, dbias
    scored_T = target_T != ignore_index
    upstream_T = dlogprobs_T.to(torch.float32).masked_fill(~scored_T, 0)
    sparse_T = rule.sparse_tokens(upstream_T, tail_T, scored_T, tolerance)
    upstream_T = upstream_T / temperature
    coefficient_T = -torch.expm1(logprobs_T) * upstream_T
    z_T = logprobs_T + logsum_T + max_T
    target_T = target_T.masked_fill(~scored_T, 0)
    sparse = _Sparse(sparse_T, upstream_T, coefficient_T * softcap_slope(z_T, head), target_T,
                     (offsets, columns, entries), weight_VD.shape[0])  # fmt: skip
    values = (upstream_T, coefficient_T, max_T, logsum_T)
    dense = _Dense(scored_T & ~sparse_T, hidden_TD, target_T, values, head, workspace, kernels)
    grads: tuple[Tensor | None, Tensor | None] = (None, None)
    fits = hidden_TD.numel() * LOGIT_BYTES <= workspace // 2
    if need_hidden and (need_weight or need_bias) and fits:
        compact_TD = torch.zeros(hidden_TD.shape, device=hidden_TD.device)
        grads = dense.sweep(need_weight, need_bias, compact_TD, sparse)
        packing.scatter_rows(compact_TD, dense.rows.index_R, dhidden_TD)
    else:
        if need_hidden:
            dense.hidden(dhidden_TD)
        if need_weight or need_bias:
            grads = dense.sweep(need_weight, need_bias, None, sparse)
    if need_hidden:
        sparse.add_hidden(weight_VD, dhidden_TD)
    return dhidden_TD, *(nothing.clone() if grad is None else grad for grad in grads)
