"""LM-head schedules for GPUs: cuBLAS GEMMs over tiles, one row kernel over each tile of products.

The mathematics is that of `eager/logprobs.py`. What differs: a tile is touched by one kernel that
reads it once, dZ and p are written in half precision over the products that they come from, the
accumulators are the GEMMs' own (beta = 1), and ignored rows are moved behind the scored ones on
the device, so that nothing waits for the host and a CUDA graph can hold the whole pass.

GEMM shapes cannot depend on a count that stays on the device, but on a bound that the host knows:
`max_scored` rows go through the GEMMs, those of them that are not scored as zeros. The row kernels
and the fused forward skip these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bvpo_kernels.eager.logprobs import (
    BackwardInputs,
    ForwardResult,
    Head,
    finish_rows,
    mm,
    ranges,
)
from bvpo_kernels.kernels import logprobs as triton_rows
from bvpo_kernels.kernels import logprobs_gemm, packing
from bvpo_kernels.kernels.configs import config

MAX_TOKENS = 8192
# A GEMM with fewer columns than this wastes the tensor cores; below it the fused forward runs.
MIN_COLUMNS = 1024
# Columns are cut at multiples of this, so that every tile's rows are aligned for 16-byte accesses.
COLUMN_STEP = 64
LOGIT_BYTES = 4
# Compaction, softmax state and results of a token.
VECTOR_BYTES = 64


class RowKernels(NamedTuple):
    """What runs between the GEMMs; the arguments of `kernels/logprobs.py`."""

    forward: Callable[..., None]
    backward: Callable[..., None]


class _Tile(NamedTuple):
    tokens: int
    columns: int


class _Rows(NamedTuple):
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

    def put_back(self, values_R: Tensor, scored_T: Tensor) -> Tensor:
        """Values in the call's order, 0 where nothing is scored."""
        return values_R.index_select(0, self.position_T.clamp(min=0)).masked_fill_(~scored_T, 0)


class _Chunks:
    """Gathered hidden rows of one chunk at a time; kept while the same chunk is asked for."""

    def __init__(self, hidden_TD: Tensor, index_R: Tensor) -> None:
        self._hidden_TD, self._index_R = hidden_TD, index_R
        self._start, self._rows = -1, hidden_TD

    def __getitem__(self, tokens: slice) -> Tensor:
        if self._start != tokens.start:
            self._rows = self._hidden_TD[:0]  # let the old chunk go before the new one is made
            self._rows = packing.gather_rows(self._hidden_TD, self._index_R[tokens])
            self._start = tokens.start
        return self._rows


