"""One call of the LM head as values, and the flat order in which it crosses `torch.library`.

Operators take tensors and numbers one by one: their schemas are made of the strings below, and
`cut` puts together again what arrives. Nothing else names the order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """z = softcap tanh((h W^T + x B^T + b) / softcap) / temperature; x, B: LoRA's, or absent."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    lora_b_VR: Tensor | None = None

    @property
    def vocab(self) -> int:
        return self.weight_VD.shape[0]

    def rows(self, index: Any) -> Tensor:
        """Rows of W, with LoRA of [W, B]: neither B A nor a copy of W is ever formed."""
        if self.lora_b_VR is None:
            return self.weight_VD[index]
        return torch.cat([self.weight_VD[index], self.lora_b_VR[index]], 1)


class Inputs(NamedTuple):
    """The tensors of a call; `low_TR` is what LoRA's B multiplies."""

    hidden_TD: Tensor
    weight_VD: Tensor
    target_T: Tensor
    bias_V: Tensor | None = None
    low_TR: Tensor | None = None
    lora_b_VR: Tensor | None = None


class Call(NamedTuple):
    """Arguments of `linear_logprobs` that are no tensors: every path gets them all."""

    temperature: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    workspace_bytes: int = 2**27
    max_scored: int | None = None
    tail_tolerance: float = 0.0
    need_entropy: bool = False
    impl: str = "eager"

    def head(self, inputs: Inputs) -> Head:
        return Head(
            inputs.weight_VD, inputs.bias_V, self.temperature, self.softcap, inputs.lora_b_VR
        )


class Kept(NamedTuple):
    """What the forward keeps for the backward, [T] each; lse = max + logsum.

    With a certified sparse backward also `tail_T`, the probability that a token's list leaves out,
    and all lists one behind the other, from `offsets` on; empty without one.
    """

    logprobs_T: Tensor
    max_T: Tensor
    logsum_T: Tensor
    tail_T: Tensor
    offsets: Tensor
    columns: Tensor
    entries: Tensor


class Need(NamedTuple):
    """Which gradients are wanted. LoRA's x and B are where there are any: x with `hidden`."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Of `Inputs`, in its order but for the target; None or empty where not wanted."""

    hidden_TD: Tensor | None = None
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None
    low_TR: Tensor | None = None
    lora_b_VR: Tensor | None = None


class Pairs(NamedTuple):
    """The loss sum_p weight_p f(m_p) of the margins m_p = sum over the pair's segments of factor_S
    (score_S - reference_S), of a pack whose segments 2p and 2p + 1 are pair p.

    ranges_P2, scored_P: token range and scored rows of each pair, int64, on the CPU: sizes of
    products. factor_S: +-1 or +-1 / length; it and weight_P in fp64. loss, beta, names, values:
    which f (`slopes.py`).
    """

    cu_seqlens: Tensor
    ranges_P2: Tensor
    scored_P: Tensor
    factor_S: Tensor
    reference_S: Tensor
    weight_P: Tensor
    loss: str
    beta: float
    names: list[str]
    values: list[float]


class Plan(NamedTuple):
    """What one collection of gradient statistics keeps; the same for all layers.

    ranges_G2: token range of each group, int64 on the CPU. kinds_G: its kind, int64, on the
    device. seed: 0-dim int64 on the CPU. exact: form the Gram matrix of the groups. sketch: side k
    of a Kronecker sketch, 0 for none. num_kinds: keep the gradient of each kind, 0 for not.
    scored_G: scored rows of each group, int64 on the CPU, for the head on a GPU, which compacts
    them without telling the host.

    A layer hands back, besides its gradients, its record, [G * G + num_layers] fp64: the Gram
    matrix of the groups' gradients of this layer, and a one at the layer's index, so that sums
    over layers count each of them. And what is kept of each parameter: sketches [G, k_P, k_D] or
    kind sums [K, P, D], empty for neither (`kept_shape`).
    """

    ranges_G2: Tensor
    kinds_G: Tensor
    seed: Tensor
    scored_G: Tensor
    num_layers: int
    exact: bool
    sketch: int
    num_kinds: int

    def kept_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what is kept of a parameter of `shape`; vectors are kept whole, not sketched."""
        if self.sketch:
            sides = shape if len(shape) == 1 else tuple(min(self.sketch, side) for side in shape)
            return (self.ranges_G2.shape[0], *sides)
        return (self.num_kinds, *shape) if self.num_kinds else (0,)


INPUTS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? low, Tensor? lora_b"
CALL = (
    "float temperature, float? softcap, int ignore_index, int workspace_bytes, "
    "SymInt? max_scored, float tail_tolerance, bool need_entropy, str impl"
)
KEPT = (
    "Tensor logprobs, Tensor max, Tensor logsum, Tensor tail, Tensor offsets, Tensor columns, "
    "Tensor entries"
)
NEED = "bool need_hidden, bool need_weight, bool need_bias"
PAIRS = (
    "Tensor cu_seqlens, Tensor pair_ranges, Tensor pair_scored, Tensor factor, Tensor reference, "
    "Tensor pair_weight, str loss, float beta, str[] names, float[] values"
)
PLAN = (
    "Tensor ranges, Tensor kinds, Tensor seed, Tensor scored, int num_layers, bool exact, "
    "int sketch, int num_kinds, int layer"
)


def inputs_of(tensors: Iterable[Any]) -> Inputs:
    """`Inputs` of six tensors or None."""
    return Inputs(*tensors)


def cut(args: tuple, *types: type) -> list[Any]:
    """Consecutive arguments as values of the given kinds; one that is no tuple takes one."""
    values, start = [], 0
    for kind in types:
        fields = getattr(kind, "_fields", None)
        if fields is None:
            values.append(args[start])
            start += 1
        else:
            values.append(kind(*args[start : start + len(fields)]))
            start += len(fields)
    return values


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
