"""A linear head with a low-rank term, z = h W^T + x B^T + b, over [tokens, vocab] tiles.

h and x are put side by side once, and so are W and B, tile by tile: the rows of `logprobs` then do
the rest, and neither B A nor a copy of W is ever formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bvpo_kernels.eager.logprobs import (
    BackwardInputs,
    Head,
    accumulate_dtype,
    backward_hidden,
    dlogits,
    expand,
    forward_scored,
    mm,
    ranges,
    scored_rows,
    tile_shape,
)


class _SideBySide:
    """[W, B] of which only the rows that are asked for are put together."""

    def __init__(self, weight_VD: Tensor, b_VR: Tensor) -> None:
        self.weight_VD, self.b_VR = weight_VD, b_VR
        self.shape = (weight_VD.shape[0], weight_VD.shape[1] + b_VR.shape[1])

    def __getitem__(self, rows: Any) -> Tensor:
        return torch.cat([self.weight_VD[rows], self.b_VR[rows]], 1)


def _head(
    weight_VD: Tensor, b_VR: Tensor, bias_V: Tensor | None, temperature: float, cap: float | None
) -> Head:
    weight: Any = _SideBySide(weight_VD, b_VR)
    return Head(weight, bias_V, temperature, cap)


def forward(
    hidden_TD: Tensor,
    low_TR: Tensor,
    weight_VD: Tensor,
    b_VR: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace: int,
    need_entropy: bool,
) -> tuple[Tensor, ...]:
    """logprobs, max, logsum, entropy, [T]; the last is empty if it is not needed."""
    head = _head(weight_VD, b_VR, bias_V, temperature, softcap)
    num_tokens, rows = hidden_TD.shape[0], scored_rows(target_T, ignore_index)
    ignored_T = target_T == ignore_index
    both_TE, target_T = torch.cat([hidden_TD, low_TR], 1), target_T.masked_fill(ignored_T, 0)
    if rows is not None:
        both_TE, target_T = both_TE[rows], target_T[rows]
    result = forward_scored(both_TE, target_T, head, workspace, need_entropy, False)
    out = [
        hidden_TD.new_empty(0) if value is None else expand(value, rows, num_tokens)
        for value in result[:4]
    ]
    if rows is None:
        out[0] = out[0].masked_fill(ignored_T, 0)
        out[3] = out[3].masked_fill(ignored_T, 0) if need_entropy else out[3]
    return tuple(out)


def backward(
    dlogprobs_T: Tensor,
    hidden_TD: Tensor,
    low_TR: Tensor,
    weight_VD: Tensor,
    b_VR: Tensor,
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
) -> tuple[Tensor, ...]:
    """dhidden, dlow, dweight, dB, dbias; what is not needed is empty.

    6 TVD with a frozen weight (logits, their recomputation, dH), 8 with a trained one; B's part is
    R / D of each.
    """
    head = _head(weight_VD, b_VR, bias_V, temperature, softcap)
    num_tokens, rows = hidden_TD.shape[0], scored_rows(target_T, ignore_index)
    ignored_T = target_T == ignore_index
    inputs = BackwardInputs(
        dlogprobs_T.masked_fill(ignored_T, 0), torch.cat([hidden_TD, low_TR], 1),
        target_T.masked_fill(ignored_T, 0), logprobs_T, max_T, logsum_T,
    )  # fmt: skip
    if rows is not None:
        inputs = BackwardInputs(*(tensor[rows] for tensor in inputs))
    acc, dim = accumulate_dtype(hidden_TD.dtype), hidden_TD.shape[1]
    dboth_TE: Tensor | None = None
    fits = inputs.hidden_TD.numel() * acc.itemsize <= workspace // 2
    if need_hidden:
        dboth_TE = (
            torch.zeros_like(inputs.hidden_TD, dtype=acc)
            if fits
            else backward_hidden(inputs, head, workspace)
        )
    dweight_VD = torch.empty_like(weight_VD) if need_weight else None
    dbias_V = torch.empty_like(bias_V) if need_bias and bias_V is not None else None
    db_VR = torch.empty_like(b_VR)
    tokens, vocab_tile = tile_shape(
        inputs.hidden_TD.shape[0], weight_VD.shape[0], hidden_TD.device, workspace
    )
    for columns in ranges(weight_VD.shape[0], vocab_tile):
        tile_CE = head.weight_VD[columns]
        # Without the weight's gradient only the columns of B are formed.
        first = 0 if need_weight else dim
        dtile = torch.zeros_like(tile_CE[:, first:], dtype=acc)
        dbias_tile = torch.zeros(tile_CE.shape[0], dtype=acc, device=tile_CE.device)
        for chunk_rows in ranges(inputs.hidden_TD.shape[0], tokens):
            chunk = BackwardInputs(*(tensor[chunk_rows] for tensor in inputs))
            dz = dlogits(chunk, head, columns)
            dbias_tile += dz.sum(0)
            dz = dz.to(hidden_TD.dtype)
            dtile += mm(dz.T, chunk.hidden_TD[:, first:])
            if dboth_TE is not None and fits:
                dboth_TE[chunk_rows] += mm(dz, tile_CE)
        if dweight_VD is not None:
            dweight_VD[columns] = dtile[:, :dim]
        db_VR[columns] = dtile[:, dim - first :]
        if dbias_V is not None:
            dbias_V[columns] = dbias_tile
    empty = hidden_TD.new_empty(0)
    if dboth_TE is None:
        dhidden, dlow = empty, empty
    else:
        dboth_TE = expand(dboth_TE.to(hidden_TD.dtype), rows, num_tokens)
        dhidden, dlow = dboth_TE[:, :dim].contiguous(), dboth_TE[:, dim:].contiguous()
    return (
        dhidden, dlow, empty if dweight_VD is None else dweight_VD, db_VR,
        empty if dbias_V is None else dbias_V,
    )  # fmt: skip
