"""Checks of arguments; those that read tensor values never make the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SCORE_DTYPES = (torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def require(valid: Tensor, expected: str, got: Callable[[], object]) -> None:
    """Raise `ValueError("{expected}, got {got()}")` unless the 0-dim boolean `valid` is true.

    On a GPU, and in a traced graph, the condition becomes an assertion that runs on the device: it
    carries the text of `expected` and raises RuntimeError, where it is noticed.
    """
    if valid.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(valid, expected)
    elif not bool(valid):
        raise ValueError(f"{expected}, got {got()}")


def number(name: str, value: float, valid: Callable[[float], bool], expected: str) -> None:
    """An int or a float, and `valid`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not valid(value):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def vector_like(first: Tensor, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """A vector of one of `dtypes`, with the shape and on the device of `first`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {list(dtypes)}, got {tensor.dtype}")
    if tensor.ndim != 1 or tensor.shape != first.shape:
        expected = list(first.shape) if first.ndim == 1 else "[P]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected device {first.device}, got {tensor.device}")


def cu_seqlens_form(cu_seqlens: Tensor) -> None:
    """What can be said of `cu_seqlens` without reading it: a vector of at least one int32."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape [S + 1], got {tuple(cu_seqlens.shape)}")


def cu_seqlens_values(cu_seqlens: Tensor, num_tokens: int) -> None:
    """`cu_seqlens` starts at 0, never decreases and ends at `num_tokens`."""
    require(
        cu_seqlens[0] == 0,
        "cu_seqlens: expected the first value to be 0",
        lambda: int(cu_seqlens[0]),
    )
    length_S = cu_seqlens.diff()
    require(
        (length_S >= 0).all(),
        "cu_seqlens: expected values that do not decrease",
        lambda: f"a step of {int(length_S.min())} at index {int(length_S.argmin()) + 1}",
    )
    require(
        cu_seqlens[-1] == num_tokens,
        f"cu_seqlens: expected the last value to be the number of tokens, {num_tokens}",
        lambda: int(cu_seqlens[-1]),
    )
