"""What a module computes, as far as its trained parameters' gradients go: asked of its forward."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Form(NamedTuple):
    """kind: "linear", "embedding" or "norm". eps, centered: of a norm (centered: LayerNorm).
    transposed: a linear layer's weight is [D, P]. scale: factor of an embedding's rows;
    scale_rounded: it is rounded to their dtype first."""

    kind: str
    eps: float = 0.0
    centered: bool = False
    transposed: bool = False
    scale: float = 1.0
    scale_rounded: bool = False


def form(module: nn.Module) -> Form | None:
    """The form of a module that can be instrumented; None for others."""
    own = "forward" in module.__dict__  # a patch, as liger-kernel makes them
    forward: Any = None if own else type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return Form("linear")
    if forward is not None and forward is _conv1d_forward():
        return Form("linear", transposed=True)
    if isinstance(module, nn.Embedding):
        return _embedding_form(module, own)
    return _norm_form(module, own)


def _conv1d_forward() -> Any:
    """Of transformers' `Conv1D` (GPT-2), a linear layer by another name; None without it."""
    utilities = sys.modules.get("transformers.pytorch_utils")
    return None if utilities is None else utilities.Conv1D.forward


def _embedding_form(module: nn.Embedding, own: bool) -> Form | None:
    if own or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    if type(module).forward is nn.Embedding.forward:
        return Form("embedding")
    return _scaled_embedding(module)


def _scaled_embedding(module: nn.Embedding) -> Form | None:
    """Rows times one number (Gemma), of a copy with weights of our own; else None."""
    probe = _copy(module, padding_idx=None)
    device = _where(module)
    ids = torch.tensor([[4, 0, 6, 4]], device=device)
    values = torch.arange(28, dtype=torch.float64, device=device).reshape(7, 4)
    weights = [1 + values.sin() / 2, 1 + values.cos() / 3]

    def run(weight: Tensor) -> Tensor:
        probe._parameters = {"weight": nn.Parameter(weight)}
        return type(module).forward(probe, ids)

    try:
        with torch.no_grad():
            found = [run(weight) for weight in weights]
            scale = (found[0] / F.embedding(ids, weights[0])).mean().item()
            half = [weight.bfloat16() for weight in weights]
            found_half = [run(weight) for weight in half]
    except Exception:  # not a module that maps ids to rows of this weight
        return None
    expected = [scale * F.embedding(ids, weight) for weight in weights]
    if not scale or not _equal(found, expected, rtol=1e-12):
        return None
    for rounded in (False, True):
        factor = round_to(scale, torch.bfloat16) if rounded else scale
        if _equal(found_half, [F.embedding(ids, weight) * factor for weight in half], rtol=0):
            return Form("embedding", scale=scale, scale_rounded=rounded)
    return None


def _equal(found: list[Tensor], expected: list[Tensor], rtol: float) -> bool:
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=rtol, atol=0)
        for a, b in zip(found, expected, strict=True)
    )


def round_to(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=dtype).item()


def _norm_form(module: nn.Module, own: bool) -> Form | None:
    """A norm over the last axis whose weight's gradient is sum dY * xhat."""
    weight, kind = module._parameters.get("weight"), type(module)
    if weight is None or weight.ndim != 1:
        return None
    if isinstance(module, nn.LayerNorm) and kind.forward is nn.LayerNorm.forward and not own:
        return Form("norm", module.eps, centered=True)
    if isinstance(module, nn.RMSNorm) and kind.forward is nn.RMSNorm.forward and not own:
        return Form("norm", torch.finfo(weight.dtype).eps if module.eps is None else module.eps)
    if own and not hasattr(module.__dict__["forward"], "__func__"):
        return None  # a closure, which cannot be asked
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or len(module._parameters) > 1:
        return None
    for centered in _which_norm(module, weight.shape[0], eps):
        return Form("norm", eps, centered)
    return None


def _which_norm(module: nn.Module, size: int, eps: float) -> list[bool]:
    """Whether a forward of somebody else is an RMSNorm, [False], or a LayerNorm, [True]; []: none.

    Asked of a copy with a weight of our own, where it will run: liger-kernel's runs on a GPU only,
    and is refused on a CPU.
    """
    probe, device = _copy(module), _where(module)
    values = torch.arange(3 * size, dtype=torch.float32, device=device).reshape(1, 3, size)
    x, dy, weight = values.sin(), values.cos(), nn.Parameter(values[0, 0].mul(0.7).cos())
    probe._parameters = {"weight": weight}
    # A patch is bound to the module, not to the copy.
    forward = getattr(module.__dict__.get("forward"), "__func__", type(module).forward)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            y = forward(probe, x)
            (gradient,) = torch.autograd.grad(y, weight, dy.clone())
        except Exception:  # not a module that maps one tensor to one tensor with this weight
            return []
    found = []
    for centered in (False, True):
        centre = x - x.mean(-1, keepdim=True) if centered else x
        xhat = centre * torch.rsqrt(centre.square().mean(-1, keepdim=True) + eps)
        if torch.allclose(gradient, (xhat * dy).sum((0, 1)), rtol=1e-4, atol=1e-4):
            found.append(centered)
    return found


def _copy(module: nn.Module, **attributes: Any) -> Any:
    """A shallow copy, for other parameters, with some attributes replaced."""
    # copy.copy would run the constructor of a module that FSDP2 has given another class.
    probe: Any = object.__new__(type(module))
    probe.__dict__ = {**module.__dict__, **attributes}
    return probe


def _where(module: nn.Module) -> torch.device:
    device = module._parameters["weight"].device  # type: ignore[union-attr]
    if device.type == "meta" or (device.type == "cpu" and torch.cuda.is_available()):
        # Weights that are not there yet, or rest on the host between uses.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device
