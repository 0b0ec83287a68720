"""cuBLAS GEMMs over tiles, one Triton kernel over each tile: the engine behind `impl="triton"`.

The mathematics is that of `eager/engine.py`. What differs: a tile is touched by one kernel that
reads it once, dZ and p are written in half precision over the products that they come from, the
accumulators are the GEMMs' own (beta = 1), and ignored rows are moved behind the scored ones on
the device, so that nothing waits for the host and a CUDA graph can hold the whole pass.

GEMM shapes cannot depend on a count that stays on the device, but on a bound that the host knows:
`max_scored` rows go through the GEMMs, those of them that are not scored as zeros. The row kernels
and the fused forward skip these.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bvpo_kernels import checks
from bvpo_kernels.backends import schedule
from bvpo_kernels.backends.eager.engine import mm
from bvpo_kernels.backends.schedule import HiddenSink, Tile
from bvpo_kernels.backends.triton import logprobs as row_kernels
from bvpo_kernels.backends.triton import logprobs_gemm, packing
from bvpo_kernels.backends.triton.configs import config
from bvpo_kernels.backends.triton.logprobs import Scored, Upstream
from bvpo_kernels.call import Call, Inputs, Kept

MAX_TOKENS = 8192
# A GEMM with fewer columns than this wastes the tensor cores; below it the fused forward runs.
MIN_COLUMNS = 1024
# Columns are cut at multiples of this, so that every tile's rows are aligned for 16-byte accesses.
COLUMN_STEP = 64
# Rows of a chunk with whole logits: a multiple of what a GEMM's tile takes.
ROW_STEP = 128
LOGIT_BYTES = 4
# Compaction, softmax state and results of a token.
VECTOR_BYTES = 64


class Rows(NamedTuple):
    """The scored tokens of a call, compacted: ranks, their inverse, and how many there are.

    The inverse, and all that is in compact order, has room for R rows: as many as may be scored.
    """

    position_T: Tensor
    index_R: Tensor
    num_scored: Tensor

    def take(self, values_T: Tensor) -> Tensor:
        """Values in compact order, 0 behind the last scored token."""
        taken_R = values_T.index_select(0, self.index_R.clamp(min=0))
        return taken_R.masked_fill_(self.index_R < 0, 0)


def compact(scored_T: Tensor, max_scored: int | None) -> Rows:
    """Without tokens there is nothing to launch."""
    num_tokens = scored_T.shape[0]
    if num_tokens == 0:
        none = torch.zeros(0, dtype=torch.int32, device=scored_T.device)
        return Rows(none, none, none.new_zeros(1))
    position_T, index_T, num_scored = packing.compact(scored_T)
    room = num_tokens if max_scored is None else max(max_scored, 1)
    return Rows(position_T, index_T[:room], num_scored)


def fit(num_tokens: int, vocab: int, workspace: int, token_bytes: int, column_bytes: int) -> Tile:
    """A tile whose logits, with `token_bytes` per row and `column_bytes` per column, fit.

    Never below 16 x `COLUMN_STEP`, whatever the workspace.
    """
    wide = min(vocab, MIN_COLUMNS) * LOGIT_BYTES
    tokens = max(min(num_tokens, MAX_TOKENS, workspace // 2 // (token_bytes + wide)), 16)
    tokens = max(min(tokens, num_tokens), 1)
    columns = (workspace - tokens * token_bytes) // (tokens * LOGIT_BYTES + column_bytes)
    columns = max(columns // COLUMN_STEP * COLUMN_STEP, COLUMN_STEP)
    return Tile(tokens, min(columns, vocab))


def over(z: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of `dtype` over the memory of z: row r starts where z's row r starts."""
    return z if dtype == z.dtype else z.view(dtype)[:, : z.shape[1]]


class _Sink:
    """dH in the call's order from the start: rows are scattered as they are finished."""

    def __init__(self, engine: TritonEngine) -> None:
        shape = (engine.scored_T.shape[0], engine.width)
        self.index_R = engine.rows.index_R
        self.rows = torch.zeros(shape, dtype=engine.dtype, device=engine.device)

    def put(self, tokens: slice, part: Tensor) -> None:
        packing.scatter_rows(part, self.index_R[tokens], self.rows)

    def result(self) -> Tensor:
        return self.rows