def _tile(
    num_tokens: int, vocab: int, workspace: int, token_bytes: int, column_bytes: int
) -> _Tile:
    """A tile whose logits, with `token_bytes` per row and `column_bytes` per column, fit.

    Never below 16 x `COLUMN_STEP`, whatever the workspace.
    """
    wide = min(vocab, MIN_COLUMNS) * LOGIT_BYTES
    tokens = max(min(num_tokens, MAX_TOKENS, workspace // 2 // (token_bytes + wide)), 16)
    tokens = min(tokens, num_tokens)
    columns = (workspace - tokens * token_bytes) // (tokens * LOGIT_BYTES + column_bytes)
    columns = max(columns // COLUMN_STEP * COLUMN_STEP, COLUMN_STEP)
    return _Tile(tokens, min(columns, vocab))


def _over(z: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of `dtype` over the memory of z: row r starts where z's row r starts."""
    return z if dtype == z.dtype else z.view(dtype)[:, : z.shape[1]]


def _add_product(accumulator: Tensor, left: Tensor, right: Tensor) -> None:
    """accumulator += left @ right, in fp32; on a GPU inside the GEMM."""
    if left.is_cuda and left.dtype != accumulator.dtype:
        torch.addmm(accumulator, left, right, out_dtype=accumulator.dtype, out=accumulator)
    elif left.is_cuda:
        accumulator.addmm_(left, right)
    else:
        accumulator.add_(mm(left, right))


def _options(head: Head) -> dict[str, Any]:
    """The row kernels' options: they index the bias by column of the whole vocabulary."""
    return {"bias_V": head.bias_V, "softcap": head.softcap, "temperature": head.temperature}


def _forward_chunk(
    hidden_TD: Tensor, target_T: Tensor, count: Tensor, start: int, head: Head, columns: int,
    entropy: bool, unit: bool, kernels: RowKernels,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """State of a chunk's rows after all vocabulary tiles, and with `unit` sum_v exp(z_v - m) W_v.

    2 TVD, with `unit` 4 TVD.
    """
    state = triton_rows.new_state(hidden_TD.shape[0], hidden_TD.device)
    unit_TD = torch.zeros_like(hidden_TD, dtype=torch.float32) if unit else None
    for tile in ranges(head.weight_VD.shape[0], columns):
        z = mm(hidden_TD, head.weight_VD[tile].T)
        p = _over(z, hidden_TD.dtype) if unit else None
        kernels.forward(z, target_T, count, state, start, tile.start, entropy=entropy, p=p,
                        **_options(head))  # fmt: skip
        if unit_TD is not None and p is not None:
            unit_TD.mul_(state[triton_rows.RESCALE][:, None])
            _add_product(unit_TD, p, head.weight_VD[tile])
        del z, p  # before the next tile is made
    return state, unit_TD


def _fused_chunk(
    hidden_TD: Tensor, target_T: Tensor, count: Tensor, start: int, head: Head, entropy: bool
) -> Tensor:
    state = triton_rows.new_state(hidden_TD.shape[0], hidden_TD.device)
    logprobs_gemm.fused_forward(hidden_TD, head.weight_VD, target_T, count, state, start,
                                entropy=entropy, **_options(head))  # fmt: skip
    return state


def _forward_tile(
    num_tokens: int, hidden_TD: Tensor, head: Head, workspace: int, entropy: bool, unit: bool
) -> tuple[_Tile, bool]:
    """The tile, and whether the fused forward serves it: scores only, and faster on this chip, or
    no room for a GEMM."""
    weight_VD = head.weight_VD
    dim, vocab = hidden_TD.shape[1], weight_VD.shape[0]
    token_bytes = dim * (hidden_TD.element_size() + (4 if unit else 0)) + VECTOR_BYTES
    tile = _tile(num_tokens, vocab, workspace, token_bytes, 0)
    wide = tile.columns >= min(vocab, MIN_COLUMNS)
    faster = config(hidden_TD.device).fused_scores
    if unit or weight_VD.stride(1) != 1 or (wide and not faster):
        return tile, False
    shape = logprobs_gemm.gemm_config(hidden_TD, weight_VD, head.bias_V, head.softcap)
    token_bytes += logprobs_gemm.partial_bytes_per_token(vocab, shape, entropy)
    tokens = max(workspace // token_bytes, shape.block_m)
    return _Tile(min(tokens, num_tokens), vocab), True


def _compact(target_T: Tensor, ignore_index: int, max_scored: int | None) -> tuple[_Rows, Tensor]:
    scored_T = target_T != ignore_index
    position_T, index_T, num_scored = packing.compact(scored_T)
    room = target_T.shape[0] if max_scored is None else max(max_scored, 1)
    return _Rows(position_T, index_T[:room], num_scored), scored_T


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace: int,
    need_entropy: bool,
    need_unit_grad: bool,
    *,
    kernels: RowKernels,
    max_scored: int | None = None,
) -> tuple[Tensor, ...]:
    """The op `bvpo::linear_logprobs_forward`; results that are not wanted are empty."""
    head = Head(weight_VD, bias_V, temperature, softcap)
    unit_TD = hidden_TD.new_zeros(hidden_TD.shape if need_unit_grad else 0)
    if hidden_TD.shape[0] == 0:
        vectors = [hidden_TD.new_zeros(0, dtype=torch.float32) for _ in range(3)]
        empty = hidden_TD.new_zeros(0, dtype=torch.float32 if need_entropy else hidden_TD.dtype)
        return (*vectors, empty, unit_TD)
    rows, scored_T = _compact(target_T, ignore_index, max_scored)
    target_R = rows.take(target_T)
    tile, fused = _forward_tile(
        target_R.shape[0], hidden_TD, head, workspace, need_entropy, need_unit_grad
    )
    parts: list[Any] = []
    for tokens in ranges(target_R.shape[0], tile.tokens):
        hidden, target = packing.gather_rows(hidden_TD, rows.index_R[tokens]), target_R[tokens]
        unit = None
        if fused:
            state = _fused_chunk(hidden, target, rows.num_scored, tokens.start, head, need_entropy)
        else:
            state, unit = _forward_chunk(
                hidden, target, rows.num_scored, tokens.start, head, tile.columns, need_entropy,
                need_unit_grad, kernels,
            )  # fmt: skip
        result = _finish(hidden_TD.dtype, target, head, state, need_entropy, unit)
        if result.unit_grad_TD is not None:
            packing.scatter_rows(result.unit_grad_TD, rows.index_R[tokens], unit_TD)
        parts.append(result[:4])
        del hidden, unit, result  # before the next chunk is gathered
    columns = [[part[i] for part in parts] for i in range(4 if need_entropy else 3)]
    out = [rows.put_back(torch.cat(values), scored_T) for values in columns]
    return (*out, *([] if need_entropy else [hidden_TD.new_empty(0)]), unit_TD)


def _finish(
    dtype: torch.dtype, target_T: Tensor, head: Head, state: Tensor, entropy: bool,
    unit_TD: Tensor | None,
) -> ForwardResult:  # fmt: skip
    return finish_rows(
        dtype, target_T, head, state[triton_rows.MAX], state[triton_rows.SUM],
        state[triton_rows.TARGET_Z], state[triton_rows.TARGET_SLOPE],
        state[triton_rows.WEIGHTED] if entropy else None, unit_TD,
    )  # fmt: skip


class _Backward:
    """What the sweeps of a backward share: compacted inputs, the head, the kernels."""

    def __init__(
        self, inputs: BackwardInputs, rows: _Rows, head: Head, workspace: int, kernels: RowKernels
    ) -> None:
        self.rows, self.head, self.workspace, self.kernels = rows, head, workspace, kernels
        self.hidden_TD = inputs.hidden_TD
        self.target_R = rows.take(inputs.target_T)
        self.num_rows = self.target_R.shape[0]
        upstream_R = rows.take(inputs.dlogprobs_T).to(torch.float32) / head.temperature
        # Here, on R numbers: expm1 in the kernel would cost accuracy or a library.
        coefficient_R = -torch.expm1(rows.take(inputs.logprobs_T)) * upstream_R
        kept = (rows.take(inputs.max_T), rows.take(inputs.logsum_T))
        self.row_values = (upstream_R, coefficient_R, *kept)

    def dlogits(self, hidden: Tensor, tokens: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """d loss / d (h W^T + b) for one tile, recomputed; `dtype` is fp32 or hidden's."""
        z = mm(hidden, self.head.weight_VD[columns].T)
        dz = _over(z, dtype)
        self.kernels.backward(
            z, dz, self.target_R[tokens], self.rows.num_scored,
            *(values_R[tokens] for values_R in self.row_values),
            tokens.start, columns.start, **_options(self.head),
        )  # fmt: skip
        return dz

    def hidden(self) -> Tensor:
        """dH alone: tokens outermost, so that the accumulator is one chunk of rows."""
        dim, vocab = self.hidden_TD.shape[1], self.head.weight_VD.shape[0]
        dtype = self.hidden_TD.dtype
        tile = _tile(self.num_rows, vocab, self.workspace, dim * (dtype.itemsize + 4), 0)
        dhidden_TD = self.hidden_TD.new_zeros(self.hidden_TD.shape)
        for tokens in ranges(self.num_rows, tile.tokens):
            hidden = packing.gather_rows(self.hidden_TD, self.rows.index_R[tokens])
            part = torch.zeros_like(hidden, dtype=torch.float32)
            for columns in ranges(vocab, tile.columns):
                dz = self.dlogits(hidden, tokens, columns, dtype)
                _add_product(part, dz, self.head.weight_VD[columns])
                del dz
            packing.scatter_rows(part, self.rows.index_R[tokens], dhidden_TD)
            del hidden, part
        return dhidden_TD

    def weight(
        self, need_weight: bool, need_bias: bool, dhidden_RD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """dW and db, finished tile by tile; adds dH (compact order, fp32) into `dhidden_RD`."""
        head, dtype = self.head, self.hidden_TD.dtype
        dim, vocab = self.hidden_TD.shape[1], head.weight_VD.shape[0]
        reserved = 0 if dhidden_RD is None else dhidden_RD.numel() * LOGIT_BYTES
        tile = _tile(
            self.num_rows, vocab, self.workspace - reserved, dim * dtype.itemsize,
            dim * LOGIT_BYTES if need_weight else 0,
        )  # fmt: skip
        dweight_VD = head.weight_VD.new_empty(head.weight_VD.shape) if need_weight else None
        dbias_V = torch.empty_like(head.bias_V) if need_bias and head.bias_V is not None else None
        chunks = _Chunks(self.hidden_TD, self.rows.index_R)
        for columns in ranges(vocab, tile.columns):
            weight = head.weight_VD[columns]
            dweight = torch.zeros(weight.shape, device=weight.device) if need_weight else None
            dbias = torch.zeros(weight.shape[0], device=weight.device)
            for tokens in ranges(self.num_rows, tile.tokens):
                hidden = chunks[tokens]
                dz = self.dlogits(hidden, tokens, columns, torch.float32 if need_bias else dtype)
                if need_bias:  # summed before dZ is rounded
                    dbias += dz.sum(0)
                    dz = dz.to(dtype)
                if dweight is not None:
                    _add_product(dweight, dz.T, hidden)
                if dhidden_RD is not None:
                    _add_product(dhidden_RD[tokens], dz, weight)
                del dz
            if dweight_VD is not None and dweight is not None:
                dweight_VD[columns] = dweight
            if dbias_V is not None:
                dbias_V[columns] = dbias
        return dweight_VD, dbias_V


def dlogits(rows: BackwardInputs, head: Head, columns: slice) -> Tensor:
    """`eager.logprobs.dlogits` of half-precision or fp32 rows, in fp32, by one pass over h W^T."""
    z = mm(rows.hidden_TD, head.weight_VD[columns].T)
    upstream_T = rows.dlogprobs_T / head.temperature
    everything = torch.full((1,), z.shape[0], dtype=torch.int32, device=z.device)
    triton_rows.backward_rows(
        z, z, rows.target_T, everything, upstream_T, -torch.expm1(rows.logprobs_T) * upstream_T,
        rows.max_T, rows.logsum_T, 0, columns.start, **_options(head),
    )  # fmt: skip
    return z


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
    *,
    kernels: RowKernels,
    max_scored: int | None = None,
) -> tuple[Tensor, ...]:
    """The op `bvpo::linear_logprobs_backward`; gradients that are not wanted are empty.

    8 TVD in all where dH's fp32 accumulator fits half the workspace; otherwise dH gets a sweep of
    its own, 10 TVD.
    """
    head = Head(weight_VD, bias_V, temperature, softcap)
    need_bias = need_bias and bias_V is not None
    nothing = hidden_TD.new_empty(0)
    if hidden_TD.shape[0] == 0:
        return (
            hidden_TD.new_zeros(hidden_TD.shape) if need_hidden else nothing,
            weight_VD.new_zeros(weight_VD.shape) if need_weight else nothing.clone(),
            nothing.clone() if bias_V is None or not need_bias else torch.zeros_like(bias_V),
        )
    rows, _ = _compact(target_T, ignore_index, max_scored)
    inputs = BackwardInputs(dlogprobs_T, hidden_TD, target_T, logprobs_T, max_T, logsum_T)
    sweeps = _Backward(inputs, rows, head, workspace, kernels)
    dhidden = dweight = dbias = None
    if not (need_weight or need_bias):
        dhidden = sweeps.hidden() if need_hidden else None
    elif need_hidden and sweeps.num_rows * hidden_TD.shape[1] * LOGIT_BYTES > workspace // 2:
        dhidden = sweeps.hidden()
        dweight, dbias = sweeps.weight(need_weight, need_bias, None)
    elif need_hidden:
        compact_RD = torch.zeros(sweeps.num_rows, hidden_TD.shape[1], device=hidden_TD.device)
        dweight, dbias = sweeps.weight(need_weight, need_bias, compact_RD)
        dhidden = hidden_TD.new_zeros(hidden_TD.shape)
        packing.scatter_rows(compact_RD, rows.index_R, dhidden)
    else:
        dweight, dbias = sweeps.weight(need_weight, need_bias, None)
    grads = (dhidden, dweight, dbias)
    return tuple(nothing.clone() if grad is None else grad for grad in grads)
