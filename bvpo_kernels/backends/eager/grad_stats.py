"""Gradients of one layer, group by group, and what is kept of them, in plain torch.

A group is a contiguous range of tokens, so its weight gradient dY_g^T X_g is a slice of the
ordinary product: all groups together cost the ordinary FLOPs. Tiles of rows bound the scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bvpo_kernels import checks
from bvpo_kernels.backends.eager.engine import mm
from bvpo_kernels.backends.schedule import ranges
from bvpo_kernels.call import Plan, accumulate_dtype

# Bytes of the tiles of all groups together. They are written and read again twice, so they should
# stay in the last-level cache, and have rows enough for the GEMM.
TILE_BYTES = 16 * 2**20
# On a GPU a launch costs more than a cache: D = 4096 and 8 groups get 2048 rows.
GPU_TILE_BYTES = 256 * 2**20
MIN_TILE_ROWS = 64
# Products that are summed in fp32 before the sum goes to fp64.
PARTIAL_SUM = 4096


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """<left_i, right_j> of [A, ...] and [B, ...], fp64; short fp32 sums, then fp64."""
    left, right = left.flatten(1), right.flatten(1)
    size = left.shape[1]
    whole = size - size % PARTIAL_SUM
    result = left[:, whole:].double() @ right[:, whole:].double().T
    if whole:
        left, right = (
            t[:, :whole].unflatten(1, (-1, PARTIAL_SUM)).transpose(0, 1) for t in (left, right)
        )
        result += torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.float64)
    return result


def pair_reduce(
    tiles_KRD: Tensor, total_RD: Tensor, weights_K: Tensor | None = None, add: bool = False
) -> Tensor:
    """total = sum_k w_k A_k, with `add` added to what it holds; returns <A_k, A_l> in fp64."""
    tiles_KRD = tiles_KRD.to(accumulate_dtype(tiles_KRD.dtype))
    weighted_KRD = tiles_KRD if weights_K is None else weights_K[:, None, None] * tiles_KRD
    sum_RD = weighted_KRD.sum(0)
    gram = inner_products(tiles_KRD, tiles_KRD)  # first: the total may be tiles_KRD[0]
    total_RD.copy_(sum_RD + total_RD if add else sum_RD)
    return gram


def signs(size: int, k: int, seed: Tensor, layer: int, side: int, like: Tensor) -> Tensor:
    """[size, k] of +-1/sqrt(k), the same wherever seed, layer and side are; I where size <= k."""
    dtype = accumulate_dtype(like.dtype)
    if size <= k:
        return torch.eye(size, dtype=dtype, device=like.device)
    generator = torch.Generator(like.device)
    generator.manual_seed((int(seed) * 1_000_003 + layer) * 2 + side)
    bits = torch.randint(0, 2, (size, k), generator=generator, device=like.device, dtype=torch.int8)
    return (bits.to(dtype) * 2 - 1) / k**0.5


def make_record(gram_GG: Tensor | None, plan: Plan, layer: int, device: torch.device) -> Tensor:
    groups = plan.ranges_G2.shape[0]
    record = torch.zeros(groups**2 + plan.num_layers, dtype=torch.float64, device=device)
    if gram_GG is not None:
        record[: groups**2] = gram_GG.flatten()
    record[groups**2 + layer] = 1
    return record


def empty(like: Tensor) -> Tensor:
    """Stands for a statistic that is not wanted: no elements, in the accumulation dtype."""
    return like.new_zeros(0, dtype=accumulate_dtype(like.dtype))


def group_bounds(plan: Plan, rows: int) -> list[tuple[int, int]]:
    """Row range of each group in a tensor that has `rows` rows, a multiple of the tokens'."""
    tokens = plan.ranges_G2.tolist()
    per_token = rows // tokens[-1][1]
    return [(start * per_token, end * per_token) for start, end in tokens]


