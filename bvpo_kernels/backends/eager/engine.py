"""Tiles of plain torch, on any device: the engine behind `impl="eager"`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bvpo_kernels.backends.schedule import (
    MAX,
    RESCALE,
    SUM,
    TARGET_SLOPE,
    TARGET_Z,
    WEIGHTED,
    HiddenSink,
    Tile,
    finish_rows,
    ranges,
    whole_tiles,
)
from bvpo_kernels.call import Call, Head, Inputs, Kept, accumulate_dtype

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


def tile_shape(num_tokens: int, vocab: int, device: torch.device, workspace: int) -> Tile:
    """Tokens and vocabulary columns of a tile that fits the workspace."""
    elements = max(workspace // BYTES_PER_LOGIT, 1)
    if device.type == "cpu":
        elements, vocab = min(elements, CPU_TILE_ELEMENTS), min(vocab, CPU_TILE_COLUMNS)
    tokens = max(min(num_tokens, TOKENS_PER_TILE, elements), 1)
    return Tile(tokens, max(min(vocab, elements // tokens), 1))


def logits_tile(hidden_TD: Tensor, head: Head, columns: slice) -> tuple[Tensor, Tensor | None]:
    """A tile of final logits and, with a softcap, its derivative factor 1 - tanh^2."""
    return _finish_logits(mm(hidden_TD, head.rows(columns).T), head, columns)


def whole_logits(hidden_TD: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """The same of all columns, formed by tiles: LoRA copies the rows of W that it reads."""
    acc = accumulate_dtype(hidden_TD.dtype)
    z = hidden_TD.new_empty(hidden_TD.shape[0], head.vocab, dtype=acc)
    for columns in whole_tiles(head):
        z[:, columns] = mm(hidden_TD, head.rows(columns).T)
    return _finish_logits(z, head, slice(0, head.vocab))


def _finish_logits(z: Tensor, head: Head, columns: slice) -> tuple[Tensor, Tensor | None]:
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


def scored_rows(target_T: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows to compute; None means all of them.

    Ignored rows are compacted away where that needs no host synchronisation; on a GPU they run
    through the GEMM with a placeholder target and their results are masked.
    """
    if target_T.is_cuda:
        return None
    scored_T = target_T != ignore_index
    return None if bool(scored_T.all()) else scored_T.nonzero()[:, 0]


class _Sink:
    def __init__(self, engine: TorchEngine) -> None:
        shape = (engine.num_rows, engine.width)
        self.engine = engine
        self.rows = torch.empty(shape, dtype=engine.dtype, device=engine.device)

    def put(self, tokens: slice, part: Tensor) -> None:
        self.rows[tokens] = part

    def result(self) -> Tensor:
        return self.engine.put_back(self.rows)


