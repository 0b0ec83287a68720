"""What the LM head costs before it runs: its schedule's FLOPs and memory, from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bvpo_kernels.backends import one_pass

DEFAULT_WORKSPACE_BYTES = 128 * 2**20
# Room for dH in fp32 up to 32 768 tokens of D = 4096: below that the backward costs 10 TVD.
DEFAULT_CUDA_WORKSPACE_BYTES = 2**30


class HeadShape(NamedTuple):
    """T tokens, D hidden, V vocabulary, R rank of LoRA (0: none)."""

    tokens: int
    dim: int
    vocab: int
    rank: int = 0


def default_workspace(device: str) -> int:
    """`workspace_bytes` of `linear_logprobs` where none is given, for a type of device."""
    return DEFAULT_CUDA_WORKSPACE_BYTES if device == "cuda" else DEFAULT_WORKSPACE_BYTES


class OnePassBytes(NamedTuple):
    """Of one pass over pairs: the sums of dW, which stay until the backward, and the logits."""

    tiles: int
    logits: int

    @property
    def total(self) -> int:
        return self.tiles + self.logits


def one_pass_bytes(
    shape: HeadShape,
    dtype: torch.dtype,
    impl: str,
    *,
    weight: bool,
    tiles: int,
    rows: int | None = None,
) -> OnePassBytes:
    """What `linear_bvpo_loss` takes on a backend with the logits of so many rows at once.

    tiles: pairs, of which two share theirs with all others; with exact gradient statistics each
    has its own. weight: whether W is trained, and not its LoRA alone. rows: None is the default.
    """
    width = (shape.dim if weight else 0) + shape.rank
    rows = min(one_pass.DEFAULT_ROWS[impl] if rows is None else rows, max(shape.tokens, 1))
    logits = rows * one_pass.LOGIT_BYTES[impl] * shape.vocab
    return OnePassBytes(tiles * one_pass.tile_bytes(shape.vocab, width, dtype), logits)


def scored_flops(shape: HeadShape) -> int:
    """2 TV (D + R): scores alone."""
    return 2 * shape.tokens * shape.vocab * shape.dim + _low_rank(shape)


def trained_flops(
    shape: HeadShape, dtype: torch.dtype, workspace_bytes: int | None, *, weight: bool
) -> int:
    """FLOPs of forward and backward, recomputation included (DESIGN.md, section 5).

    workspace_bytes: None for one pass over pairs, 6 TVD. Else 4 TVD for hidden alone; 8 with the
    weight, 10 where dH's fp32 accumulator leaves less than half the workspace to the tiles; with
    LoRA on a frozen weight 6 TV (D + R) and B's own 2 TVR, in one pass 4 TV (D + R).
    """
    product = 2 * shape.tokens * shape.vocab * shape.dim
    if workspace_bytes is None and (weight or shape.rank):
        own = product if weight else 0
        return 2 * scored_flops(shape) + own + 2 * shape.tokens * shape.rank * shape.vocab
    if shape.rank or workspace_bytes is None:
        return 3 * scored_flops(shape) + 2 * shape.tokens * shape.rank * shape.vocab
    if not weight:
        return 2 * product
    fits = dtype.itemsize == 4 or 4 * shape.tokens * shape.dim <= workspace_bytes // 2
    return (4 if fits else 5) * product


def _low_rank(shape: HeadShape) -> int:
    return 2 * shape.tokens * shape.rank * (shape.vocab + shape.dim)
