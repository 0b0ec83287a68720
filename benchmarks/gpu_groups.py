"""The groups that `benchmarks.gpu` measures: the LM head at GPU sizes, its certified sparse
backward, `pair_reduce`, and a step with gradient statistics. Row kernels: `gpu_rows`.

Not in `benchmarks/groups/`: `benchmarks.run` offers what any machine can run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import head_cases
from benchmarks.groups import logprobs, stats, tail
from benchmarks.head_cases import Inputs, differentiate
from benchmarks.peers import head
from benchmarks.registry import Call, Case, Gate, Group, Outputs, Row
from bvpo_kernels import linear_logprobs
from bvpo_kernels.backends import MISSING
from bvpo_kernels.call import Call as HeadCall
from bvpo_kernels.call import Inputs as HeadInputs

TOKENS = (8192, 32_768)
HIDDEN_SIZES = (4096, 3584, 1536)
VOCAB = 151_936
MODES = ("scores", "frozen", "trained")
# FLOPs per T V D that a mode needs: what TFLOP/s are counted from. A recomputing backward
# runs 8 where 6 are needed; recomputation is not credited.
NEEDED_FLOPS = {"scores": 2, "frozen": 4, "trained": 6, "dpo": 6}
GATE_ROW_STRIDE = 997
UNFUSED_BYTES = 2**29
COMPILING = ("torch.compile", "cut-cross-entropy", "QuACK")
OURS = ("triton",)
REDUCING = ("triton", "cuda")
OTHER_TILES = (1, 3, 4)
# Modes of the group "tail", and tolerances 2^-n.
PROFILES = ("peaked", "reasoning", "flat")
EXPONENTS = (5, 7, 9, 11)
# Of SmolLM2-135M: tokens of a trace, and units of a micro-batch.
STATS_SHAPE = {**stats.SMOLLM2, "R": 2048, "B": 4}


@functools.lru_cache(maxsize=1)
def _inputs(tokens: int, dim: int, vocab: int, dtype: torch.dtype, device: str) -> Inputs:
    """As `head_cases.make_inputs`, drawn on the device: at these sizes the host takes minutes."""
    generator = torch.Generator(device).manual_seed(0)
    on: dict[str, Any] = {"generator": generator, "device": device}
    hidden_TD = torch.randn(tokens, dim, **on)
    weight_VD = torch.randn(vocab, dim, **on) * head_cases.WEIGHT_STD
    target_T = ((vocab + 1.0) ** torch.rand(tokens, **on) - 1).long().clamp_(0, vocab - 1)
    gain_T = 1.5 * math.log(vocab) * torch.rand(tokens, **on)
    towards_TD = weight_VD[target_T]
    hidden_TD += gain_T[:, None] * towards_TD / towards_TD.square().sum(1, keepdim=True)
    upstream_T = torch.randn(tokens, **on)
    return Inputs(hidden_TD.to(dtype), weight_VD.to(dtype), target_T, upstream_T)


def head_inputs(case: Case) -> Inputs:
    """Of a case of the head, kept while the next case has the same."""
    return _inputs(*(case.shape[key] for key in "TDV"), case.torch_dtype, case.device)


def _only_at_headline(row: Row) -> Row:
    """A peer that compiles or tunes for each shape, which takes longer than all measurements."""

    def missing(case: Case) -> str:
        if (case.shape["T"], case.shape["D"]) == (TOKENS[0], HIDDEN_SIZES[0]):
            return row.missing(case)
        return f"it compiles per shape: measured at T={TOKENS[0]} D={HIDDEN_SIZES[0]} only"

    return replace(row, missing=missing)


def _row(name: str, forward: Callable[..., Tensor], missing: str = "") -> Row:
    return Row(name, lambda case, inputs: differentiate(forward, case, inputs), lambda _: missing)


def _unfused(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Scores by GEMMs and row kernels, tiles of 512 MiB: what `fused_scores` of a configuration is
    decided by."""
    from bvpo_kernels.backends import schedule
    from bvpo_kernels.backends.triton.engine import TritonEngine

    engine = TritonEngine(
        HeadInputs(hidden, weight, target), HeadCall(impl="triton", workspace_bytes=UNFUSED_BYTES)
    )
    engine.fusing = False
    return schedule.forward(engine, unit=False)[0]


