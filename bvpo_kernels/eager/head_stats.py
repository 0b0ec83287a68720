"""The backward of `linear_logprobs` with the statistics of its weight gradient, group by group.

The tile of dW is formed once per group instead of once, from the same recomputed tile of logits,
so the FLOPs are those of the plain backward and nothing of size [T, V] or [G, V, D] exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bvpo_kernels.eager import logprobs
from bvpo_kernels.eager.grad_stats import (
    Gatherer,
    Plan,
    empty,
    group_bounds,
    make_record,
    signs,
    sketch_products,
    vector_statistics,
)
from bvpo_kernels.eager.logprobs import BackwardInputs, Head, accumulate_dtype, mm, ranges

Dlogits = Callable[[BackwardInputs, Head, slice], Tensor]


class _Sums:
    """What one pass over the vocabulary tiles fills; None where it is not wanted."""

    def __init__(
        self, inputs: BackwardInputs, head: Head, need: tuple[bool, bool, bool],
        bounds: list[tuple[int, int]], rows_U: Tensor | None, plan: Plan, layer: int,
        dlogits: Dlogits,
    ) -> None:  # fmt: skip
        self.dlogits = dlogits
        hidden_TD, weight_VD = inputs.hidden_TD, head.weight_VD
        acc = accumulate_dtype(hidden_TD.dtype)
        need_hidden, need_weight, need_bias = need
        vocab, dim = weight_VD.shape
        self.dhidden_TD = torch.zeros_like(hidden_TD, dtype=acc) if need_hidden else None
        self.dweight_VD = torch.empty_like(weight_VD) if need_weight else None
        self.dbias_GV = None
        if need_bias:
            self.dbias_GV = torch.zeros(len(bounds), vocab, dtype=acc, device=hidden_TD.device)
        self.gatherer = None
        if need_weight and (plan.exact or plan.num_kinds):
            self.gatherer = Gatherer(plan, (vocab, dim), rows_U, hidden_TD)
        self.left_Vk = self.left_Tk = None
        if need_weight and plan.sketch:
            self.left_Vk = signs(vocab, plan.sketch, plan.seed, layer, 0, hidden_TD)
            self.left_Tk = torch.zeros(
                hidden_TD.shape[0], self.left_Vk.shape[1], dtype=acc, device=hidden_TD.device
            )

    def add_columns(
        self, inputs: BackwardInputs, head: Head, columns: slice, chunk_rows: int,
        bounds: list[tuple[int, int]],
    ) -> None:  # fmt: skip
        """One tile of the vocabulary: every token's logits are recomputed once."""
        weight_tile = head.weight_VD[columns]
        acc = accumulate_dtype(weight_tile.dtype)
        tiles = len(bounds) if self.gatherer is not None else 1
        tiles_GRD = torch.zeros((tiles, *weight_tile.shape), dtype=acc, device=weight_tile.device)
        for group, (start, end) in enumerate(bounds):
            tile_RD = tiles_GRD[group if tiles > 1 else 0]
            for chunk in ranges(end - start, chunk_rows):
                rows = slice(start + chunk.start, start + chunk.stop)
                part = BackwardInputs(*(tensor[rows] for tensor in inputs))
                dz = self.dlogits(part, head, columns)
                if self.dbias_GV is not None:
                    self.dbias_GV[group, columns] += dz.sum(0)
                dz = dz.to(weight_tile.dtype)
                if self.dweight_VD is not None:
                    tile_RD += mm(dz.T, part.hidden_TD)
                if self.dhidden_TD is not None:
                    self.dhidden_TD[rows] += mm(dz, weight_tile)
                if self.left_Tk is not None and self.left_Vk is not None:
                    self.left_Tk[rows] += mm(dz, self.left_Vk[columns].to(dz.dtype))
        if self.dweight_VD is not None:
            if self.gatherer is None:
                self.dweight_VD[columns] = tiles_GRD[0]
            else:
                self.gatherer.add(columns, tiles_GRD, self.dweight_VD[columns])


