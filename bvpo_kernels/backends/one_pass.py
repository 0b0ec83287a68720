"""The trained head in one pass: 6 TVD FLOPs, where recomputing a tile of logits makes 8.

The gradient of a pair's loss f(m) has one unknown before the forward, f'(m): all else of the
upstream gradient of a token, its sign and the length of its response, is known. So a chunk of rows
forms its logits over the whole vocabulary once and, in place, dZ, dH and dW of the margin; what is
formed of a pair is multiplied by its number c = weight f'(m) when its scores are there.

    floor of FLOPs 6 TVD; bytes besides: 8 V D per chunk (the fp32 sums), 8 to 14 T V (the logits)

Sums of a pair are a tile [V, D] in fp32. Two are enough for any number of pairs: of those finished,
and of the one in progress. Statistics multiply the groups' gradients with each other: a tile each.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bvpo_kernels import backends
from bvpo_kernels.backends.eager.engine import BYTES_PER_LOGIT
from bvpo_kernels.backends.eager.grad_stats import empty, signs, vector_statistics
from bvpo_kernels.backends.extensions import CPU_PATHS
from bvpo_kernels.backends.schedule import Engine, ranges, whole_tiles
from bvpo_kernels.backends.slopes import SLOPES
from bvpo_kernels.backends.statistics import Asked
from bvpo_kernels.call import Inputs, Need, Pairs, accumulate_dtype

# Bytes that a logit costs while its chunk is alive, and rows of which the default workspace holds
# the logits: then the sums of dW, which every chunk reads and writes, cost 238 / 2048 of the
# products on an H200 (measured-rate bytes over FLOPs, whatever D is), and less on a CPU.
LOGIT_BYTES = {"eager": BYTES_PER_LOGIT, "cpp": 4, "triton": 4}
DEFAULT_ROWS = {"eager": 256, "cpp": 1024, "triton": 2048}
# Below this the sums' traffic outweighs the product that the pass saves.
LEAST_ROWS = 64
# Tiles that the default workspace holds for statistics, where they are more than two.
MOST_TILES, MOST_TILE_BYTES = 8, 4 * 2**30


class Formed(NamedTuple):
    """All but for the factor of the loss itself, which the backward knows.

    slope_P: c of each pair, fp64, which the rows `unit_TE`, gradients of margins to [h, x], still
    lack. total_VE, dbias_V: in the accumulation dtype; without elements where not wanted.
    """

    scores_S: Tensor
    slope_P: Tensor
    unit_TE: Tensor
    total_VE: Tensor
    dbias_V: Tensor


class Measured(NamedTuple):
    """Of the pairs' gradients, each a group: their Gram matrix, what is kept of the weight's and of
    the bias's, rows of the weight's (`Asked`)."""

    gram_GG: Tensor
    kept_weight: Tensor
    kept_bias: Tensor
    rows_GUD: Tensor


class Former(Protocol):
    """One backend's pass over a pair's rows."""

    def tiles(self, shape: tuple[int, int, int]) -> Tensor:
        """Room for sums, in the accumulation dtype."""

    def form(self, pair: int, sums_VE: Tensor | None, dbias_V: Tensor | None) -> None:
        """Fill the pair's rows of the results, and its gradients to the weight and the bias."""

    def scores(self, pair: int) -> Tensor:
        """Of the pair's two segments, once it is formed."""

    def results(self) -> tuple[Tensor, Tensor]:
        """logprobs [T]; unit [T, E], without elements where hidden needs no gradient."""


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    triton = values.is_cuda and not backends.MISSING["triton"]
    return torch.ops.bvpo.segment_sum(values, cu_seqlens, "triton" if triton else "eager")


