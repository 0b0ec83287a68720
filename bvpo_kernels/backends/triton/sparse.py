"""The certified sparse backward on GPUs: lists in the forward, sums over them in the backward.

Lists have room for `longest` entries per token while the vocabulary passes by and are then moved
together. Which tokens are dense is known on the device alone: they are compacted there, and the
products of the exact backward stop at their number. Nothing waits for the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bvpo_kernels.backends import schedule, sparse
from bvpo_kernels.backends.schedule import Visitor, finish_rows, ranges
from bvpo_kernels.backends.triton import lists as kernels
from bvpo_kernels.backends.triton import logprobs as row_kernels
from bvpo_kernels.backends.triton.engine import TritonEngine, fit
from bvpo_kernels.backends.triton.logprobs import Upstream
from bvpo_kernels.call import Call, Gradients, Head, Inputs, Kept, Need

# fp32 logit and int32 column of a candidate, and what choosing among them takes beside.
CANDIDATE_BYTES = 32


class Chosen(NamedTuple):
    """The largest entries of each token first: `count_T` of them, p in `p_TK`."""

    tail_T: Tensor
    count_T: Tensor
    column_TK: Tensor
    p_TK: Tensor


def choose_entries(
    found: kernels.Lists, result: schedule.ForwardResult, tolerance: float
) -> Chosen:
    """Of each token's candidates the fewest that leave out at most `tolerance`.

    Probabilities of the columns that are no candidates were summed on their own; the lists of
    tokens that have more candidates than room are incomplete.
    """
    max_T, logsum_T, logprobs_T = result.max_T, result.logsum_T, result.logprobs_T
    rest_T = found.rest_T * torch.exp(-logsum_T)
    abandoned_T = found.length_T > found.z_TK.shape[1]
    z_TK = found.z_TK - max_T[:, None]
    p_TK, order_TK = (z_TK - logsum_T[:, None]).exp().sort(dim=1, descending=True, stable=True)
    # left_TK[:, j] is what goes with entry j and all smaller ones.
    left_TK = rest_T[:, None] + p_TK.double().flip(1).cumsum(1).flip(1)
    left_TK = torch.cat([left_TK, rest_T.double()[:, None]], 1) * sparse.ROUND_UP
    stay_TK = (left_TK[:, :-1] > tolerance) & (p_TK > 0)
    count_T = stay_TK.sum(1)
    tail_T = left_TK.gather(1, count_T[:, None])[:, 0]
    listed_T = ~abandoned_T & (tail_T <= sparse.GIVE_UP * tolerance)
    unlisted_T = -torch.expm1(logprobs_T.double()) * sparse.ROUND_UP
    tail_T = tail_T.where(listed_T, unlisted_T).to(logprobs_T.dtype)
    count_T = count_T.where(listed_T, 0)
    return Chosen(tail_T, count_T, found.column_TK.gather(1, order_TK), p_TK)


def softcap_slope(z_over_temperature: Tensor, head: Head) -> Tensor | float:
    """1 - tanh^2 of the softcap at a final logit; 1 without one."""
    if head.softcap is None:
        return 1.0
    return 1 - (z_over_temperature * (head.temperature / head.softcap)).square()


def target_logits(hidden_TD: Tensor, target_T: Tensor, head: Head) -> Tensor:
    """A lower bound of each row's log-sum-exp before any tile is seen."""
    z_T = (hidden_TD.float() * head.weight_VD[target_T].float()).sum(1)
    if head.bias_V is not None:
        z_T += head.bias_V[target_T]
    if head.softcap is not None:
        z_T = head.softcap * torch.tanh(z_T / head.softcap)
    return z_T / head.temperature