class TorchEngine:
    """`schedule.Engine`; without `kept` and `dlogprobs_T` it has no `dlogits`."""

    def __init__(
        self,
        inputs: Inputs,
        call: Call,
        kept: Kept | None = None,
        dlogprobs_T: Tensor | None = None,
    ) -> None:
        self.head, self.call = call.head(inputs), call
        hidden_TE, target_T = inputs.hidden_TD, inputs.target_T
        if inputs.low_TR is not None:
            hidden_TE = torch.cat([hidden_TE, inputs.low_TR], 1)
        self.dtype, self.device, self.width = hidden_TE.dtype, hidden_TE.device, hidden_TE.shape[1]
        self.ignored_T = target_T == call.ignore_index
        self.index = scored_rows(target_T, call.ignore_index)
        self._hidden_RE = self.take(hidden_TE)
        self._target_R = self.take(target_T.masked_fill(self.ignored_T, 0))
        self.num_rows = self._target_R.shape[0]
        if kept is not None and dlogprobs_T is not None:
            upstream_R = self.take(dlogprobs_T.masked_fill(self.ignored_T, 0))
            self._upstream_R = upstream_R / self.head.temperature
            self._coefficient_R = -torch.expm1(self.take(kept.logprobs_T)) * self._upstream_R
            self._lse_R = self.take(kept.max_T), self.take(kept.logsum_T)

    def take(self, values_T: Tensor) -> Tensor:
        return values_T if self.index is None else values_T[self.index]

    def put_back(self, values_R: Tensor) -> Tensor:
        if self.index is not None:
            shape = (self.ignored_T.shape[0], *values_R.shape[1:])
            return values_R.new_zeros(shape).index_copy_(0, self.index, values_R)
        if self.device.type == "cpu":  # all rows are scored
            return values_R
        return values_R.masked_fill(self.ignored_T.view(-1, *[1] * (values_R.ndim - 1)), 0)

    def groups(self, ranges_G2: Tensor, scored_G: Tensor) -> list[slice]:
        """Compacted rows of ranges of tokens."""
        edges = ranges_G2
        if self.index is not None:
            edges = torch.searchsorted(self.index, ranges_G2)
        return [slice(start, stop) for start, stop in edges.tolist()]

    def _tile(self) -> Tile:
        return tile_shape(self.num_rows, self.head.vocab, self.device, self.call.workspace_bytes)

    def forward_tile(self, unit: bool) -> Tile:
        return self._tile()

    def hidden_tile(self) -> Tile:
        return self._tile()

    def weight_tile(self, need_weight: bool, reserved: int, groups: int | None) -> Tile:
        """Without `groups` a quarter of what a logit costs is enough for a tile of dW."""
        if groups is None:
            return self._tile()
        half = self.call.workspace_bytes // 2
        tile = tile_shape(self.num_rows, self.head.vocab, self.device, half)
        bytes_per_column = groups * self.width * accumulate_dtype(self.dtype).itemsize
        return Tile(tile.tokens, max(min(tile.columns, half // bytes_per_column), 1))

    def hidden_fits(self) -> bool:
        acc = accumulate_dtype(self.dtype)
        size = self.num_rows * self.width * acc.itemsize
        return acc == self.dtype or size <= self.call.workspace_bytes // 2

    def hidden(self, tokens: slice) -> Tensor:
        return self._hidden_RE[tokens]

    def target(self, tokens: slice) -> Tensor:
        return self._target_R[tokens]

    def new_state(self, tokens: slice) -> Tensor:
        new: Any = {"dtype": accumulate_dtype(self.dtype), "device": self.device}
        state = torch.zeros(6, tokens.stop - tokens.start, **new)
        state[MAX], state[TARGET_SLOPE] = -torch.inf, 1.0
        return state

    def fused(self, tokens: slice) -> None:
        return None

    def fold(
        self, hidden: Tensor, state: Tensor, tokens: slice, columns: slice, unit: bool
    ) -> Tensor | None:
        """One step of the online softmax."""
        z, slope = logits_tile(hidden, self.head, columns)
        inside_T, index_T1 = target_column(self._target_R[tokens], columns)
        max_T, sum_T = state[MAX], state[SUM]
        old_T = set_target(z, inside_T, index_T1, torch.full_like(max_T, -torch.inf))
        state[TARGET_Z] = torch.where(inside_T, old_T, state[TARGET_Z])
        new_max_T = torch.maximum(max_T, z.amax(1))
        # A tile may hold nothing but the target: then its maximum is -inf, and shifting by it NaN.
        shift_T = new_max_T.where(new_max_T > -torch.inf, 0.0)
        rescale_T = state[RESCALE].copy_(torch.exp(max_T - shift_T))
        if self.call.need_entropy:
            # Entropy needs sum p z; the excluded target's -inf must not meet a zero.
            shifted = z - shift_T[:, None]
            p = shifted.exp()
            state[WEIGHTED] += torch.where(sum_T > 0, max_T - shift_T, 0.0) * sum_T
            set_target(shifted, inside_T, index_T1, torch.zeros_like(shift_T))
            state[WEIGHTED].mul_(rescale_T).add_(weighted_sum(p, shifted))
        else:
            p = z.sub_(shift_T[:, None]).exp_()
        sum_T.mul_(rescale_T).add_(p.sum(1))
        max_T.copy_(new_max_T)
        if not unit:
            return None
        if slope is not None:
            slope_y_T = slope.gather(1, index_T1)[:, 0]
            state[TARGET_SLOPE] = torch.where(inside_T, slope_y_T, state[TARGET_SLOPE])
            p.mul_(slope)
        return p.to(self.dtype)

    def dlogits(self, hidden: Tensor, tokens: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        z, slope = logits_tile(hidden, self.head, columns)
        max_R, logsum_R = self._lse_R
        z.sub_(max_R[tokens, None]).sub_(logsum_R[tokens, None]).exp_()
        z.mul_(-self._upstream_R[tokens, None])
        inside_T, index_T1 = target_column(self._target_R[tokens], columns)
        set_target(z, inside_T, index_T1, self._coefficient_R[tokens])
        return (z.mul_(slope) if slope is not None else z).to(dtype)

    def whole_rows(self, room: int) -> int:
        return max(room // (self.head.vocab * BYTES_PER_LOGIT), 1)

    def form(
        self, hidden: Tensor, factor: Tensor, tokens: slice, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        z, slope = whole_logits(hidden, self.head)
        target = self.target(tokens)
        index_R1, state = target[:, None], self.new_state(tokens)
        state[TARGET_Z] = z.gather(1, index_R1)[:, 0]
        z.scatter_(1, index_R1, -torch.inf)
        state[MAX] = z.amax(1)
        shift_R = state[MAX].where(state[MAX] > -torch.inf, state[TARGET_Z])
        state[SUM] = z.sub_(shift_R[:, None]).exp_().sum(1)
        found = finish_rows(self.head, target, state, entropy=False)
        upstream_R = factor / self.head.temperature
        own_R = -torch.expm1(found.logprobs_T) * upstream_R
        z.mul_((-upstream_R * torch.exp(-found.logsum_T))[:, None])
        z.scatter_(1, index_R1, own_R[:, None])
        return found.logprobs_T, (z.mul_(slope) if slope is not None else z).to(dtype)

    def put_product(self, total: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
        if left.dtype != total.dtype or left.is_cuda:
            part = mm(left, right)
            total.add_(part) if add else total.copy_(part)
            return
        for stretch in ranges(left.shape[1], CPU_STRETCH):
            beta = 1 if add or stretch.start else 0
            torch.addmm(total, left[:, stretch], right[stretch], beta=beta, out=total)

    def column_sums(self, dz: Tensor, tokens: slice) -> Tensor:
        return dz.sum(0)

    def add_product(
        self, total: Tensor, left: Tensor, right: Tensor, tokens: slice, over_tokens: bool
    ) -> None:
        total += mm(left, right)

    def hidden_sink(self) -> HiddenSink:
        return _Sink(self)

    def restore(self, dhidden_RE: Tensor) -> Tensor:
        return self.put_back(dhidden_RE.to(self.dtype))
