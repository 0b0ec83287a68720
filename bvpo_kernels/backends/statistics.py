"""The head's backward with the statistics of its weight gradient, group by group.

A visitor of the sweep: the tile of dW is formed once per group instead of once, from the same
recomputed tile of logits, so the FLOPs are those of the plain backward and nothing of size [T, V]
or [G, V, D] exists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bvpo_kernels.backends import schedule
from bvpo_kernels.backends.eager.engine import TorchEngine, mm
from bvpo_kernels.backends.eager.grad_stats import (
    Gatherer,
    empty,
    make_record,
    signs,
    sketch_products,
    vector_statistics,
)
from bvpo_kernels.backends.schedule import Engine
from bvpo_kernels.call import Call, Inputs, Kept, Need, Plan, accumulate_dtype


class Asked(NamedTuple):
    """What a collection wants of the head: `rows_U` are the token ids whose rows a tied embedding
    shares; `layer` is the head's place in the record."""

    plan: Plan
    layer: int
    rows_U: Tensor | None


class Sums(NamedTuple):
    """What a pass over the vocabulary has summed; None where it is not wanted.

    Gram matrix of the groups [G, G], gradients of the kinds [K, V, D], rows of the groups' weight
    gradients [G, U, D], the groups' bias gradients [G, V], dZ L^T of the sketch [T, k].
    """

    gram_GG: Tensor | None
    kinds_KVD: Tensor
    rows_GUD: Tensor
    dbias_GV: Tensor | None
    left_Tk: Tensor | None


class GroupVisitor(schedule.Visitor):
    """Keeps what is asked of the groups' gradients beside the sums that are stored."""

    def __init__(self, engine: Engine, need: Need, asked: Asked) -> None:
        super().__init__(engine, need)
        plan, layer, rows_U = asked
        self.groups = engine.groups(plan.ranges_G2, plan.scored_G)
        self.num_tiles = len(self.groups)
        like = engine.hidden(slice(0, 0))
        acc, vocab = accumulate_dtype(engine.dtype), engine.head.vocab
        self.dbias_GV = None
        if need.bias:
            self.dbias_GV = torch.zeros(self.num_tiles, vocab, dtype=acc, device=engine.device)
        self.gatherer = self.left_Vk = self.left_Tk = None
        self.apart = need.weight and (plan.exact or plan.num_kinds > 0)
        if self.apart:
            self.gatherer = Gatherer(plan, (vocab, engine.width), rows_U, like)
        if need.weight and plan.sketch:
            self.left_Vk = signs(vocab, plan.sketch, plan.seed, layer, 0, like)
            self.left_Tk = torch.zeros(
                engine.num_rows, self.left_Vk.shape[1], dtype=acc, device=engine.device
            )

    def see(self, dz: Tensor, tokens: slice, columns: slice) -> None:
        if self.left_Tk is not None and self.left_Vk is not None:
            self.left_Tk[tokens] += mm(dz, self.left_Vk[columns].to(dz.dtype))

    def store(self, columns: slice, dweight_GCE: Tensor | None, dbias_GC: Tensor | None) -> None:
        if self.dbias_GV is not None and dbias_GC is not None:
            self.dbias_GV[:, columns] = dbias_GC
        if dweight_GCE is None or self.dweight_VD is None:
            return
        if self.gatherer is None:
            self.store_weight(columns, dweight_GCE[0])
        else:
            self.gatherer.add(columns, dweight_GCE, self.dweight_VD[columns])

    def sums(self) -> Sums:
        none = empty(self.engine.hidden(slice(0, 0)))
        kept = self.gatherer
        if kept is None:
            return Sums(None, none, none, self.dbias_GV, self.left_Tk)
        return Sums(kept.gram_GG, kept.kinds_KPD, kept.rows_GUD, self.dbias_GV, self.left_Tk)


def backward(
    dlogprobs_T: Tensor, inputs: Inputs, kept: Kept, call: Call, need: Need, asked: Asked,
    engine: type = TorchEngine,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op `bvpo::linear_logprobs_statistics`; results that are not wanted are empty.

    Returns dhidden, dweight, dbias, record, kept of the weight, kept of the bias, rows of the
    groups' weight gradients [G, U, D].
    """
    need = need._replace(bias=need.bias and inputs.bias_V is not None)
    running: Engine = engine(inputs, call, kept, dlogprobs_T)
    visitor = GroupVisitor(running, need, asked)
    grads = schedule.backward(running, need, visitor)
    none = inputs.hidden_TD.new_zeros(0)
    hidden_RD = running.hidden(slice(0, running.num_rows))
    bounds = [(group.start, group.stop) for group in visitor.groups]
    return (
        none if grads.hidden_TD is None else grads.hidden_TD,
        none.clone() if grads.weight_VD is None else grads.weight_VD,
        *finish(hidden_RD, inputs.bias_V, bounds, visitor.sums(), asked),
    )


def finish(
    hidden_TD: Tensor,
    bias_V: Tensor | None,
    bounds: list[tuple[int, int]],
    sums: Sums,
    asked: Asked,
) -> tuple[Tensor, ...]:
    """The results of the op from `dbias` on; `bounds` are the groups' rows of `hidden_TD`."""
    plan, gram_GG, kept_weight = asked.plan, sums.gram_GG, sums.kinds_KVD
    if gram_GG is None:
        gram_GG = torch.zeros(len(bounds), len(bounds), dtype=torch.float64)
        gram_GG = gram_GG.to(hidden_TD.device)
    dbias, kept_bias = hidden_TD.new_zeros(0), empty(hidden_TD)
    if sums.left_Tk is not None:
        right = signs(hidden_TD.shape[1], plan.sketch, plan.seed, asked.layer, 1, hidden_TD)
        right_Tk = hidden_TD.to(right.dtype) @ right
        kept_weight = sketch_products(sums.left_Tk, right_Tk, bounds)
    if sums.dbias_GV is not None and bias_V is not None:
        dbias = sums.dbias_GV.sum(0).to(bias_V.dtype)
        bias_gram_GG, kept_bias = vector_statistics(sums.dbias_GV, plan)
        gram_GG = gram_GG + bias_gram_GG
    record = make_record(gram_GG if plan.exact else None, plan, asked.layer, hidden_TD.device)
    return dbias, record, kept_weight, kept_bias, sums.rows_GUD
