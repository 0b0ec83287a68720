"""Inputs of `linear_logprobs` tests, and the comparison that every backend goes through."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bvpo_kernels import linear_logprobs
from bvpo_kernels.oracles.testing import assert_accurate


@dataclass
class Case:
    """One problem. `offset` is added to all logits through the bias."""

    num_tokens: int = 37
    dim: int = 24
    vocab: int = 301
    dtype: torch.dtype = torch.float32
    bias: bool = False
    offset: float = 0.0
    scale: float = 1.0
    ignored: float = 0.2
    options: dict = field(default_factory=dict)

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        new = {"generator": generator, "dtype": torch.float32}
        hidden = torch.randn(self.num_tokens, self.dim, **new)
        weight = torch.randn(self.vocab, self.dim, **new) * (self.scale * self.dim**-0.5)
        target = torch.randint(self.vocab, (self.num_tokens,), generator=generator)
        # The first and the last column are where a tile loop goes wrong.
        target[: self.num_tokens // 4 : 2] = 0
        target[1 : self.num_tokens // 4 : 2] = self.vocab - 1
        target[torch.rand(self.num_tokens, generator=generator) < self.ignored] = -100
        tensors = {"hidden": hidden.to(self.dtype), "weight": weight.to(self.dtype)}
        if self.bias or self.offset:
            tensors["bias"] = (torch.randn(self.vocab, **new) + self.offset).to(self.dtype)
        return tensors | {"target": target, "upstream": torch.randn(self.num_tokens, **new)}


def run(inputs, impl, need=("hidden", "weight", "bias"), dtype=None, **options):
    """Log-probs, entropy and the gradients in `need`, with inputs cast to `dtype`."""
    leaves = {}
    for name in ("hidden", "weight", "bias"):
        if name in inputs:
            leaf = inputs[name].detach().to(dtype or inputs[name].dtype, copy=True)
            leaves[name] = leaf.requires_grad_(name in need)
    hidden, weight, bias = (leaves.get(name) for name in ("hidden", "weight", "bias"))
    logprobs, entropy = linear_logprobs(
        hidden, weight, inputs["target"], bias=bias, return_entropy=True, impl=impl, **options
    )
    results = {"logprobs": logprobs.detach(), "entropy": entropy}
    if logprobs.requires_grad:
        logprobs.backward(inputs["upstream"].to(logprobs.dtype))
        results |= {f"d{k}": v.grad for k, v in leaves.items() if v.requires_grad}
    return results


def compare(
    case: Case, impl: str, need=("hidden", "weight", "bias"), inputs=None, slack=0.0, **options
) -> dict[str, Tensor]:
    """Assert that `impl` is as accurate as the naive head, for every result; return its results.

    slack: an error that is granted besides, relative to the largest element of a result.
    """
    inputs = inputs or case.inputs()
    oracle = run(inputs, "reference", need, torch.float64, **case.options)
    eager = run(inputs, "reference", need, **case.options)
    actual = run(inputs, impl, need, **case.options, **options)
    for name, value in oracle.items():
        expected = torch.float32 if name in ("logprobs", "entropy") else case.dtype
        if case.dtype != torch.float64:
            assert actual[name].dtype == expected, name
        bound = slack * float(value.abs().max()) if slack and value.numel() else 0.0
        assert_accurate(f"{impl} {name}", actual[name], eager[name], value, bound)
    return actual


def order_of_sums(inputs: dict[str, Tensor]) -> Tensor:
    """[T] fp64, standard deviation of what two orders of a logit's D fp32 additions differ by.

    Each rounds a partial sum, which grows evenly up to |z|, by up to half a spacing. Standard
    deviation of the last: eps |z| / sqrt(12); of all: eps |z| sqrt(D / 36); of a difference:
    sqrt(2) times as much.
    """
    z_T = (inputs["hidden"].double() @ inputs["weight"].double().T).abs().amax(1)
    return torch.finfo(torch.float32).eps * z_T * (inputs["hidden"].shape[1] / 18) ** 0.5


def with_options(case: Case, **changes) -> Case:
    return replace(case, **changes)
