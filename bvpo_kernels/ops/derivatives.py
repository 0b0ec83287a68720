"""Derivatives that are not there raise: a zero would look like a result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Refused(torch.autograd.Function):
    """The gradients themselves; their own backward raises.

    It hangs on the tensors that the gradients were made of: autograd skips a node from which no
    path leads to what is differentiated, and with it the error.
    """

    @staticmethod
    def forward(ctx: Any, num_sources: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[num_sources:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            "bvpo_kernels: second derivatives are not served (double backward through a fused "
            "backward); expected a first derivative, or a naive head for what needs more"
        )


def once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backward formula whose result raises NotImplementedError when it is differentiated.

    Unlike `torch.autograd.function.once_differentiable` it also raises where the upstream gradient
    itself needs none, as that of a sum.
    """

    @functools.wraps(backward)
    def formula(ctx: Any, *upstream: Tensor | None) -> tuple:
        with torch.no_grad():
            result = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return result
        sources = [t for t in (*ctx.saved_tensors, *upstream) if t is not None and t.requires_grad]
        given = [tensor for tensor in result if tensor is not None]
        refused = iter(_Refused.apply(len(sources), *sources, *given))
        return tuple(None if tensor is None else next(refused) for tensor in result)

    return formula


def check_reverse_mode(function: str, *tensors: Tensor | None) -> None:
    """None of the tensors is a dual number of forward-mode differentiation (jvp).

    Raises:
        NotImplementedError: naming the function.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{function}: forward-mode derivatives (jvp) are not served; expected backward"
            )