def _head_rows() -> tuple[Row, ...]:
    shared = {row.name: row for row in logprobs.GROUP.rows if head_cases.MODES[0] in row.modes}
    ours = [
        _row(impl, functools.partial(linear_logprobs, impl=impl), MISSING[impl]) for impl in OURS
    ]
    unfused = replace(_row("triton, unfused", _unfused, MISSING["triton"]), modes=("scores",))
    peers = [_only_at_headline(row) if row.name in COMPILING else row for row in head.PEERS]
    return (shared["naive"], shared["eager"], *ours, unfused, *peers)


def headline(
    mode: str, tokens: int = TOKENS[0], dim: int = HIDDEN_SIZES[0], device: str = "cuda"
) -> Case:
    """The case of a mode for which lines are promised; with other arguments, another case."""
    return Case({"T": tokens, "D": dim, "V": VOCAB}, "bfloat16", mode, device, rounds=3)


def head_group(device: str, tokens: tuple[int, ...], hidden_sizes: tuple[int, ...]) -> Group:
    """Log-probabilities and their gradients at the sizes that are trained, the headline first."""
    cases = tuple(
        headline(mode, t, d, device) for d in hidden_sizes for t in tokens for mode in MODES
    )
    return Group(
        name="gpu-logprobs", title="the LM head on a GPU", cases=cases, quick=cases[:3],
        rows=_head_rows(), make_inputs=head_inputs, gate=head_cases.gate, tiny=head_cases.tiny,
    )  # fmt: skip


class Gradients(NamedTuple):
    """K gradients (two: G_t and G_e), their weights, and the dW that they are added into."""

    tiles: Tensor
    weights: Tensor
    dweight: Tensor


@functools.lru_cache(maxsize=1)
def _gradients(count: int, rows: int, dim: int, dtype: torch.dtype, device: str) -> Gradients:
    generator = torch.Generator(device).manual_seed(0)
    on: dict[str, Any] = {"generator": generator, "device": device}
    tiles, dweight = torch.randn(count, rows, dim, **on), torch.randn(rows, dim, **on)
    weights = torch.arange(1.0, count + 1, device=device) / count
    return Gradients(tiles, weights, dweight.to(dtype))


def _tiles(case: Case) -> int:
    return case.shape.get("K", 2)


def _gradient_inputs(case: Case) -> Gradients:
    shape = case.shape
    return _gradients(_tiles(case), shape["V"], shape["D"], case.torch_dtype, case.device)


def _naive_pair_reduce(tiles: Tensor, total: Tensor, weights: Tensor, add: bool) -> Tensor:
    """A reduction for each product and an update for each tile, each a pass of its own."""
    change = weights[0] * tiles[0]
    for weight, tile in zip(weights[1:], tiles[1:], strict=True):
        change = change + weight * tile
    total.copy_(total + change if add else change)
    sums = [(a * b).sum() for a in tiles for b in tiles]
    return torch.stack(sums).double().view(len(tiles), len(tiles))


def _make_pair_reduce(function: Callable[..., Tensor], case: Case, inputs: Gradients) -> Call:
    dweight = inputs.dweight.clone()  # each call adds into it

    def call() -> Outputs:
        gram = function(inputs.tiles, dweight, inputs.weights, True)
        return {"gram": gram, "dweight": dweight}

    return call


def _pair_reduce(impl: str) -> Callable[..., Tensor]:
    def function(*arguments: Any) -> Tensor:
        return torch.ops.bvpo.pair_reduce(*arguments, impl)

    return function