class EngineFormer:
    """Chunks of rows over an engine of `schedule`; `room`: bytes for whole logits."""

    def __init__(
        self, engine: Engine, inputs: Inputs, pairs: Pairs, factor_T: Tensor, need: Need, room: int
    ) -> None:
        self.engine, self.need = engine, need
        self.rows = engine.groups(pairs.ranges_P2, pairs.scored_P)
        self.factor_R = engine.take(factor_T)
        acc = accumulate_dtype(engine.dtype)
        self.logprobs_R = torch.zeros(engine.num_rows, dtype=acc, device=engine.device)
        self.sink = engine.hidden_sink() if need.hidden else None
        self.first = 0 if need.weight else engine.head.weight_VD.shape[1]
        self.most = engine.whole_rows(room)
        scored_T = inputs.target_T != engine.call.ignore_index
        before = torch.cat([scored_T.new_zeros(1, dtype=torch.int32), scored_T.cumsum(0)])
        self.edges_S1 = before[pairs.cu_seqlens.to(torch.int64)].to(torch.int32)

    def tiles(self, shape: tuple[int, int, int]) -> Tensor:
        acc = accumulate_dtype(self.engine.dtype)
        return torch.empty(shape, dtype=acc, device=self.engine.device)

    def form(self, pair: int, sums_VE: Tensor | None, dbias_V: Tensor | None) -> None:
        rows = self.rows[pair]
        count = rows.stop - rows.start
        if sums_VE is not None and count == 0:
            sums_VE.zero_()
        if dbias_V is not None:
            dbias_V.zero_()
        chunks = -(-count // self.most)
        for part in ranges(count, -(-count // max(chunks, 1)) or 1):
            tokens = slice(rows.start + part.start, rows.start + part.stop)
            self._chunk(tokens, sums_VE, dbias_V, add=part.start > 0)

    def _chunk(
        self, tokens: slice, sums_VE: Tensor | None, dbias_V: Tensor | None, add: bool
    ) -> None:
        engine, acc = self.engine, accumulate_dtype(self.engine.dtype)
        hidden = engine.hidden(tokens)
        wanted = engine.dtype if dbias_V is None else acc
        logprobs, dz = engine.form(hidden, self.factor_R[tokens], tokens, wanted)
        self.logprobs_R[tokens] = logprobs
        if dbias_V is not None:  # summed before dZ is rounded
            dbias_V += engine.column_sums(dz, tokens)
            dz = dz.to(engine.dtype)
        dhidden = None
        if self.sink is not None:
            dhidden = torch.empty(hidden.shape, dtype=acc, device=engine.device)
        for columns in whole_tiles(engine.head):
            left = dz[:, columns]
            if dhidden is not None:
                engine.put_product(dhidden, left, engine.head.rows(columns), columns.start > 0)
            if sums_VE is not None:
                engine.put_product(sums_VE[columns], left.T, hidden[:, self.first :], add)
        if self.sink is not None and dhidden is not None:
            self.sink.put(tokens, dhidden)

    def scores(self, pair: int) -> Tensor:
        edges = self.edges_S1[2 * pair : 2 * pair + 3]
        return segment_sum(self.logprobs_R[self.rows[pair]], edges - edges[0])

    def results(self) -> tuple[Tensor, Tensor]:
        none = torch.empty(0, dtype=self.engine.dtype, device=self.engine.device)
        logprobs_T = self.engine.put_back(self.logprobs_R)
        return logprobs_T, none if self.sink is None else self.sink.result()


def slower(impl: str, dtype: torch.dtype, device: str) -> str:
    """Why a backend takes longer so than by computing tiles again; '' where it does not.

    On a CPU whose products run at 1.5 TFLOP/s (AMX) the bytes of the logits and of fresh fp32 sums
    outweigh the product that they save: 1.06 to 1.14 x the time (csrc/README.md). `eager` rounds
    products to bf16 there, and adds them in a pass of its own.
    """
    if device != "cpu" or impl not in ("cpp", "eager") or dtype.itemsize > 2:
        return ""
    if impl == "eager":
        return "'eager' computes tiles of half-precision logits again in less time"
    amx = "AMX" in CPU_PATHS.get(dtype, "")
    return "with AMX computing tiles of logits again takes less time" if amx else ""


def num_tiles(pairs: int, asked: Asked | None = None) -> int:
    """Tiles of sums that a pass over so many pairs has."""
    return pairs if asked is not None and asked.plan.exact else min(pairs, 2)


def fits_default(tiles: int, total_bytes: int) -> bool:
    """Whether so many tiles are taken where nobody bounds the workspace."""
    return tiles <= 2 or (tiles <= MOST_TILES and total_bytes <= MOST_TILE_BYTES)


def tile_bytes(vocab: int, width: int, dtype: torch.dtype) -> int:
    """Of the sums of `width` trained columns of the rows of [W, B]."""
    return vocab * width * accumulate_dtype(dtype).itemsize


def trained_width(inputs: Inputs, need: Need) -> int:
    """Columns of the rows of [W, B] whose gradient is wanted."""
    width = inputs.weight_VD.shape[1] if need.weight else 0
    return width + (0 if inputs.lora_b_VR is None else inputs.lora_b_VR.shape[1])


def spread(values_S: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Each token receives its segment's value."""
    return torch.ops.bvpo.segment_spread(values_S, cu_seqlens, num_tokens, values_S.dtype, "eager")


def factor_tokens(pairs: Pairs, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Upstream gradient of each token in its pair's margin, scaled to 1 at most; the scales [P].

    The first in the accumulation dtype, the second in fp64. Half precision has no room for
    p / length, but for p.
    """
    scale_P = pairs.factor_S.abs().view(-1, 2).amax(1)
    factor_S = (pairs.factor_S.view(-1, 2) / scale_P[:, None]).flatten().to(pairs.reference_S.dtype)
    return spread(factor_S, pairs.cu_seqlens, num_tokens), scale_P


def slopes(pairs: Pairs, scores_S: Tensor, which: slice) -> Tensor:
    """weight f'(m) of the pairs `which`, whose scores are given, fp64; 0 where the weight is."""
    segments = slice(2 * which.start, 2 * which.stop)
    ratio_S = (scores_S - pairs.reference_S[segments]).double() * pairs.factor_S[segments]
    options = dict(zip(pairs.names, pairs.values, strict=True))
    slope_P = SLOPES[pairs.loss](ratio_S.view(-1, 2).sum(1), pairs.beta, **options)
    weight_P = pairs.weight_P[which]
    return torch.where(weight_P != 0, weight_P * slope_P, 0)


class Keeper:
    """What statistics keep of each pair's gradient to the weight, as its tile is finished."""

    def __init__(self, inputs: Inputs, count: int, need: Need, asked: Asked) -> None:
        self.asked, self.plan, self.exact = asked, asked.plan, asked.plan.exact and need.weight
        like = inputs.hidden_TD
        vocab, dim = inputs.weight_VD.shape
        self.kept, self.rows_GUD = empty(like), empty(like)
        if not need.weight:
            return
        if self.plan.sketch:
            self.left_Vk = signs(vocab, self.plan.sketch, self.plan.seed, asked.layer, 0, like)
            self.right_Dk = signs(dim, self.plan.sketch, self.plan.seed, asked.layer, 1, like)
        if self.plan.sketch or self.plan.num_kinds:
            self.kept = self.kept.new_zeros(self.plan.kept_shape((vocab, dim)))
        if asked.rows_U is not None and self.exact:
            self.rows_GUD = self.rows_GUD.new_zeros(count, asked.rows_U.shape[0], dim)

    def see(self, pair: int, tile_VD: Tensor, slope: Tensor) -> None:
        if self.plan.sketch:
            self.kept[pair] = slope * (self.left_Vk.T @ tile_VD @ self.right_Dk)
        elif self.plan.num_kinds:
            kind = self.plan.kinds_G[pair : pair + 1]
            self.kept.index_add_(0, kind, (slope * tile_VD)[None])
        if self.rows_GUD.numel() and self.asked.rows_U is not None:
            self.rows_GUD[pair] = slope * tile_VD[self.asked.rows_U]

    def result(self, gram_PP: Tensor | None, slope_P: Tensor, dbias_PV: Tensor) -> Measured:
        count = len(slope_P)
        gram_GG = torch.zeros(count, count, dtype=torch.float64, device=slope_P.device)
        if gram_PP is not None:
            gram_GG += slope_P[:, None] * gram_PP * slope_P
        kept_bias = empty(self.kept)
        if dbias_PV.numel():
            bias_gram_GG, kept_bias = vector_statistics(dbias_PV, self.plan)
            gram_GG += bias_gram_GG
        return Measured(gram_GG, self.kept, kept_bias, self.rows_GUD)


def run(
    former: Former,
    inputs: Inputs,
    pairs: Pairs,
    scale_P: Tensor,
    need: Need,
    keeper: Keeper | None = None,
) -> tuple[Formed, Measured | None]:
    """One pass over the pairs in their order; results that are not wanted are without elements."""
    count, width = len(pairs.scored_P), trained_width(inputs, need)
    apart = keeper is not None and keeper.exact
    num_tiles = 0 if width == 0 else (count if apart else min(count, 2))
    tiles = former.tiles((num_tiles, len(inputs.weight_VD), width))
    new: Any = {"dtype": tiles.dtype, "device": tiles.device}
    dbias_PV = torch.empty(count, tiles.shape[1] if need.bias else 0, **new)
    slope_P, gram_PP = pairs.factor_S.new_empty(count), None
    for pair in range(count):
        tile = tiles[pair if apart else min(pair, 1)] if len(tiles) else None
        former.form(pair, tile, dbias_PV[pair] if need.bias else None)
        which = slice(pair, pair + 1)
        # What is formed are gradients of the margin over its scale.
        slope_P[pair] = (slopes(pairs, former.scores(pair), which) * scale_P[which])[0]
        if keeper is not None and tile is not None:
            keeper.see(pair, tile, slope_P[pair].to(tile.dtype))
        if tile is not None and not apart and (pair or count == 1):
            _join(tiles, slope_P, pair)
    if apart and len(tiles):
        weights = slope_P.to(tiles.dtype)
        gram_PP = torch.ops.bvpo.pair_reduce(tiles, tiles[0], weights, False)
    dbias_PV.mul_(slope_P[:, None])
    logprobs_T, unit_TE = former.results()
    if not len(tiles):  # no pairs, or nothing wanted
        total_VE = tiles.new_zeros(tiles.shape[1:] if tiles.shape[2] else 0)
    else:
        # Until the backward two tiles are kept at most.
        total_VE = tiles[0].clone() if len(tiles) > 2 else tiles[0]
    scores_S = segment_sum(logprobs_T, pairs.cu_seqlens)
    formed = Formed(scores_S, slope_P, unit_TE, total_VE, dbias_PV.sum(0))
    return formed, None if keeper is None else keeper.result(gram_PP, slope_P, dbias_PV)


def _join(tiles: Tensor, slope_P: Tensor, pair: int) -> None:
    """Add the tile of the pair to that of those before; the first has its own factor to come."""
    weights = slope_P[: pair + 1]
    if pair > 1:
        weights = torch.stack([torch.ones_like(slope_P[0]), slope_P[pair]])
    torch.ops.bvpo.pair_reduce(tiles, tiles[0], weights.to(tiles.dtype), False)
