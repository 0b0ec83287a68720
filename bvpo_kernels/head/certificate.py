"""What a sparse backward left out, bounded: recorded on demand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bvpo_kernels.backends import sparse
from bvpo_kernels.call import Call, Inputs, inputs_of

# Elements of the weight whose row norms are formed at a time.
NORM_CHUNK = 1 << 24


@dataclass(frozen=True)
class Certificate:
    """One backward of `linear_logprobs` with tail_tolerance > 0; tensors stay on its device.

    With b_t = |dlogp_t| tail_t for sparse tokens and 0 for dense ones, T the temperature:

        |dH_t - exact|   <= dhidden_bound_T[t] = b_t max_v |W_v| / T
        |dW - exact|_F   <= dweight_bound      = sum_t b_t |h_t| / T
        |dbias - exact|  <= sum_bound / T

    num_tokens, num_dense: tokens scored, and those of them that took the exact backward.
    num_entries: entries of all stored lists. "exact" is the result for tail_tolerance = 0; both
    have the rounding errors of their dtype besides.
    """

    num_tokens: Tensor
    num_dense: Tensor
    num_entries: Tensor
    max_bound: Tensor
    sum_bound: Tensor
    dhidden_bound_T: Tensor
    dweight_bound: Tensor


_log: list[Certificate] | None = None


@contextmanager
def tail_certificates() -> Iterator[list[Certificate]]:
    """Record a certificate for each backward whose forward runs inside the block, in its order.

    It reads the weight once more (its row norms). Blocks do not nest.

    Raises:
        RuntimeError: inside another such block.
    """
    global _log
    if _log is not None:
        raise RuntimeError("tail_certificates: expected no enclosing block, got one")
    log: list[Certificate] = []
    _log = log
    try:
        yield log
    finally:
        _log = None


def record(
    logprobs_T: Tensor, inputs: Inputs, call: Call, tail_T: Tensor, num_entries: Tensor
) -> None:
    """Inside a block, have the backward of `logprobs_T` leave its certificate."""
    if _log is None or not logprobs_T.requires_grad:
        return
    log = _log
    given = inputs_of(None if tensor is None else tensor.detach() for tensor in inputs)

    def note(dlogprobs_T: Tensor) -> None:
        log.append(certify(dlogprobs_T.detach(), given, call, tail_T, num_entries))

    logprobs_T.register_hook(note)


def certify(
    dlogprobs_T: Tensor, inputs: Inputs, call: Call, tail_T: Tensor, num_entries: Tensor
) -> Certificate:
    """The bounds, in fp64.

    tail_T: [T], probability left out by each token's list; empty where the backward was exact.
    """
    scored_T = inputs.target_T != call.ignore_index
    sparse_T = torch.zeros_like(scored_T)
    if tail_T.numel():
        sparse_T = sparse.sparse_tokens(dlogprobs_T, tail_T, scored_T, call.tail_tolerance)
        tail_T = tail_T.double()
    else:
        tail_T = torch.zeros_like(dlogprobs_T, dtype=torch.float64)
    bound_T = (dlogprobs_T.double().abs() * tail_T).masked_fill(~sparse_T, 0)
    hidden_norm_T = _row_norms(inputs.hidden_TD).masked_fill(~sparse_T, 0)
    largest_row = _row_norms(inputs.weight_VD).max()
    largest = bound_T.max() if bound_T.shape[0] else bound_T.sum()
    return Certificate(
        num_tokens=scored_T.sum(),
        num_dense=(scored_T & ~sparse_T).sum(),
        num_entries=num_entries,
        max_bound=largest,
        sum_bound=bound_T.sum(),
        dhidden_bound_T=bound_T * largest_row / call.temperature,
        dweight_bound=(bound_T * hidden_norm_T).sum() / call.temperature,
    )


def _row_norms(matrix: Tensor) -> Tensor:
    rows = max(NORM_CHUNK // max(matrix.shape[1], 1), 1)
    return torch.cat([part.double().square().sum(1).sqrt() for part in matrix.split(rows)])
