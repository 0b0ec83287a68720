"""How results are judged: against fp64, relative to what plain torch loses in the same dtype."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Elements that are compared at a time.
STRETCH = 1 << 20


def ulp(scale: float, dtype: torch.dtype) -> float:
    """Spacing of `dtype` at a number of magnitude `scale`."""
    info = torch.finfo(dtype)
    return info.eps * max(abs(scale), info.tiny)


class _Error(NamedTuple):
    """Of a difference: largest absolute value, its flat place, Euclidean norm."""

    largest: float
    place: int
    norm: float


def _error(actual: Tensor, oracle: Tensor) -> _Error:
    """In fp64, a NaN counting as infinity; by stretches, since the gradients of a head are so large
    that temporaries of their size cost more time than the comparison."""
    largest, place, norms = -1.0, 0, [0.0]
    parts = (tensor.detach().reshape(-1).split(STRETCH) for tensor in (actual, oracle))
    for start, (a, b) in enumerate(zip(*parts, strict=True)):
        difference = (a.double() - b.double()).abs_().nan_to_num_(nan=math.inf, posinf=math.inf)
        norms.append(float(difference.norm()))
        if len(difference) and float(difference.max()) > largest:
            largest = float(difference.max())
            place = start * STRETCH + int(difference.argmax())
    return _Error(max(largest, 0.0), place, math.hypot(*norms))


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, in fp64; infinite if `actual` has a NaN or an infinity."""
    return _error(actual, oracle).largest


def norm_error(actual: Tensor, oracle: Tensor) -> float:
    """Euclidean norm of the difference, in fp64; infinite as `max_error` is."""
    return _error(actual, oracle).norm


def assert_accurate(
    name: str, actual: Tensor, eager: Tensor, oracle: Tensor, bound: float = 0.0
) -> None:
    """error <= 2 x (error of `eager` + one ulp), in the maximum norm and in the Euclidean norm.

    Args:
        actual: what is tested. eager: plain torch in the same input dtype. oracle: fp64 result
            computed from the same (already rounded) inputs. All of one shape.
        bound: an error that is certified besides, in the Euclidean norm.

    Raises:
        AssertionError: with the error, what was allowed and where it is largest.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    if actual.numel() == 0:
        return
    norms = [float(torch.linalg.vector_norm(oracle.double(), order)) for order in (math.inf, 2)]
    scale, norm = (ulp(size, actual.dtype) for size in norms)
    got, plain = _error(actual, oracle), _error(eager, oracle)
    allowed = 2 * (plain.largest + scale) + bound
    assert got.largest <= allowed, (
        f"{name}: max error {got.largest:.3e} > {allowed:.3e} at flat index {got.place}"
    )
    allowed = 2 * (plain.norm + norm) + bound
    assert got.norm <= allowed, f"{name}: norm of the error {got.norm:.3e} > {allowed:.3e}"
