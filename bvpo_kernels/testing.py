"""How results are judged: against fp64, relative to what plain torch loses in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def ulp(scale: float, dtype: torch.dtype) -> float:
    """Spacing of `dtype` at a number of magnitude `scale`."""
    info = torch.finfo(dtype)
    return info.eps * max(abs(scale), info.tiny)


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, in fp64; infinite if `actual` has a NaN or an infinity."""
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - oracle.detach().double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max())


def norm_error(actual: Tensor, oracle: Tensor) -> float:
    """Euclidean norm of the difference, in fp64."""
    difference = actual.detach().double() - oracle.detach().double()
    return float(difference.nan_to_num(nan=float("inf")).norm())


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
    scale, norm = float(oracle.double().abs().max()), float(oracle.double().norm())
    got, allowed = (
        max_error(actual, oracle),
        2 * (max_error(eager, oracle) + ulp(scale, actual.dtype)) + bound,
    )
    worst = int((actual.double() - oracle.double()).abs().nan_to_num(nan=float("inf")).argmax())
    assert got <= allowed, f"{name}: max error {got:.3e} > {allowed:.3e} at flat index {worst}"
    got = norm_error(actual, oracle)
    allowed = 2 * (norm_error(eager, oracle) + ulp(norm, actual.dtype)) + bound
    assert got <= allowed, f"{name}: norm of the error {got:.3e} > {allowed:.3e}"
