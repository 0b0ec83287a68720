"""Per-sample gradient statistics, mode "stats": inner products within units, [B, 2, 2].

L blocks of two linear layers with tanh between them, token by token, so that libraries which want a
batch axis have one: 2 B samples of R tokens, sample 2 i + k being kind k of unit i. Attention would
need padded samples; none is here, and nothing is padded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.registry import Call, Case, Gate, Outputs, Row, why_not
from bvpo_kernels import GradStats, PackedBatch, TokenPair, Unit, pack
from bvpo_kernels.types import EMPTY, TRACE

MODE = "stats"


class Inputs(NamedTuple):
    """A network, samples [N, R, D] and what their outputs are multiplied with before the sum."""

    net: nn.Sequential
    samples_NRD: Tensor
    upstream_NRD: Tensor


def make_inputs(case: Case) -> Inputs:
    """Seeded weights and samples."""
    units, tokens, layers, dim = (case.shape[key] for key in "BRLD")
    torch.manual_seed(0)
    blocks = [[nn.Linear(dim, 4 * dim), nn.Tanh(), nn.Linear(4 * dim, dim)] for _ in range(layers)]
    net = nn.Sequential(*(module for block in blocks for module in block))
    sizes = (2 * units, tokens, dim)
    net.to(case.device, case.torch_dtype)
    on: dict[str, Any] = {"device": case.device, "dtype": case.torch_dtype}
    return Inputs(net, torch.randn(sizes, **on), torch.randn(sizes, **on))


def _gram(per_sample: list[Tensor]) -> Tensor:
    """[B, 2, 2] from gradients [N, ...] of every parameter."""
    flat = [gradient.flatten(1).unflatten(0, (-1, 2)) for gradient in per_sample]
    return torch.stack([g_B2P @ g_B2P.mT for g_B2P in flat]).sum(0)


def loop(inputs: Inputs) -> Tensor:
    """One backward per sample."""
    parameters = list(inputs.net.parameters())
    pairs: list[Tensor] = []
    kept: list[Tensor] = []
    for sample, upstream in zip(inputs.samples_NRD, inputs.upstream_NRD, strict=True):
        value = (inputs.net(sample) * upstream).sum()
        kept.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]))
        if len(kept) == 2:
            flat_2P = torch.stack(kept)
            pairs.append(flat_2P @ flat_2P.T)
            kept = []
    return torch.stack(pairs)


def _make_loop(case: Case, inputs: Inputs) -> Call:
    return lambda: {"gram": loop(inputs)}


def _make_opacus(case: Case, inputs: Inputs) -> Call:
    from opacus.grad_sample import GradSampleModule

    # A copy: its hooks stay on the modules.
    net = GradSampleModule(copy.deepcopy(inputs.net), batch_first=True, loss_reduction="sum")

    def call() -> Outputs:
        net.zero_grad(set_to_none=True)
        (net(inputs.samples_NRD) * inputs.upstream_NRD).sum().backward()
        return {"gram": _gram([p.grad_sample for p in net.parameters()])}

    return call


def _make_backpack(case: Case, inputs: Inputs) -> Call:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    net = extend(copy.deepcopy(inputs.net))

    def call() -> Outputs:
        net.zero_grad(set_to_none=True)
        with backpack(BatchGrad()):
            (net(inputs.samples_NRD) * inputs.upstream_NRD).sum().backward()
        gradients = [p.grad_batch for p in net.parameters()]
        for parameter in net.parameters():
            del parameter.grad_batch
        return {"gram": _gram(gradients)}

    return call


def _batch(case: Case) -> PackedBatch:
    """Units whose groups are the samples; their token ids are read by no layer here."""
    half = case.shape["R"] // 2
    rest = case.shape["R"] - half
    pair = TokenPair([0], [0] * (half - 1), [0] * (rest - 1))
    units = [Unit(str(n), {TRACE: [pair], EMPTY: [pair]}) for n in range(case.shape["B"])]
    return pack(units, device=case.device)


def _make_ours(case: Case, inputs: Inputs) -> Call:
    batch, net = _batch(case), inputs.net
    stats = GradStats(net, cross="none")
    samples, upstream = (
        values.flatten(0, 1)[None] for values in (inputs.samples_NRD, inputs.upstream_NRD)
    )

    def call() -> Outputs:
        net.zero_grad(set_to_none=True)
        with stats.collect(batch):
            (net(samples) * upstream).sum().backward()
        return {"gram": stats.result().gram_BKK.to(samples)}

    return call


def gate(case: Case, inputs: Inputs) -> Gate:
    """All samples; the oracle is the loop in fp64."""
    exact = Inputs(
        copy.deepcopy(inputs.net).double(),
        inputs.samples_NRD.double(),
        inputs.upstream_NRD.double(),
    )
    return Gate(inputs, lambda outputs: outputs, {"gram": loop(exact)}, {"gram": loop(inputs)})


def _gradient_bytes(case: Case) -> int:
    """What a gradient per sample takes: two of them, while inner products are formed."""
    weights = 8 * case.shape["L"] * case.shape["D"] ** 2
    return 2 * 2 * case.shape["B"] * weights * case.torch_dtype.itemsize


def _row(name: str, make: Callable[[Case, Inputs], Call], package: str, module: str) -> Row:
    return Row(name, make, lambda _: why_not(package, module), _gradient_bytes, modes=(MODE,),
               package=package)  # fmt: skip


ROWS = (
    Row("naive", _make_loop, modes=(MODE,)),
    _row("Opacus", _make_opacus, "opacus", "opacus.grad_sample"),
    _row("BackPACK", _make_backpack, "backpack-for-pytorch", "backpack.extensions"),
    Row("bvpo_kernels", _make_ours, modes=(MODE,), package="bvpo_kernels"),
)