def scratch_bytes(device: str) -> int:
    """Of a layer's group gradients at most: their tiles, once more while these are put together."""
    return 2 * (GPU_TILE_BYTES if device == "cuda" else TILE_BYTES)


def tile_rows(groups: int, dim: int, itemsize: int, device: torch.device) -> int:
    size = GPU_TILE_BYTES if device.type == "cuda" else TILE_BYTES
    return max(size // (groups * dim * itemsize), MIN_TILE_ROWS)


class Gatherer:
    """Sums over the tiles of one [P, D] parameter: Gram, kind sums, rows of the tied use."""

    def __init__(self, plan: Plan, shape: tuple[int, int], rows_U: Tensor | None, like: Tensor):
        groups = plan.ranges_G2.shape[0]
        self.plan, self.rows_U = plan, rows_U
        self.gram_GG = torch.zeros(groups, groups, dtype=torch.float64, device=like.device)
        self.kinds_KPD, self.rows_GUD = empty(like), empty(like)
        if plan.num_kinds:
            self.kinds_KPD = self.kinds_KPD.new_zeros(plan.num_kinds, *shape)
        if rows_U is not None:
            self.rows_GUD = self.rows_GUD.new_zeros(groups, rows_U.shape[0], shape[1])

    def add(self, rows: slice, tiles_GRD: Tensor, total_RD: Tensor) -> None:
        """Take in the gradients of `rows` of the parameter; writes their sum over the groups."""
        self.gram_GG += torch.ops.bvpo.pair_reduce(tiles_GRD, total_RD)
        if self.plan.num_kinds:
            kinds_KRD = self.kinds_KPD[:, rows]
            kinds_KRD.index_add_(0, self.plan.kinds_G, tiles_GRD.to(kinds_KRD.dtype))
        if self.rows_U is not None:
            here_U = (self.rows_U >= rows.start) & (self.rows_U < rows.stop)
            index_U = (self.rows_U - rows.start).clamp(0, rows.stop - rows.start - 1)
            self.rows_GUD += tiles_GRD[:, index_U] * here_U[:, None]


def vector_statistics(grads_GP: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Gram matrix and what is kept of a vector parameter's gradients."""
    gram_GG = inner_products(grads_GP, grads_GP)
    if plan.sketch:
        return gram_GG, grads_GP
    kept = grads_GP.new_zeros(plan.kept_shape(tuple(grads_GP.shape[1:])))
    return gram_GG, kept.index_add_(0, plan.kinds_G, grads_GP) if plan.num_kinds else kept


def _group_sums(values_TP: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    dtype = accumulate_dtype(values_TP.dtype)
    return torch.stack([values_TP[start:end].sum(0, dtype=dtype) for start, end in bounds])


def linear_backward(
    dy_TP: Tensor,
    x_TD: Tensor,
    need_weight: bool,
    need_bias: bool,
    rows_U: Tensor | None,
    plan: Plan,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `bvpo::grouped_linear_backward`; results that are not wanted are empty.

    Returns dweight, dbias, record, kept of the weight, kept of the bias, rows of the groups'
    weight gradients [G, U, D].
    """
    bounds = group_bounds(plan, x_TD.shape[0])
    dweight, dbias = x_TD.new_zeros(0), dy_TP.new_zeros(0)
    kept_weight, kept_bias, rows_GUD = empty(x_TD), empty(x_TD), empty(x_TD)
    gram_GG = torch.zeros(len(bounds), len(bounds), dtype=torch.float64, device=x_TD.device)
    if need_bias:
        grads_GP = _group_sums(dy_TP, bounds)
        dbias = grads_GP.sum(0).to(dy_TP.dtype)
        bias_gram_GG, kept_bias = vector_statistics(grads_GP, plan)
        gram_GG += bias_gram_GG
    if need_weight and not plan.exact and not plan.num_kinds:
        dweight = torch.mm(dy_TP.T, x_TD)
    elif need_weight:
        shape = (dy_TP.shape[1], x_TD.shape[1])
        gatherer = Gatherer(plan, shape, rows_U, x_TD)
        dweight = x_TD.new_empty(shape)
        step = tile_rows(len(bounds), shape[1], accumulate_dtype(x_TD.dtype).itemsize, x_TD.device)
        for rows in ranges(shape[0], step):
            gatherer.add(rows, _group_products(dy_TP[:, rows], x_TD, bounds), dweight[rows])
        gram_GG += gatherer.gram_GG
        kept_weight, rows_GUD = gatherer.kinds_KPD, gatherer.rows_GUD
    if need_weight and plan.sketch:
        kept_weight = _sketch(dy_TP, x_TD, bounds, plan, layer)
    record = make_record(gram_GG if plan.exact else None, plan, layer, x_TD.device)
    return dweight, dbias, record, kept_weight, kept_bias, rows_GUD


def _group_products(dy_TR: Tensor, x_TD: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """dY_g^T X_g of each group, [G, R, D]; on a CPU in the dtype that its GEMM writes."""
    if x_TD.is_cuda:
        return torch.stack([mm(dy_TR[start:end].T, x_TD[start:end]) for start, end in bounds])
    tiles_GRD = x_TD.new_empty(len(bounds), dy_TR.shape[1], x_TD.shape[1])
    for tile_RD, (start, end) in zip(tiles_GRD, bounds, strict=True):
        torch.mm(dy_TR[start:end].T, x_TD[start:end], out=tile_RD)
    return tiles_GRD


def _sketch(
    dy_TP: Tensor, x_TD: Tensor, bounds: list[tuple[int, int]], plan: Plan, layer: int
) -> Tensor:
    left = signs(dy_TP.shape[1], plan.sketch, plan.seed, layer, 0, dy_TP)
    right = signs(x_TD.shape[1], plan.sketch, plan.seed, layer, 1, x_TD)
    return sketch_products(dy_TP @ left.to(dy_TP.dtype), x_TD @ right.to(x_TD.dtype), bounds)


def sketch_products(left_Tk: Tensor, right_Tk: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """(dY_g L^T)^T (X_g R^T) of each group, from dY L^T and X R^T."""
    return torch.stack([mm(left_Tk[s:e].T, right_Tk[s:e]) for s, e in bounds])


def embedding_backward(
    dy_TD: Tensor,
    ids_T: Tensor,
    tied: tuple[Tensor | None, Tensor | None],
    size: tuple[int, int],
    plan: Plan,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `bvpo::grouped_embedding_backward`: dweight, record, kept.

    Only rows that occur are formed. tied: `rows_U` (ascending, holds every id) names them; None
    finds them, which on a GPU makes the host wait; `drows_GUD` is what another use of the same
    weight (the tied head) contributed to those rows, for the cross term of |emb + head|^2. size:
    vocabulary and padding index.
    """
    (rows_U, drows_GUD), (vocab, padding_idx) = tied, size
    dweight = torch.ops.aten.embedding_dense_backward(dy_TD, ids_T, vocab, padding_idx, False)
    bounds = group_bounds(plan, ids_T.shape[0])
    dy_TD = dy_TD.masked_fill((ids_T == padding_idx)[:, None], 0).to(accumulate_dtype(dy_TD.dtype))
    gram_GG = None
    if plan.exact:
        gram_GG = _embedding_gram(dy_TD, ids_T, rows_U, drows_GUD, bounds)
    kept = dy_TD.new_zeros(plan.kept_shape((vocab, dy_TD.shape[1])))
    if plan.sketch:
        left = signs(vocab, plan.sketch, plan.seed, layer, 0, dy_TD)[ids_T]
        right = signs(dy_TD.shape[1], plan.sketch, plan.seed, layer, 1, dy_TD)
        kept = sketch_products(left, dy_TD @ right, bounds)
    elif plan.num_kinds:
        for (start, end), kind in zip(bounds, plan.kinds_G.tolist(), strict=True):
            kept[kind].index_add_(0, ids_T[start:end], dy_TD[start:end])
    return dweight, make_record(gram_GG, plan, layer, dy_TD.device), kept


def _embedding_gram(
    dy_TD: Tensor,
    ids_T: Tensor,
    rows_U: Tensor | None,
    drows_GUD: Tensor | None,
    bounds: list[tuple[int, int]],
) -> Tensor:
    rows_U = torch.unique(ids_T) if rows_U is None else rows_U
    index_T = torch.searchsorted(rows_U, ids_T).clamp_max(rows_U.shape[0] - 1)
    checks.require(
        (rows_U[index_T] == ids_T).all(),
        "embedding: expected the token ids of the collected batch",
        lambda: int(ids_T[rows_U[index_T] != ids_T][0]),
    )
    groups, unique, dim = len(bounds), rows_U.shape[0], dy_TD.shape[1]
    gram_GG = torch.zeros(groups, groups, dtype=torch.float64, device=dy_TD.device)
    for columns in ranges(dim, max(TILE_BYTES // (groups * unique * dy_TD.itemsize), 1)):
        tiles_GUD = dy_TD.new_zeros(groups, unique, columns.stop - columns.start)
        for tile_UD, (start, end) in zip(tiles_GUD, bounds, strict=True):
            tile_UD.index_add_(0, index_T[start:end], dy_TD[start:end, columns])
        gram_GG += inner_products(tiles_GUD, tiles_GUD)
        if drows_GUD is not None:
            cross_GG = inner_products(tiles_GUD, drows_GUD[:, :, columns])
            gram_GG += cross_GG + cross_GG.T
    return gram_GG


class NormForm(NamedTuple):
    """LayerNorm (`centered`) or RMSNorm, and which of its parameters are trained."""

    eps: float
    centered: bool
    need_weight: bool
    need_bias: bool


def norm_sums(
    dy_TD: Tensor, x_TD: Tensor, ranges_G2: Tensor, eps: float, centered: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sum_{t in g} dY_t * xhat_t, the gradient of the weight of RMSNorm (LayerNorm: `centered`),
    and sum_{t in g} dY_t, that of the bias; [G, D], empty where not wanted."""
    bounds = ranges_G2.tolist()
    dy_TD, x_TD = (t.to(accumulate_dtype(t.dtype)) for t in (dy_TD, x_TD))
    weight_GD, bias_GD = empty(x_TD), empty(x_TD)
    if need_weight:
        if centered:
            x_TD = x_TD - x_TD.mean(-1, keepdim=True)
        xhat_TD = x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
        weight_GD = _group_sums(xhat_TD * dy_TD, bounds)
    if need_bias:
        bias_GD = _group_sums(dy_TD, bounds)
    return weight_GD, bias_GD


def norm_statistics(
    dy_TD: Tensor,
    x_TD: Tensor,
    form: NormForm,
    plan: Plan,
    layer: int,
    sums: Callable[..., tuple[Tensor, Tensor]] = norm_sums,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `bvpo::grouped_norm_statistics`: record, kept of the weight, kept of the bias."""
    ranges_G2 = torch.tensor(group_bounds(plan, x_TD.shape[0]))
    groups = len(ranges_G2)
    gram_GG = torch.zeros(groups, groups, dtype=torch.float64, device=x_TD.device)
    kept_weight, kept_bias = empty(x_TD), empty(x_TD)
    weight_GD, bias_GD = sums(dy_TD, x_TD, ranges_G2, *form)
    if form.need_weight:
        gram, kept_weight = vector_statistics(weight_GD, plan)
        gram_GG += gram
    if form.need_bias:
        gram, kept_bias = vector_statistics(bias_GD, plan)
        gram_GG += gram
    record = make_record(gram_GG if plan.exact else None, plan, layer, x_TD.device)
    return record, kept_weight, kept_bias
