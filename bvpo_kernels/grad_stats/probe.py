"""Run a model once on a few tokens, to see how its layers are called before the first step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from bvpo_kernels.grad_stats.modules import causal_models, in_mode

# The number of tokens must be no other size of the model: that is how their axis is known.
_LENGTHS = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


class Use(NamedTuple):
    """How a layer was called. axis: the axis of the tokens; None if the rows of its input are not
    those of the tokens in order, or it was called in another way than once with one tensor."""

    axis: int | None


class _Calls(dict[str, list[tuple[int, ...] | None]]):
    """The leading sizes of the input of each call of a layer; None for another kind of call."""


def observe(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Use]:
    """How a forward of each causal LM of transformers in `model` calls `layers`, by name.

    Layers that no forward reached are absent: those of another modality, say, or all of them where
    nothing could be run (no causal LM, weights on the meta device or sharded, an attention that
    needs other inputs): these are judged in the first collection. Layers whose names differ by
    numbers alone share a verdict: an expert that saw no token is one that sees some.
    """
    uses: dict[str, Use] = {}
    for causal in causal_models(model):
        if any(_is_elsewhere(p) for p in causal.parameters()):
            continue
        tokens, calls = _free_length(causal), _Calls()
        with in_mode(causal, training=False), _recording(layers, calls):
            _run(causal, tokens, calls)
        uses |= {name: Use(_token_axis(found, tokens)) for name, found in calls.items()}
    siblings: dict[str, list[str]] = {}
    for name in layers:
        siblings.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    for names in siblings.values():
        if any(name in uses and uses[name].axis is None for name in names):
            uses |= dict.fromkeys(names, Use(None))
    return uses


def _is_elsewhere(parameter: Tensor) -> bool:
    flat = type(parameter).__name__ == "FlatParameter"  # FSDP1
    hollow = parameter.is_meta or isinstance(parameter, DTensor | FakeTensor)
    return hollow or flat or not parameter.numel()


def _free_length(model: Any) -> int:
    sizes = {size for p in model.parameters() for size in p.shape}
    config = model.config.get_text_config()
    sizes |= {value for value in vars(config).values() if isinstance(value, int)}
    return next((length for length in _LENGTHS if length not in sizes), _LENGTHS[-1])


@torch.no_grad()
def _run(model: Any, tokens: int, calls: _Calls) -> None:
    embedding = model.get_input_embeddings().weight
    ids = [(7919 * n + 11) % embedding.shape[0] for n in range(tokens)]
    ids_1T = torch.tensor([ids], device=embedding.device)
    # Some attentions serve half precision alone, as the model will be run under autocast.
    for half in (False, True):
        cast = torch.autocast(embedding.device.type, torch.bfloat16, enabled=half)
        try:
            with torch.compiler.set_stance("force_eager"), cast:
                model(input_ids=ids_1T, use_cache=False)
            return
        except Exception:  # the first collection will say what this model needs
            calls.clear()


@contextmanager
def _recording(layers: Mapping[str, nn.Module], calls: _Calls) -> Iterator[None]:
    forwards = [_recorded(name, module.forward, calls) for name, module in layers.items()]
    with replaced_forwards(list(layers.values()), forwards):
        yield


def _recorded(name: str, forward: Callable[..., Any], calls: _Calls) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        single = len(given) == 1 and isinstance(given[0], Tensor)
        ids = single and not given[0].is_floating_point()
        shape = (tuple(given[0].shape) if ids else tuple(given[0].shape[:-1])) if single else None
        calls.setdefault(name, []).append(shape)
        return forward(*args, **kwargs)

    return run


def _token_axis(calls: Sequence[tuple[int, ...] | None], tokens: int) -> int | None:
    if len(calls) != 1 or calls[0] is None or tokens not in calls[0]:
        return None
    return calls[0].index(tokens)


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """`forwards` in the place of the modules' own, as long as the context lasts."""
    saved = [module.__dict__.get("forward") for module in modules]
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, previous in zip(modules, saved, strict=True):
            module.__dict__.pop("forward", None)
            if previous is not None:
                module.forward = previous  # type: ignore[method-assign]
