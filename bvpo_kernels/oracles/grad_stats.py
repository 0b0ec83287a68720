"""Oracle of the gradient statistics: every unit and kind alone, one backward each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bvpo_kernels.types import Unit


def group_gradients(
    units: Sequence[Unit],
    kinds: Sequence[str],
    parameters: Sequence[Tensor],
    loss: Callable[[Unit], Tensor],
) -> list[list[list[Tensor]]]:
    """grads[unit][kind][parameter]: the gradient of `loss` of a unit cut down to that kind."""
    return [
        [
            _gradients(loss(Unit(unit.unit_id, {kind: unit.pairs[kind]})), parameters)
            for kind in kinds
        ]
        for unit in units
    ]


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def unit_gram(gradients: Sequence[Sequence[Sequence[Tensor]]]) -> Tensor:
    """<g_k,i, g_l,j> over all parameters, [B, B, K, K], fp64."""
    flat = torch.stack(
        [
            torch.stack([torch.cat([p.double().flatten() for p in kind]) for kind in unit])
            for unit in gradients
        ]
    )
    return torch.einsum("ikp,jlp->ijkl", flat, flat)