class ListingEngine(TritonEngine):
    """Lists likely columns of each tile beside taking it in."""

    def __init__(self, inputs: Inputs, call: Call, longest: int) -> None:
        super().__init__(inputs, call)
        self.longest = longest

    def fused(self, tokens: slice) -> None:
        return None

    def open_chunk(self, tokens: slice) -> None:
        rows, device = tokens.stop - tokens.start, self.device
        self.lists = kernels.Lists(
            torch.full((rows, self.longest), -torch.inf, device=device),
            torch.zeros(rows, self.longest, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros(rows, device=device),
        )
        self.known_T = target_logits(self.hidden(tokens), self.target(tokens), self.head)

    def fold(
        self, hidden: Tensor, state: Tensor, tokens: slice, columns: slice, unit: bool
    ) -> None:
        z, start = self.product(hidden, columns, tokens), (tokens.start, columns.start)
        row_kernels.forward_rows(
            z, self.scored(tokens), state, start, self.head, entropy=self.call.need_entropy
        )
        kernels.list_rows(
            z, self.scored(tokens), state, self.known_T, self.lists, start,
            floor=math.log(self.call.tail_tolerance / self.longest), head=self.head,
        )  # fmt: skip


class _Storage:
    """All lists, one behind the other; those that do not fit are dropped, in order."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        # One element more, where everything goes that is not stored.
        self.columns = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
        self.entries = torch.zeros(capacity + 1, device=device)
        self._used = torch.zeros((), dtype=torch.int64, device=device)

    def append(self, count_T: Tensor, column_TK: Tensor, entry_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk's lists; returns their lengths, and which were dropped."""
        end_T = self._used + count_T.cumsum(0)
        fits_T = end_T <= self.capacity
        start_T1 = (end_T - count_T)[:, None]
        place_K = torch.arange(column_TK.shape[1], device=end_T.device)
        stored_TK = (place_K < count_T[:, None]) & fits_T[:, None]
        at = (start_T1 + place_K).where(stored_TK, self.capacity).flatten()
        self.columns.scatter_(0, at, column_TK.flatten())
        self.entries.scatter_(0, at, entry_TK.flatten())
        self._used = end_T[-1]
        return count_T.where(fits_T, 0), ~fits_T & (count_T > 0)


def _chunk(engine: ListingEngine, tokens: slice, columns: int, storage: _Storage) -> list[Tensor]:
    """Results of a chunk's rows, the probability that their lists leave out, and their lengths."""
    head, entropy = engine.head, engine.call.need_entropy
    engine.open_chunk(tokens)
    state, _ = schedule.forward_chunk(engine, tokens, columns, unit=False)
    result = finish_rows(head, engine.target(tokens), state, entropy)
    chosen = choose_entries(engine.lists, result, engine.call.tail_tolerance)
    lse_T1 = (result.max_T + result.logsum_T)[:, None]
    entry_TK = chosen.p_TK * softcap_slope(chosen.p_TK.log() + lse_T1, head)
    place_T = tokens.start + torch.arange(tokens.stop - tokens.start, device=engine.device)
    count_T = chosen.count_T.where(place_T < engine.rows.num_scored, 0)
    count_T, dropped_T = storage.append(count_T, chosen.column_TK, entry_TK)
    unlisted_T = -torch.expm1(result.logprobs_T) * sparse.ROUND_UP
    tail_T = chosen.tail_T.where(~dropped_T, unlisted_T)
    vectors = [values for values in result[:4] if values is not None]
    return [*vectors, tail_T, count_T]


def forward(inputs: Inputs, call: Call) -> tuple[Tensor, ...]:
    """`schedule.forward` with lists; no unit gradient."""
    hidden_TD = inputs.hidden_TD
    num_tokens, vocab = hidden_TD.shape[0], inputs.weight_VD.shape[0]
    longest = sparse.longest_list(vocab, "triton")
    capacity = sparse.capacity(num_tokens, longest, call.workspace_bytes)
    engine, storage = ListingEngine(inputs, call, longest), _Storage(capacity, hidden_TD.device)
    token_bytes = hidden_TD.shape[1] * hidden_TD.element_size() + longest * CANDIDATE_BYTES
    tile = fit(engine.num_rows, vocab, call.workspace_bytes, token_bytes, 0)
    parts = [
        _chunk(engine, tokens, tile.columns, storage)
        for tokens in ranges(engine.num_rows, tile.tokens)
    ]
    none = torch.zeros(0, device=hidden_TD.device)
    wanted = 6 if call.need_entropy else 5
    columns: Any = (
        zip(*parts, strict=True) if parts else [(none,)] * (wanted - 1) + [(none.long(),)]
    )
    logprobs, max_T, logsum, *entropy_T, tail_T, count = (
        engine.put_back(torch.cat(values)) for values in columns
    )
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return (
        logprobs, max_T, logsum, tail_T, offsets, storage.columns[:-1],
        storage.entries[:-1], entropy_T[0] if entropy_T else none.clone(),
        hidden_TD.new_empty(0),
    )  # fmt: skip


class _Sparse:
    """The lists of the sparse tokens, by token and by column; `own`: their targets' entries."""

    def __init__(
        self, sparse_T: Tensor, upstream: Upstream, target_T: Tensor, kept: Kept, head: Head
    ) -> None:
        offsets, columns, entries = kept.offsets, kept.columns, kept.entries
        num_tokens, device, vocab = sparse_T.shape[0], sparse_T.device, head.vocab
        z_T = kept.logprobs_T + kept.logsum_T + kept.max_T
        own_T = upstream.coefficient_T * softcap_slope(z_T, head)
        place = torch.arange(columns.shape[0], device=device)
        token = torch.searchsorted(offsets[1:], place, right=True)
        stored = token < num_tokens
        token = token.clamp(max=num_tokens - 1)
        used = stored & sparse_T[token]
        self.start, self.index = offsets, columns
        self.factor = (-upstream.upstream_T[token] * entries).masked_fill(~used, 0)
        self.own = (target_T, own_T.masked_fill(~sparse_T, 0), sparse_T.to(torch.int8))
        # The targets' entries join the lists; what is not used goes behind the last column.
        column = torch.cat(
            [columns.to(torch.int64).where(used, vocab), target_T.where(sparse_T, vocab)]
        )
        column, order = column.sort(stable=True)
        tokens = torch.cat([token, torch.arange(num_tokens, device=device)])
        self.by_column = torch.searchsorted(column, torch.arange(vocab + 1, device=device))
        self.token = tokens[order].to(torch.int32)
        self.dz = torch.cat([self.factor, self.own[1]])[order]

    def add_hidden(self, weight_VD: Tensor, dhidden_TD: Tensor) -> None:
        kernels.sum_rows(self.start, self.index, self.factor, weight_VD, dhidden_TD, self.own)

    def add_weight(self, columns: slice, hidden_TD: Tensor, dweight: Tensor) -> None:
        start = self.by_column[columns.start : columns.stop + 1]
        kernels.sum_rows(start, self.token, self.dz, hidden_TD, dweight)

    def add_bias(self, columns: slice, dbias: Tensor) -> None:
        start = self.by_column[columns.start : columns.stop + 1]
        one = torch.ones(1, 1, device=dbias.device)
        kernels.sum_rows(start, torch.zeros_like(self.token), self.dz, one, dbias[:, None])


class DenseEngine(TritonEngine):
    """The exact backward of the dense tokens alone: the device knows how many of its R rows they
    are, and products stop there. Rows behind hold nothing."""

    def __init__(self, inputs: Inputs, call: Call, dense_T: Tensor, upstream: Upstream) -> None:
        self._set_inputs(inputs, call)
        self._compact(inputs.target_T.masked_fill(~self.scored_T, 0), dense_T, None)
        self.upstream = Upstream(*(self.rows.take(values_T) for values_T in upstream))

    def product(self, hidden: Tensor, columns: slice, tokens: slice) -> Tensor:
        weight = self.head.rows(columns)
        z = torch.empty(hidden.shape[0], weight.shape[0], device=hidden.device)
        kernels.counted_mm(
            hidden, weight.T, z, self.rows.num_scored, tokens.start, rows=True, add=False
        )
        return z

    def column_sums(self, dz: Tensor, tokens: slice) -> Tensor:
        place_T = torch.arange(tokens.start, tokens.start + len(dz), device=dz.device)
        behind_T = place_T >= self.rows.num_scored
        return dz.masked_fill_(behind_T[:, None], 0).sum(0)

    def add_product(
        self, total: Tensor, left: Tensor, right: Tensor, tokens: slice, over_tokens: bool
    ) -> None:
        kernels.counted_mm(
            left, right, total, self.rows.num_scored, tokens.start, rows=not over_tokens, add=True
        )


class _Joined(Visitor):
    """Adds the sparse tokens' part to each tile of dW and db before it is rounded."""

    def __init__(self, engine: DenseEngine, need: Need, few: _Sparse) -> None:
        super().__init__(engine, need)
        self.few, self.hidden_TE = few, engine.hidden_TE

    def store(self, columns: slice, dweight_GCE: Tensor | None, dbias_GC: Tensor | None) -> None:
        if dweight_GCE is not None:
            self.few.add_weight(columns, self.hidden_TE, dweight_GCE[0])
        if dbias_GC is not None:
            self.few.add_bias(columns, dbias_GC[0])
        super().store(columns, dweight_GCE, dbias_GC)


def backward(dlogprobs_T: Tensor, inputs: Inputs, kept: Kept, call: Call, need: Need) -> Gradients:
    """`schedule.backward` of the dense tokens, and sums over lists for the others."""
    head = call.head(inputs)
    if inputs.hidden_TD.shape[0] == 0:
        return schedule.backward(TritonEngine(inputs, call, kept, dlogprobs_T), need)
    scored_T = inputs.target_T != call.ignore_index
    upstream_T = dlogprobs_T.to(torch.float32).masked_fill(~scored_T, 0)
    sparse_T = sparse.sparse_tokens(upstream_T, kept.tail_T, scored_T, call.tail_tolerance)
    upstream_T = upstream_T / call.temperature
    coefficient_T = -torch.expm1(kept.logprobs_T) * upstream_T
    upstream = Upstream(upstream_T, coefficient_T, kept.max_T, kept.logsum_T)
    target_T = inputs.target_T.masked_fill(~scored_T, 0)
    few = _Sparse(sparse_T, upstream, target_T, kept, head)
    engine = DenseEngine(inputs, call, scored_T & ~sparse_T, upstream)
    grads = schedule.backward(engine, need, _Joined(engine, need, few))
    if grads.hidden_TD is not None:
        few.add_hidden(inputs.weight_VD, grads.hidden_TD)
    return grads