def _vocab_tile(inputs: BackwardInputs, vocab: int, groups: int, workspace: int) -> tuple[int, int]:
    """Tokens of a chunk and vocabulary columns of a tile, logits and G tiles of dW in workspace."""
    hidden_TD = inputs.hidden_TD
    num_tokens, dim = hidden_TD.shape
    tokens, columns = logprobs.tile_shape(num_tokens, vocab, hidden_TD.device, workspace // 2)
    itemsize = accumulate_dtype(hidden_TD.dtype).itemsize
    return tokens, max(min(columns, workspace // (2 * groups * dim * itemsize)), 1)


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
    rows_U: Tensor | None,
    plan: Plan,
    layer: int,
    dlogits: Dlogits = logprobs.dlogits,
) -> tuple[Tensor, ...]:
    """The op `bvpo::linear_logprobs_statistics`; results that are not wanted are empty. `dlogits`
    forms a tile of dZ.

    Returns dhidden, dweight, dbias, record, kept of the weight, kept of the bias, rows of the
    groups' weight gradients [G, U, D]. dH is accumulated over T x D fp32 numbers.
    """
    head = Head(weight_VD, bias_V, temperature, softcap)
    num_tokens, ignored_T = hidden_TD.shape[0], target_T == ignore_index
    inputs = BackwardInputs(
        dlogprobs_T.masked_fill(ignored_T, 0), hidden_TD, target_T.masked_fill(ignored_T, 0),
        logprobs_T, max_T, logsum_T,
    )  # fmt: skip
    bounds = group_bounds(plan, num_tokens)
    scored = logprobs.scored_rows(target_T, ignore_index)
    if scored is not None:
        inputs = BackwardInputs(*(tensor[scored] for tensor in inputs))
        edges = torch.searchsorted(scored, torch.tensor(bounds)).tolist()
        bounds = [(start, end) for start, end in edges]
    need = (need_hidden, need_weight, need_bias and bias_V is not None)
    sums = _Sums(inputs, head, need, bounds, rows_U, plan, layer, dlogits)
    chunk_rows, step = _vocab_tile(inputs, weight_VD.shape[0], len(bounds), workspace)
    for columns in ranges(weight_VD.shape[0], step):
        sums.add_columns(inputs, head, columns, chunk_rows, bounds)
    dhidden = hidden_TD.new_zeros(0)
    if sums.dhidden_TD is not None:
        dhidden = logprobs.expand(sums.dhidden_TD.to(hidden_TD.dtype), scored, num_tokens)
    dweight = hidden_TD.new_zeros(0) if sums.dweight_VD is None else sums.dweight_VD
    gatherer, none = sums.gatherer, empty(hidden_TD)
    return dhidden, dweight, *finish(
        inputs.hidden_TD, bounds, bias_V,
        None if gatherer is None else gatherer.gram_GG,
        none if gatherer is None else gatherer.kinds_KPD,
        none if gatherer is None else gatherer.rows_GUD,
        sums.dbias_GV, sums.left_Tk, plan, layer,
    )  # fmt: skip


def finish(
    hidden_TD: Tensor,
    bounds: list[tuple[int, int]],
    bias_V: Tensor | None,
    gram_GG: Tensor | None,
    kept_weight: Tensor,
    rows_GUD: Tensor,
    dbias_GV: Tensor | None,
    left_Tk: Tensor | None,
    plan: Plan,
    layer: int,
) -> tuple[Tensor, ...]:
    """The results of the op from `dbias` on, from what a pass over the vocabulary has summed."""
    if gram_GG is None:
        gram_GG = torch.zeros(len(bounds), len(bounds), dtype=torch.float64)
        gram_GG = gram_GG.to(hidden_TD.device)
    dbias, kept_bias = hidden_TD.new_zeros(0), empty(hidden_TD)
    if left_Tk is not None:
        right = signs(hidden_TD.shape[1], plan.sketch, plan.seed, layer, 1, hidden_TD)
        right_Tk = hidden_TD.to(right.dtype) @ right
        kept_weight = sketch_products(left_Tk, right_Tk, bounds)
    if dbias_GV is not None and bias_V is not None:
        dbias = dbias_GV.sum(0).to(bias_V.dtype)
        bias_gram_GG, kept_bias = vector_statistics(dbias_GV, plan)
        gram_GG = gram_GG + bias_gram_GG
    record = make_record(gram_GG if plan.exact else None, plan, layer, hidden_TD.device)
    return dbias, record, kept_weight, kept_bias, rows_GUD