def _gradient_gate(case: Case, inputs: Gradients) -> Gate:
    rows = slice(None, None, GATE_ROW_STRIDE)

    def pick(outputs: Outputs) -> Outputs:
        return {"gram": outputs["gram"], "dweight": outputs["dweight"][rows]}

    def dot(left: Tensor, right: Tensor) -> Tensor:
        parts = zip(left.split(4096), right.split(4096), strict=True)
        return torch.stack([(a.double() * b.double()).sum() for a, b in parts]).sum()

    tiles, weights, dweight = inputs
    gram = torch.stack([dot(a, b) for a in tiles for b in tiles]).view(len(tiles), len(tiles))
    change = (weights.double()[:, None, None] * tiles[:, rows].double()).sum(0)
    naive_call = _make_pair_reduce(_naive_pair_reduce, case, inputs)
    return Gate(
        inputs=inputs,
        select=pick,
        oracle={"gram": gram, "dweight": dweight[rows].double() + change},
        baseline=pick(naive_call()),
    )


def release_inputs() -> None:
    """Give back the memory of the last case's inputs."""
    _gradients.cache_clear()
    _inputs.cache_clear()


def pair_reduce_bytes(case: Case) -> int:
    """Bytes that must move: each tile in fp32, dW in and out."""
    per_element = 4 * _tiles(case) + 2 * case.torch_dtype.itemsize
    return case.shape["V"] * case.shape["D"] * per_element


def _reduces(name: str, case: Case) -> str:
    """Why a backend cannot reduce so many tiles; '' when it can."""
    only_two = name == "cuda" and _tiles(case) != 2
    return "it serves two tiles" if only_two else MISSING[name]


def pair_reduce_group(device: str, rows: int = VOCAB, dim: int = 4096) -> Group:
    """Inner products of weight gradients, of two and of other numbers, and their weighted sum added
    to dW."""
    shape = {"V": rows, "D": dim}
    cases = tuple(
        Case(sizes, dtype, "pair_reduce", device, rounds=7)
        for sizes, dtype in (
            (shape, "bfloat16"),
            (shape, "float32"),
            *(({"K": count} | shape, "bfloat16") for count in OTHER_TILES),
        )
    )
    ours = [
        Row(
            name,
            functools.partial(_make_pair_reduce, _pair_reduce(name)),
            functools.partial(_reduces, name),
        )
        for name in REDUCING
    ]
    baseline = Row("naive", functools.partial(_make_pair_reduce, _naive_pair_reduce))
    return Group(
        name="gpu-pair-reduce", title="pair_reduce on a GPU", cases=cases, quick=cases,
        rows=(baseline, *ours), make_inputs=_gradient_inputs, gate=_gradient_gate,
        tiny=lambda case: replace(case, shape={**case.shape, "V": 64, "D": 64}),
    )  # fmt: skip


def tail_group(
    device: str, tokens: int = TOKENS[0], dim: int = HIDDEN_SIZES[0], vocab: int = VOCAB
) -> Group:
    """The sparse backward by tolerance, for kinds of tokens."""
    cases = tuple(
        Case({"T": tokens, "D": dim, "V": vocab}, "bfloat16", mode, device, rounds=5)
        for mode in PROFILES
    )
    names = ("naive", "exact", *(f"2^-{exponent}" for exponent in EXPONENTS))
    rows = tuple(tail.GROUP.row(name) for name in names)
    return replace(tail.GROUP, name="gpu-tail", cases=cases, quick=cases, rows=rows)


def stats_group(device: str, shape: dict[str, int] = STATS_SHAPE) -> Group:
    """A step of SmolLM2-135M, with and without gradient statistics."""
    cases = (Case(shape, "bfloat16", device=device, rounds=7),)
    return replace(stats.GROUP, name="gpu-stats", cases=cases, quick=cases)
