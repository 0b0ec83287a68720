"""Which trained parameters a model has, and which layers can measure their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import nn

from bvpo_kernels.grad_stats.layers import Layer

HEAD = "linear_logprobs"


@dataclass(frozen=True)
class Coverage:
    """Numbers of trained parameters: all, and those whose gradients are measured."""

    covered: int
    trained: int
    uncovered: tuple[str, ...]

    @property
    def share(self) -> float:
        """Covered share of the trained parameters, in [0, 1]; 1 for a model without any."""
        return self.covered / self.trained if self.trained else 1.0


@dataclass(frozen=True)
class Layout:
    """The layers to instrument, the trained parameters by index, and what they cover."""

    layers: tuple[Layer, ...]
    heads: tuple[Layer, ...]
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    coverage: Coverage

    @property
    def num_layers(self) -> int:
        return len(self.layers) + len(self.heads)


def lay_out(model: nn.Module, mode: str, head: nn.Module | None) -> Layout:
    """Find the trained parameters of `model` and the layers that can measure them.

    Covered are modules that run the forward of `nn.Linear` or `nn.Embedding` unchanged, and norms
    over the last axis (`_norm_form`). A parameter may have one owner, or be the weight of one
    embedding and one linear layer. In mode "norm" the norms alone.
    """
    indices: dict[int, int] = {}
    names: list[str] = []
    parameters: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            indices[id(parameter)] = len(parameters)
            names.append(name)
            parameters.append(parameter)
    owners = _owners(model, indices)
    layers = [
        layer
        for name, module in model.named_modules()
        if (layer := _layer(name, module, mode, indices, owners)) is not None
    ]
    covered = {i for layer in layers for i in (layer.weight, layer.bias) if i is not None}
    heads = [] if mode == "norm" else _heads(model, head, indices)
    # A head may read the embedding's weight without a module of its own.
    tied = {layer.weight for layer in heads}
    layers = [
        replace(layer, tied=layer.tied or (layer.kind == "embedding" and layer.weight in tied))
        for layer in layers
    ]
    embedded = {layer.weight for layer in layers if layer.kind == "embedding"}
    heads = [replace(layer, tied=layer.weight in embedded) for layer in heads]
    numbered = [replace(layer, index=number) for number, layer in enumerate(layers + heads)]
    missing = [i for i in range(len(names)) if i not in covered]
    coverage = Coverage(
        covered=sum(parameters[i].numel() for i in covered),
        trained=sum(parameter.numel() for parameter in parameters),
        uncovered=tuple(names[i] for i in missing),
    )
    return Layout(
        layers=tuple(numbered[: len(layers)]),
        heads=tuple(numbered[len(layers) :]),
        names=tuple(names),
        parameters=tuple(parameters),
        coverage=coverage,
    )


def _owners(model: nn.Module, indices: dict[int, int]) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) in indices:
                owners.setdefault(id(parameter), []).append(module)
    return owners


def _form(module: nn.Module) -> str | None:
    """ "linear", "embedding" or "norm" for a module that can be instrumented."""
    forward: Any = None if "forward" in module.__dict__ else type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return "linear"
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return "embedding" if plain else None
    return "norm" if _norm_form(module) is not None else None


def _layer(
    name: str,
    module: nn.Module,
    mode: str,
    indices: dict[int, int],
    owners: dict[int, list[nn.Module]],
) -> Layer | None:
    own = {n: p for n, p in module._parameters.items() if p is not None and id(p) in indices}
    if not own or not set(own) <= {"weight", "bias"}:
        return None
    form = _form(module)
    if form is None or (mode == "norm" and form != "norm"):
        return None
    tied = False
    for parameter_name, parameter in own.items():
        shared = owners[id(parameter)]
        if len(shared) > 1:
            tied = True
            forms = sorted(str(_form(owner)) for owner in shared)
            if forms != ["embedding", "linear"] or parameter_name != "weight":
                return None
    place = {n: indices[id(p)] for n, p in own.items()}
    eps, centered = (_norm_form(module) or (0.0, False)) if form == "norm" else (0.0, False)
    return Layer(name, module, form, 0, place.get("weight"), place.get("bias"), tied, eps, centered)


def _heads(model: nn.Module, head: nn.Module | None, indices: dict[int, int]) -> list[Layer]:
    """Modules whose trained weight `linear_logprobs` may be given: `head`, or what transformers
    calls the output embeddings, or else the input embeddings."""
    found: dict[int, Layer] = {}
    for module in [head] if head is not None else _embeddings(model):
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        places = indices.get(id(weight)), indices.get(id(bias))
        if module is not None and places != (None, None):
            found.setdefault(id(weight), Layer(HEAD, module, "head", 0, *places))
    return list(found.values())


def _embeddings(model: nn.Module) -> Iterator[nn.Module | None]:
    for module in model.modules():
        if isinstance(getattr(type(module), "get_output_embeddings", None), FunctionType):
            try:
                yield module.get_output_embeddings() or module.get_input_embeddings()  # type: ignore
            except (AttributeError, NotImplementedError):  # a base class that only declares them
                continue


def _norm_form(module: nn.Module) -> tuple[float, bool] | None:
    """(eps, centered) of a norm over the last axis whose weight's gradient is sum dY * xhat."""
    weight, kind = module._parameters.get("weight"), type(module)
    if weight is None or weight.ndim != 1:
        return None
    own = "forward" in module.__dict__  # a patch, as liger-kernel makes them
    if isinstance(module, nn.LayerNorm) and kind.forward is nn.LayerNorm.forward and not own:
        return module.eps, True
    if isinstance(module, nn.RMSNorm) and kind.forward is nn.RMSNorm.forward and not own:
        return torch.finfo(weight.dtype).eps if module.eps is None else module.eps, False
    if own and not hasattr(module.__dict__["forward"], "__func__"):
        return None  # a closure, which cannot be asked
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or len(module._parameters) > 1:
        return None
    return (eps, False) if _probe_norm(module, weight.shape[0], eps) else None


def _probe_norm(module: nn.Module, size: int, eps: float) -> bool:
    """Whether a forward of somebody else is an RMSNorm: asked of a copy with a weight of our own.

    It is asked where it will run: liger-kernel's runs on a GPU only, and is refused on a CPU.
    """
    # copy.copy would run the constructor of a module that FSDP2 has given another class.
    probe: Any = object.__new__(type(module))
    probe.__dict__ = module.__dict__.copy()
    device = module._parameters["weight"].device  # type: ignore[union-attr]
    if device.type == "meta" or (device.type == "cpu" and torch.cuda.is_available()):
        # Weights that are not there yet, or rest on the host between uses.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
            return False
    expected = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * dy).sum((0, 1))
    return bool(torch.allclose(gradient, expected, rtol=1e-4, atol=1e-4))
