"""Which trained parameters a model has, and which layers can measure their gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from bvpo_kernels.grad_stats.forms import Form, form
from bvpo_kernels.grad_stats.layers import Layer
from bvpo_kernels.grad_stats.modules import has_embeddings
from bvpo_kernels.grad_stats.probe import Use, observe

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


class UncoveredError(ValueError):
    """Trained parameters that no layer can measure. coverage: which, and how many."""

    def __init__(self, coverage: Coverage) -> None:
        self.coverage = coverage
        names = list(coverage.uncovered[:_NAMED])
        more = len(coverage.uncovered) - len(names)
        super().__init__(
            f"model: expected trained parameters of Linear, Conv1D, Embedding and norm layers, "
            f"each used by one layer (or tied to the head) once per forward on all tokens; cannot "
            f"measure {names}{f' and {more} more' if more else ''} "
            f"({100 * (1 - coverage.share):.3g} % of what is trained): freeze them, or leave them "
            f"out of the statistics with strict=False (BVPOConfig: stats_strict; train: "
            f"alpha.estimate.strict)"
        )


_NAMED = 6  # of a model of experts every layer has some


@dataclass(frozen=True)
class Layout:
    """The layers to instrument, the trained parameters by index, and what they cover.

    shared: indices of the weights of an embedding that are those of a linear layer, too.
    """

    layers: tuple[Layer, ...]
    heads: tuple[Layer, ...]
    shared: tuple[int, ...]
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    coverage: Coverage

    @property
    def num_layers(self) -> int:
        return len(self.layers) + len(self.heads)

    def without(self, names: set[str]) -> Coverage:
        """The coverage, less parameters that turned out to be used by something else."""
        left = {*self.coverage.uncovered, *names}
        sizes = [p.numel() for n, p in zip(self.names, self.parameters, strict=True) if n in left]
        return Coverage(
            covered=self.coverage.trained - sum(sizes),
            trained=self.coverage.trained,
            uncovered=tuple(name for name in self.names if name in left),
        )


class _Candidate(NamedTuple):
    """A module with trained parameters of its own, what it computes and how it is called."""

    name: str
    module: nn.Module
    form: Form | None
    axis: int | None


def lay_out(model: nn.Module, mode: str, head: nn.Module | None) -> Layout:
    """Find the trained parameters of `model` and the layers that can measure them.

    Covered are modules whose forward is known to be that of a linear layer, an embedding or a norm
    over the last axis (`forms`), and which a forward of the model calls once, with all tokens
    (`probe`). A parameter may have one owner, or be the weight of one embedding and one linear
    layer: then both are covered, or neither. In mode "norm" the norms alone.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = [name for name, _ in trained], [p for _, p in trained]
    indices = {id(parameter): index for index, parameter in enumerate(parameters)}
    candidates = _candidates(model, indices)
    owners: dict[int, list[Form | None]] = {}
    for candidate in candidates:
        for parameter in candidate.module._parameters.values():
            if id(parameter) in indices:
                owners.setdefault(id(parameter), []).append(candidate.form)
    layers = [
        layer
        for candidate in candidates
        if (layer := _layer(candidate, mode, indices, owners)) is not None
    ]
    layers = _whole(layers)
    covered = {i for layer in layers for i in (layer.weight, layer.bias) if i is not None}
    # The head's share of a weight that is left out is left out with it.
    heads = [
        layer
        for layer in ([] if mode == "norm" else _heads(model, head, indices))
        if {layer.weight, layer.bias} - {None} <= covered
    ]
    shared = {layer.weight for layer in layers if layer.tied and layer.weight is not None}
    # A head may read the embedding's weight without a module of its own.
    tied = {layer.weight for layer in heads}
    layers = [
        replace(layer, tied=layer.tied or (layer.kind == "embedding" and layer.weight in tied))
        for layer in layers
    ]
    embedded = {layer.weight for layer in layers if layer.kind == "embedding"}
    heads = [replace(layer, tied=layer.weight in embedded) for layer in heads]
    numbered = [replace(layer, index=number) for number, layer in enumerate(layers + heads)]
    coverage = Coverage(
        covered=sum(parameters[i].numel() for i in covered),
        trained=sum(parameter.numel() for parameter in parameters),
        uncovered=tuple(name for i, name in enumerate(names) if i not in covered),
    )
    return Layout(
        layers=tuple(numbered[: len(layers)]),
        heads=tuple(numbered[len(layers) :]),
        shared=tuple(shared),
        names=tuple(names),
        parameters=tuple(parameters),
        coverage=coverage,
    )


def _candidates(model: nn.Module, indices: Mapping[int, int]) -> list[_Candidate]:
    """The modules that own trained parameters; of form None where they cannot be measured."""
    owning = {
        name: module
        for name, module in model.named_modules()
        if any(id(parameter) in indices for parameter in module._parameters.values())
    }
    forms = {name: form(module) for name, module in owning.items()}
    uses = observe(model, {name: owning[name] for name, found in forms.items() if found})
    unknown = Use(None)
    return [
        _Candidate(
            name,
            module,
            None if name in uses and uses[name].axis is None else forms[name],
            uses.get(name, unknown).axis,
        )
        for name, module in owning.items()
    ]


def _layer(
    candidate: _Candidate,
    mode: str,
    indices: Mapping[int, int],
    owners: Mapping[int, list[Form | None]],
) -> Layer | None:
    name, module, found, axis = candidate
    own = {n: p for n, p in module._parameters.items() if p is not None and id(p) in indices}
    if found is None or (mode == "norm" and found.kind != "norm"):
        return None
    if not set(own) <= {"weight", "bias"}:
        return None
    tied = False
    for parameter_name, parameter in own.items():
        shared = owners[id(parameter)]
        if len(shared) > 1:
            tied = True
            kinds = sorted("" if owner is None else owner.kind for owner in shared)
            transposed = any(owner is not None and owner.transposed for owner in shared)
            if kinds != ["embedding", "linear"] or parameter_name != "weight" or transposed:
                return None
    place = {n: indices[id(p)] for n, p in own.items()}
    return Layer(
        name=name, module=module, form=found, index=0, weight=place.get("weight"),
        bias=place.get("bias"), tied=tied, axis=axis,
    )  # fmt: skip


def _whole(layers: list[Layer]) -> list[Layer]:
    """Without the layers whose tied weight another layer uses that cannot be measured."""
    uses = Counter(layer.weight for layer in layers)
    return [layer for layer in layers if not layer.tied or uses[layer.weight] == 2]


def _heads(model: nn.Module, head: nn.Module | None, indices: Mapping[int, int]) -> list[Layer]:
    """Modules whose trained weight `linear_logprobs` may be given: `head`, or what transformers
    calls the output embeddings, or else the input embeddings."""
    found: dict[int, Layer] = {}
    for module in [head] if head is not None else _embeddings(model):
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        places = indices.get(id(weight)), indices.get(id(bias))
        if module is not None and places != (None, None):
            found.setdefault(id(weight), Layer(HEAD, module, Form("head"), 0, *places))
    return list(found.values())


def _embeddings(model: nn.Module) -> Iterator[nn.Module | None]:
    for module in model.modules():
        if has_embeddings(module):
            try:
                yield module.get_output_embeddings() or module.get_input_embeddings()  # type: ignore
            except (AttributeError, NotImplementedError):  # a base class that only declares them
                continue
