"""What the LM head costs before it runs: its schedule's FLOPs and memory, from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

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


def scored_flops(shape: HeadShape) -> int:
    """2 TV (D + R): scores alone."""
    return 2 * shape.tokens * shape.vocab * shape.dim + _low_rank(shape)


def trained_flops(
    shape: HeadShape, dtype: torch.dtype, workspace_bytes: int, *, weight: bool
) -> int:
    """FLOPs of forward and backward, recomputation included (DESIGN.md, section 5).

    4 TVD for hidden alone; 8 with the weight, 10 where dH's fp32 accumulator leaves less than half
    the workspace to the tiles; with LoRA on a frozen weight 6 TV (D + R) and B's own 2 TVR.
    """
    product = 2 * shape.tokens * shape.vocab * shape.dim
    if shape.rank:
        return 3 * scored_flops(shape) + 2 * shape.tokens * shape.rank * shape.vocab
    if not weight:
        return 2 * product
    fits = dtype.itemsize == 4 or 4 * shape.tokens * shape.dim <= workspace_bytes // 2
    return (4 if fits else 5) * product


def _low_rank(shape: HeadShape) -> int:
    return 2 * shape.tokens * shape.rank * (shape.vocab + shape.dim)
