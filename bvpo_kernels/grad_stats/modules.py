"""Models seen from outside: the causal LMs in them, and their mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import nn


def has_embeddings(module: nn.Module) -> bool:
    """Whether a module tells its embeddings as transformers' models do."""
    return isinstance(getattr(type(module), "get_output_embeddings", None), FunctionType)


def causal_models(model: nn.Module) -> list[Any]:
    """The outermost modules of transformers in `model` that can be run on token ids."""
    found: list[Any] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        if has_embeddings(module) and hasattr(module, "config"):
            found.append(module)
            inside |= {id(below) for below in module.modules()}
    return found


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model.train(training)` for a while; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
