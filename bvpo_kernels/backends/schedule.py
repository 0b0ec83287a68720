"""The sweeps over tiles of [tokens, vocab] logits, written once over an engine.

A tile is formed, consumed and dropped, so memory is bounded by the workspace whatever T and V are.
The target's column is kept out of the running sum: with s = sum_{v != y} exp(z_v - m) the
log-probability is logsigmoid(z_y - m - log s), which does not cancel when p_y -> 1, and neither
does the target's gradient 1 - p_y = -expm1(logp).

An engine (`eager/engine.py`, `triton/engine.py`) says how rows are compacted, how large a tile is
and how one is multiplied and consumed. C++ has a sweep of its own (csrc/cpu/backward.h).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bvpo_kernels.call import Call, Gradients, Head, Need, accumulate_dtype

# Rows of a chunk's running state [6, rows]: of the columns but the target's their maximum m, the
# sums of exp(z_v - m) and, for the entropy, of exp(z_v - m) (z_v - m); the target's logit and its
# softcap's slope; the factor by which the last tile rescaled the sums.
MAX, SUM, WEIGHTED, TARGET_Z, TARGET_SLOPE, RESCALE = range(6)


# Columns of one product with the rows of a head that has LoRA, which are copied to be joined.
JOINED_COLUMNS = 16384


class Tile(NamedTuple):
    tokens: int
    columns: int


class ForwardResult(NamedTuple):
    """Per-token results; lse = max_T + logsum_T. `unit_grad_TD` is d logp_t / d hidden_t."""

    logprobs_T: Tensor
    max_T: Tensor
    logsum_T: Tensor
    entropy_T: Tensor | None
    unit_grad_TD: Tensor | None


class HiddenSink(Protocol):
    """Where a sweep over tokens puts finished rows of dH."""

    def put(self, tokens: slice, part: Tensor) -> None: ...

    def result(self) -> Tensor: ...


class Engine(Protocol):
    """One call of the head on one kind of device, its scored rows compacted to R."""

    head: Head
    call: Call
    dtype: torch.dtype
    device: torch.device
    width: int  # columns of a row: D, with LoRA D + R
    num_rows: int

    def forward_tile(self, unit: bool) -> Tile: ...

    def hidden_tile(self) -> Tile: ...

    def weight_tile(self, need_weight: bool, reserved: int, groups: int | None) -> Tile: ...

    def hidden_fits(self) -> bool:
        """Whether dH's accumulator leaves half the workspace to the tiles."""

    def hidden(self, tokens: slice) -> Tensor:
        """Rows of a chunk."""

    def target(self, tokens: slice) -> Tensor: ...

    def put_back(self, values_R: Tensor) -> Tensor:
        """Values in the call's order, 0 where nothing is scored."""

    def groups(self, ranges_G2: Tensor, scored_G: Tensor) -> list[slice]:
        """Compacted rows of ranges of tokens, of which so many are scored."""

    def new_state(self, tokens: slice) -> Tensor: ...

    def fused(self, tokens: slice) -> Tensor | None:
        """The state after all columns where one kernel forms it, else None."""

    def fold(
        self, hidden: Tensor, state: Tensor, tokens: slice, columns: slice, unit: bool
    ) -> Tensor | None:
        """Take a tile into the state; with `unit` p = exp(z - m) slope, 0 at y, in `dtype`."""

    def dlogits(self, hidden: Tensor, tokens: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """d loss / d (h W^T + b) of a tile, recomputed."""

    def column_sums(self, dz: Tensor, tokens: slice) -> Tensor: ...

    def add_product(
        self, total: Tensor, left: Tensor, right: Tensor, tokens: slice, over_tokens: bool
    ) -> None:
        """total += left @ right in the accumulation dtype; over_tokens: those are summed."""

    def take(self, values_T: Tensor) -> Tensor:
        """Values in compact order."""

    def whole_rows(self, room: int) -> int:
        """Rows whose logits over the whole vocabulary take at most `room` bytes; at least one."""

    def form(
        self, hidden: Tensor, factor: Tensor, tokens: slice, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities, and factor d logp / d (h W^T + b) over the whole vocabulary."""

    def put_product(self, total: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
        """total = left @ right in the accumulation dtype, added to what it holds with `add`."""

    def hidden_sink(self) -> HiddenSink: ...

    def restore(self, dhidden_RE: Tensor) -> Tensor:
        """An accumulator of R rows as dH in the call's order, rounded."""


def ranges(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def whole_tiles(head: Head) -> Iterator[slice]:
    """The columns of the products by which a chunk of rows meets the whole vocabulary."""
    return ranges(head.vocab, head.vocab if head.lora_b_VR is None else JOINED_COLUMNS)


def p_log_p(logprobs_T: Tensor) -> Tensor:
    """p log p, 0 for p = 0."""
    return logprobs_T.exp() * logprobs_T.clamp_min(torch.finfo(logprobs_T.dtype).min)


def finish_rows(
    head: Head,
    target_T: Tensor,
    state: Tensor,
    entropy: bool,
    unit_TD: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> ForwardResult:
    """Join the target's own entry to the sums over the other columns."""
    max_T, sum_T, target_z_T = state[MAX], state[SUM], state[TARGET_Z]
    # logsigmoid(z_y - lse_others), the difference taken before log s is added: exact for offsets.
    shift_T = max_T.where(max_T > -torch.inf, target_z_T)  # V = 1: the others are empty
    relative_T, others_T = target_z_T - shift_T, sum_T.log()
    logprobs_T = torch.nn.functional.logsigmoid(relative_T - others_T)
    # Kept apart from the shift: a large offset of all logits must not eat the fraction. And not
    # z_y - logp, which cancels for a target far below the maximum.
    logsum_T = torch.logaddexp(relative_T, others_T)
    entropy_T = None
    if entropy:
        # H = -p_y log p_y - sum_{v != y} p_v (z_v - lse), with sum_{v != y} p_v = 1 - p_y.
        rest_T = state[WEIGHTED] * torch.exp(-logsum_T) + logsum_T * torch.expm1(logprobs_T)
        entropy_T = -(p_log_p(logprobs_T) + rest_T)
    if unit_TD is not None:
        unit_TD.mul_(-torch.exp(-logsum_T)[:, None])
        coefficient_T = -torch.expm1(logprobs_T) * state[TARGET_SLOPE]
        unit_TD.addcmul_(coefficient_T[:, None], head.weight_VD[target_T].to(unit_TD.dtype))
        unit_TD.div_(head.temperature)
        unit_TD = unit_TD.to(dtype)
    return ForwardResult(logprobs_T, shift_T, logsum_T, entropy_T, unit_TD)


def forward_chunk(
    engine: Engine, tokens: slice, columns: int, unit: bool
) -> tuple[Tensor, Tensor | None]:
    """State of a chunk's rows after all columns, and with `unit` sum_v exp(z_v - m) slope_v W_v.

    2 TVD, with `unit` 4 TVD.
    """
    state = engine.fused(tokens)
    if state is not None:
        return state, None
    state, hidden = engine.new_state(tokens), engine.hidden(tokens)
    unit_TD = torch.zeros_like(hidden, dtype=accumulate_dtype(engine.dtype)) if unit else None
    for tile in ranges(engine.head.vocab, columns):
        p = engine.fold(hidden, state, tokens, tile, unit)
        if unit_TD is not None and p is not None:
            unit_TD.mul_(state[RESCALE][:, None])
            engine.add_product(unit_TD, p, engine.head.rows(tile), tokens, over_tokens=False)
        # Gone before the next tile is made; not on a CPU, whose allocator would give the pages back
        # and fault them in again for every tile (T=512 D=576 V=49152 bf16: 230 ms, else 170).
        if engine.device.type != "cpu":
            del p
    return state, unit_TD


def forward(engine: Engine, unit: bool) -> tuple[Tensor, ...]:
    """The op `bvpo::linear_logprobs_forward`: `Kept`, entropy, unit gradient; what is not wanted is
    empty."""
    entropy, tile = engine.call.need_entropy, engine.forward_tile(unit)
    acc = accumulate_dtype(engine.dtype)
    none = torch.empty(0, dtype=acc, device=engine.device)
    parts, sink = [], engine.hidden_sink() if unit else None
    for tokens in ranges(engine.num_rows, tile.tokens):
        state, unit_TD = forward_chunk(engine, tokens, tile.columns, unit)
        target = engine.target(tokens)
        result = finish_rows(engine.head, target, state, entropy, unit_TD, engine.dtype)
        if sink is not None and result.unit_grad_TD is not None:
            sink.put(tokens, result.unit_grad_TD)
        parts.append([values for values in result[:4] if values is not None])
        del unit_TD, result  # before the next chunk is gathered
    wanted = 4 if entropy else 3
    columns: Any = zip(*parts, strict=True) if parts else [(none,)] * wanted
    vectors = [engine.put_back(torch.cat(values)) for values in columns]
    unit_TD = torch.empty(0, dtype=engine.dtype, device=engine.device)
    return (
        *vectors[:3],
        *no_lists(none),
        vectors[3] if entropy else none.clone(),
        unit_TD if sink is None else sink.result(),
    )


def no_lists(like: Tensor) -> tuple[Tensor, ...]:
    """What `Kept` has of lists where the backward is exact."""
    empty = {dtype: like.new_empty(0, dtype=dtype) for dtype in (torch.int64, torch.int32)}
    return (like.new_empty(0), *empty.values(), like.new_empty(0))


class Visitor:
    """What becomes of the gradients of [W, b] (and B): here they are stored, rounded once.

    groups: ranges of the compacted rows that are summed apart in db, and with `apart` in dW.
    num_tiles: of dW, that share the workspace with the logits; None: one, which counts for nothing.
    """

    apart = False
    num_tiles: int | None = None

    def __init__(self, engine: Engine, need: Need) -> None:
        head = engine.head
        self.engine, self.groups = engine, [slice(0, engine.num_rows)]
        self.dweight_VD = torch.empty_like(head.weight_VD) if need.weight else None
        self.dbias_V = None
        if need.bias and head.bias_V is not None:
            self.dbias_V = torch.empty_like(head.bias_V)
        self.dlora_b_VR = None if head.lora_b_VR is None else torch.empty_like(head.lora_b_VR)

    def see(self, dz: Tensor, tokens: slice, columns: slice) -> None:
        """A tile of dZ, in the inputs' dtype."""

    def store(self, columns: slice, dweight_GCE: Tensor | None, dbias_GC: Tensor | None) -> None:
        """The gradients of some columns: dW in one tile, or one per group; db per group."""
        if dweight_GCE is not None:
            self.store_weight(columns, dweight_GCE[0])
        if self.dbias_V is not None and dbias_GC is not None:
            self.dbias_V[columns] = dbias_GC[0]

    def store_weight(self, columns: slice, dweight_CE: Tensor) -> None:
        rank = 0 if self.dlora_b_VR is None else self.dlora_b_VR.shape[1]
        own = dweight_CE.shape[1] - rank
        if self.dweight_VD is not None:
            self.dweight_VD[columns] = dweight_CE[:, :own]
        if self.dlora_b_VR is not None:
            self.dlora_b_VR[columns] = dweight_CE[:, own:]


def _sweep(
    engine: Engine, visitor: Visitor, need: Need, dhidden_RE: Tensor | None, first: int | None
) -> None:
    """The gradients of [W, b], finished tile by tile; adds dH in compact order to `dhidden_RE`.

    first: leading columns of the rows that dW is formed without, None for no dW at all.
    """
    head, acc = engine.head, accumulate_dtype(engine.dtype)
    reserved = 0 if dhidden_RE is None else dhidden_RE.numel() * acc.itemsize
    groups = len(visitor.groups)
    tile = engine.weight_tile(first is not None, reserved, visitor.num_tiles)
    for columns in ranges(head.vocab, tile.columns):
        weight = head.rows(columns)
        new: Any = {"dtype": acc, "device": engine.device}
        dweight = None
        if first is not None:
            tiles = groups if visitor.apart else 1
            dweight = torch.zeros(tiles, len(weight), engine.width - first, **new)
        dbias = torch.zeros(groups, len(weight), **new) if need.bias else None
        for number, group in enumerate(visitor.groups):
            place = number if visitor.apart else 0
            for part in ranges(group.stop - group.start, tile.tokens):
                tokens = slice(group.start + part.start, group.start + part.stop)
                hidden = engine.hidden(tokens)
                dz = engine.dlogits(hidden, tokens, columns, acc if need.bias else engine.dtype)
                if dbias is not None:  # summed before dZ is rounded
                    dbias[number] += engine.column_sums(dz, tokens)
                    dz = dz.to(engine.dtype)
                if dweight is not None:
                    engine.add_product(
                        dweight[place], dz.T, hidden[:, first:], tokens, over_tokens=True
                    )
                if dhidden_RE is not None:
                    engine.add_product(dhidden_RE[tokens], dz, weight, tokens, over_tokens=False)
                visitor.see(dz, tokens, columns)
                del dz
        visitor.store(columns, dweight, dbias)


def _hidden_alone(engine: Engine) -> Tensor:
    """dH: tokens outermost, so that the accumulator is one chunk of rows."""
    tile, sink = engine.hidden_tile(), engine.hidden_sink()
    for tokens in ranges(engine.num_rows, tile.tokens):
        hidden = engine.hidden(tokens)
        part = torch.zeros_like(hidden, dtype=accumulate_dtype(engine.dtype))
        for columns in ranges(engine.head.vocab, tile.columns):
            dz = engine.dlogits(hidden, tokens, columns, engine.dtype)
            engine.add_product(part, dz, engine.head.rows(columns), tokens, over_tokens=False)
            del dz
        sink.put(tokens, part)
        del hidden, part
    return sink.result()


def backward(engine: Engine, need: Need, visitor: Visitor | None = None) -> Gradients:
    """Exact gradients by recomputing each tile once: 8 TVD in all, with what the forward took.

    Vocabulary tiles run outermost, so dW is finished tile by tile and dH accumulates over R x D
    numbers. Where those do not fit half the workspace, dH gets a sweep of its own with tokens
    outermost (10 TVD): memory is never traded away.
    """
    visitor = visitor or Visitor(engine, need)
    lora = engine.head.lora_b_VR is not None
    trained = need.weight or need.bias or lora
    dhidden: Tensor | None = None
    result = torch.empty(0, dtype=engine.dtype)
    if need.hidden and trained and engine.hidden_fits():
        shape = (engine.num_rows, engine.width)
        acc = accumulate_dtype(engine.dtype)
        dhidden = torch.zeros(shape, dtype=acc, device=engine.device)
    elif need.hidden:
        result = _hidden_alone(engine)
    if trained:
        first = 0 if need.weight else (engine.head.weight_VD.shape[1] if lora else None)
        _sweep(engine, visitor, need, dhidden, first)
    if dhidden is not None:
        result = engine.restore(dhidden)
    dim = engine.head.weight_VD.shape[1]
    return Gradients(
        hidden_TD=result[:, :dim].contiguous() if need.hidden else None,
        weight_VD=visitor.dweight_VD,
        bias_V=visitor.dbias_V,
        low_TR=result[:, dim:].contiguous() if need.hidden and lora else None,
        lora_b_VR=visitor.dlora_b_VR,
    )