class TritonEngine:
    """`schedule.Engine`; without `kept` and `dlogprobs_T` it has no `dlogits`.

    fusing: take the fused forward where it is faster or alone fits.
    """

    fusing = True

    def __init__(
        self,
        inputs: Inputs,
        call: Call,
        kept: Kept | None = None,
        dlogprobs_T: Tensor | None = None,
    ) -> None:
        self._set_inputs(inputs, call)
        self._compact(inputs.target_T, self.scored_T, call.max_scored)
        if kept is not None and dlogprobs_T is not None:
            upstream_R = self.rows.take(dlogprobs_T).to(torch.float32) / self.head.temperature
            # Here, on R numbers: expm1 in the kernel would cost accuracy or a library.
            coefficient_R = -torch.expm1(self.rows.take(kept.logprobs_T)) * upstream_R
            lse_R = (self.rows.take(kept.max_T), self.rows.take(kept.logsum_T))
            self.upstream = Upstream(upstream_R, coefficient_R, *lse_R)

    def _set_inputs(self, inputs: Inputs, call: Call) -> None:
        self.head, self.call, hidden_TE = call.head(inputs), call, inputs.hidden_TD
        if inputs.low_TR is not None:
            hidden_TE = torch.cat([hidden_TE, inputs.low_TR], 1)
        self.hidden_TE = hidden_TE
        self.dtype, self.device, self.width = hidden_TE.dtype, hidden_TE.device, hidden_TE.shape[1]
        self.scored_T = inputs.target_T != call.ignore_index
        self._start, self._chunk = -1, hidden_TE

    def _compact(self, target_T: Tensor, kept_T: Tensor, max_scored: int | None) -> None:
        self.rows = compact(kept_T, max_scored)
        self.target_R = self.rows.take(target_T)
        self.num_rows = self.target_R.shape[0]

    def groups(self, ranges_G2: Tensor, scored_G: Tensor) -> list[slice]:
        """Compacted rows of ranges of tokens; how many are scored in each the host must know."""
        edges = [0, *scored_G.cumsum(0).tolist()]
        starts_G = ranges_G2[:, 0].to(self.device)
        before_G = (
            self.scored_T.cumsum(0, dtype=torch.int32)[starts_G] - self.scored_T[starts_G].int()
        )
        expected_G = torch.tensor(edges[:-1], device=self.device)
        checks.require(
            (before_G == expected_G).all() & (self.rows.num_scored[0] == edges[-1]),
            "target: expected the scored rows of the collected batch in each of its groups",
            lambda: f"{before_G.tolist()} before them, for {expected_G.tolist()}",
        )
        return [slice(*pair) for pair in itertools.pairwise(edges)]

    def forward_tile(self, unit: bool) -> Tile:
        """Also decides whether the fused forward serves: scores only, and faster on this chip, or
        no room for a GEMM."""
        head, workspace = self.head, self.call.workspace_bytes
        token_bytes = self.width * (self.dtype.itemsize + (4 if unit else 0)) + VECTOR_BYTES
        tile = fit(self.num_rows, head.vocab, workspace, token_bytes, 0)
        wide = tile.columns >= min(head.vocab, MIN_COLUMNS)
        faster = config(self.device).fused_scores
        plain = head.weight_VD.stride(1) == 1 and head.lora_b_VR is None
        self._fused = self.fusing and plain and not unit and (faster or not wide)
        if not self._fused:
            return tile
        hidden = self.hidden_TE
        shape = logprobs_gemm.gemm_config(hidden, head)
        token_bytes += logprobs_gemm.partial_bytes_per_token(
            head.vocab, shape, self.call.need_entropy
        )
        tokens = max(workspace // token_bytes, shape.block_m)
        return Tile(max(min(tokens, self.num_rows), 1), head.vocab)

    def hidden_tile(self) -> Tile:
        token_bytes = self.width * (self.dtype.itemsize + LOGIT_BYTES)
        return fit(self.num_rows, self.head.vocab, self.call.workspace_bytes, token_bytes, 0)

    def weight_tile(self, need_weight: bool, reserved: int, groups: int | None) -> Tile:
        column_bytes = self.width * LOGIT_BYTES * (groups or 1) if need_weight else 0
        return fit(
            self.num_rows,
            self.head.vocab,
            self.call.workspace_bytes - reserved,
            self.width * self.dtype.itemsize,
            column_bytes,
        )

    def hidden_fits(self) -> bool:
        return self.num_rows * self.width * LOGIT_BYTES <= self.call.workspace_bytes // 2

    def hidden(self, tokens: slice) -> Tensor:
        """Gathered, and kept while the same chunk is asked for."""
        if self._start != tokens.start or len(self._chunk) != tokens.stop - tokens.start:
            self._chunk = self.hidden_TE[:0]  # let the old chunk go before the new one is made
            self._chunk = packing.gather_rows(self.hidden_TE, self.rows.index_R[tokens])
            self._start = tokens.start
        return self._chunk

    def target(self, tokens: slice) -> Tensor:
        return self.target_R[tokens]

    def put_back(self, values_R: Tensor) -> Tensor:
        taken_T = values_R.index_select(0, self.rows.position_T.clamp(min=0))
        return taken_T.masked_fill_(~self.scored_T, 0)

    def scored(self, tokens: slice) -> Scored:
        return Scored(self.target_R[tokens], self.rows.num_scored)

    def new_state(self, tokens: slice) -> Tensor:
        return row_kernels.new_state(tokens.stop - tokens.start, self.device)

    def fused(self, tokens: slice) -> Tensor | None:
        if not self._fused:
            return None
        state = self.new_state(tokens)
        hidden = packing.gather_rows(self.hidden_TE, self.rows.index_R[tokens])
        logprobs_gemm.fused_forward(
            hidden,
            self.head,
            self.scored(tokens),
            state,
            tokens.start,
            entropy=self.call.need_entropy,
        )
        return state

    def fold(
        self, hidden: Tensor, state: Tensor, tokens: slice, columns: slice, unit: bool
    ) -> Tensor | None:
        z = self.product(hidden, columns, tokens)
        p = over(z, self.dtype) if unit else None
        row_kernels.forward_rows(
            z, self.scored(tokens), state, (tokens.start, columns.start), self.head,
            entropy=self.call.need_entropy, p=p,
        )  # fmt: skip
        return p

    def product(self, hidden: Tensor, columns: slice, tokens: slice) -> Tensor:
        """h W^T of a tile, fp32."""
        return mm(hidden, self.head.rows(columns).T)

    def dlogits(self, hidden: Tensor, tokens: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        z = self.product(hidden, columns, tokens)
        dz = over(z, dtype)
        row_kernels.backward_rows(
            z,
            dz,
            self.scored(tokens),
            self.upstream.of(tokens),
            (tokens.start, columns.start),
            self.head,
        )
        return dz

    def take(self, values_T: Tensor) -> Tensor:
        return self.rows.take(values_T)

    def whole_rows(self, room: int) -> int:
        row_bytes = self._padded_vocab * LOGIT_BYTES + VECTOR_BYTES
        row_bytes += self.width * (self.dtype.itemsize + LOGIT_BYTES)
        rows = room // row_bytes
        return max(rows // ROW_STEP * ROW_STEP, min(rows, ROW_STEP), 1)

    @property
    def _padded_vocab(self) -> int:
        return triton.cdiv(self.head.vocab, COLUMN_STEP) * COLUMN_STEP

    def form(
        self, hidden: Tensor, factor: Tensor, tokens: slice, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """dZ lies over the logits. Rows are padded: the next product reads them in 16 bytes."""
        rows, head, start = hidden.shape[0], self.head, (tokens.start, 0)
        z = torch.empty(rows, self._padded_vocab, device=self.device)[:, : head.vocab]
        for columns in schedule.whole_tiles(head):
            self.put_product(z[:, columns], hidden, head.rows(columns).T, add=False)
        state, scored = self.new_state(tokens), self.scored(tokens)
        row_kernels.forward_rows(z, scored, state, start, head)
        found = schedule.finish_rows(head, self.target(tokens), state, entropy=False)
        upstream = factor.to(torch.float32) / head.temperature
        coefficient = -torch.expm1(found.logprobs_T) * upstream
        values = Upstream(upstream, coefficient, found.max_T, found.logsum_T)
        dz = over(z, dtype)
        row_kernels.backward_rows(z, dz, scored, values, start, head)
        return found.logprobs_T, dz

    def put_product(self, total: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
        if add:
            self.add_product(total, left, right, slice(0), over_tokens=False)
        elif left.is_cuda and left.dtype != total.dtype:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        elif left.is_cuda:
            torch.mm(left, right, out=total)
        else:
            total.copy_(mm(left, right))

    def column_sums(self, dz: Tensor, tokens: slice) -> Tensor:
        return dz.sum(0)

    def add_product(
        self, total: Tensor, left: Tensor, right: Tensor, tokens: slice, over_tokens: bool
    ) -> None:
        """On a GPU inside the GEMM."""
        if left.is_cuda and left.dtype != total.dtype:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        elif left.is_cuda:
            total.addmm_(left, right)
        else:
            total.add_(mm(left, right))

    def hidden_sink(self) -> HiddenSink:
        return _Sink(self)

    def restore(self, dhidden_RE: Tensor) -> Tensor:
        sink = _Sink(self)
        sink.put(slice(0, self.num_rows), dhidden_RE)
        return sink.result()
