"""Group "stats": a training step's forward and backward, with and without gradient statistics.

The model is a Llama of random weights with SmolLM2-135M's sizes (D=576, V=49152, tied) and `L`
layers (SmolLM2 has 30); `B` units per micro-batch, each with two traces of `R` tokens and two
answers without a trace. Ratios are to the step that measures nothing. "loop" is what a script does:
one backward per unit and kind, and the inner products of the gradients. "opacus" is its ghost
clipping: norms without inner products, of a model whose head is not tied (`benchmarks.ghost`).

The first two cases are SmolLM2-135M; `--filter fp32` leaves out the one that a CPU without bf16
products emulates. The others show how the rows grow with the trace: one layer of D=192 and one
unit, because attention over 34 000 tokens of a pack would hide all else.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import ghost, plot, records
from benchmarks.registry import Call, Case, Gate, Group, Outputs, Row, why_not
from bvpo_kernels import TokenPair, Unit, bvpo_loss, pack, segment_sum
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.types import EMPTY, TRACE, PackedBatch
from train.model.attention import AUTO, resolve_attention
from train.model.head import FusedHeadLM

ALPHA = 0.5
PROMPT_TOKENS, ANSWER_TOKENS = 64, 64
# Tokens of a prompt, a trace and an answer that the gate runs in fp64, at the case's own model.
GATE_TOKENS = 16
SMOLLM2 = {"R": 256, "B": 2, "L": 30, "D": 576, "V": 49_152}
# Percent at which the figure cuts a bar.
LARGEST_BAR = 30


class Inputs(NamedTuple):
    """A policy, and units that fill one micro-batch."""

    policy: FusedHeadLM
    units: list[Unit]


def _units(
    count: int, trace: int, vocab: int, prompt: int = PROMPT_TOKENS, answer: int = ANSWER_TOKENS
) -> list[Unit]:
    generator = torch.Generator().manual_seed(0)

    def pair(response: int) -> TokenPair:
        sizes = (prompt, response, response)
        ids = [torch.randint(0, vocab, (size,), generator=generator).tolist() for size in sizes]
        return TokenPair(*ids)

    return [
        Unit(str(n), {TRACE: [pair(trace + answer)], EMPTY: [pair(answer)]}) for n in range(count)
    ]


def make_inputs(case: Case) -> Inputs:
    """Seeded weights and tokens."""
    shape = case.shape
    config = LlamaConfig(
        vocab_size=shape["V"],
        hidden_size=shape["D"],
        intermediate_size=8 * shape["D"] // 3,
        num_hidden_layers=shape["L"],
        num_attention_heads=shape["D"] // 64,
        num_key_value_heads=max(shape["D"] // 192, 1),
        tie_word_embeddings=True,
        max_position_embeddings=2 * shape["R"] + 1024,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(case.device, case.torch_dtype)
    name = resolve_attention(AUTO, torch.device(case.device), case.torch_dtype)
    model.set_attn_implementation(name)
    return Inputs(FusedHeadLM(model), _units(shape["B"], shape["R"], shape["V"]))


def _backward(policy: FusedHeadLM, batch: PackedBatch, alpha: Any = ALPHA) -> None:
    scores_S = segment_sum(policy(batch), batch.cu_seqlens)
    reference_S = 0.9 * scores_S.detach()  # a preference that is not saturated
    bvpo_loss(scores_S, reference_S, batch, alpha).loss.backward()


def _plain(case: Case, inputs: Inputs) -> Call:
    batch = pack(inputs.units, device=case.device)

    def call() -> Outputs:
        inputs.policy.zero_grad()
        _backward(inputs.policy, batch)
        return {}

    return call


def _measured(name: str, yardstick: str = "", **options: Any) -> Row:
    def make(case: Case, inputs: Inputs) -> Call:
        batch = pack(inputs.units, device=case.device)
        stats = GradStats(inputs.policy, **options)
        scale = {TRACE: ALPHA / len(inputs.units), EMPTY: (1 - ALPHA) / len(inputs.units)}

        def call() -> Outputs:
            inputs.policy.zero_grad()
            with stats.collect(batch, scale):
                _backward(inputs.policy, batch)
            return {"gram": stats.result().gram_BKK.float().to(case.device)}

        return call

    return Row(name, make, yardstick=yardstick)


def _loop(case: Case, inputs: Inputs) -> Call:
    """One backward per unit and kind; two gradients in memory besides `.grad`."""
    return lambda: {"gram": loop_gram(inputs.policy, inputs.units, case.device).float()}


def _ghost(case: Case, inputs: Inputs) -> Call:
    pairs = [unit.pairs[kind][0] for unit in inputs.units for kind in (TRACE, EMPTY)]
    call = ghost.norms(inputs.policy.model, pairs, case.device)
    return lambda: {"norms": call()}


def _ghost_bytes(case: Case) -> int:
    """Logits of all padded samples, thrice in fp32, and two matrices of tokens x tokens."""
    samples = 2 * case.shape["B"]
    tokens = 2 * (PROMPT_TOKENS + ANSWER_TOKENS + case.shape["R"])
    return samples * tokens * (14 * case.shape["V"] + 8 * tokens)


def loop_gram(policy: FusedHeadLM, units: list[Unit], device: str) -> Tensor:
    """<g_k,i, g_l,i>, [B, K, K], fp64 sums of products of the parameters' dtype.

    A fp32 product of whole gradients loses 3 % over 135 million terms, and as a baseline would
    excuse as much.
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    grams = []
    for unit in units:
        by_kind = []
        for kind in (TRACE, EMPTY):
            policy.zero_grad()
            batch = pack([Unit(unit.unit_id, {kind: unit.pairs[kind]})], device=device)
            _backward(policy, batch, {TRACE: 1.0, EMPTY: 1.0})
            by_kind.append([p.grad.flatten() for p in parameters if p.grad is not None])
        gram_KK = torch.zeros(len(by_kind), len(by_kind), dtype=torch.float64, device=device)
        for grads in zip(*by_kind, strict=True):
            grads_KP = torch.stack(grads).double()
            gram_KK += grads_KP @ grads_KP.T
        grams.append(gram_KK)
    policy.zero_grad()
    return torch.stack(grams)


def gate(case: Case, inputs: Inputs) -> Gate:
    """Short segments through the case's own model; the oracle is the loop in fp64."""
    sizes = (GATE_TOKENS, case.shape["V"], GATE_TOKENS, GATE_TOKENS)
    few = _units(case.shape["B"], *sizes)
    model: Any = copy.deepcopy(inputs.policy.model).double()
    model.set_attn_implementation(resolve_attention(AUTO, torch.device(case.device), torch.float64))
    exact = FusedHeadLM(model)
    return Gate(
        inputs=Inputs(inputs.policy, few),
        select=lambda outputs: outputs,
        oracle={"gram": loop_gram(exact, few, case.device)},
        baseline={"gram": loop_gram(inputs.policy, few, case.device).float()},
    )


def tiny(case: Case) -> Case:
    return replace(case, shape={**case.shape, "R": 8, "L": 1, "D": 64, "V": 512})


def _growth(trace: int, rounds: int) -> Case:
    return Case({"R": trace, "B": 1, "L": 1, "D": 192, "V": 8192}, rounds=rounds)


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Time relative to the step without statistics: bars at SmolLM2's size, lines by trace."""
    ratios = frame[frame["metric"] == "ratio"].copy()
    shapes = [records.shape_of(shape) for shape in ratios["shape"]]
    ratios["R"] = [shape["R"] for shape in shapes]
    ratios["small"] = [shape["L"] == 1 for shape in shapes]
    ratios["percent"] = 100 * (ratios["value"].astype(float) - 1)
    large, small = ratios[~ratios["small"]], ratios[ratios["small"]]
    both = ((large, _draw_bars), (small, _draw_growth))
    panels = [(part, fill) for part, fill in both if len(part)]
    with plot.drawing(path, (5 * len(panels), 4)) as figure:
        for axes, (part, fill) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            fill(part, axes)
        first = frame.iloc[0]
        figure.suptitle(f"stats: {plot.machine(first)}", fontsize=9)


def _draw_growth(ratios: pd.DataFrame, axes: Any) -> None:
    """A line per row over the length of the trace."""
    for row, of_row in ratios.groupby("row", sort=False):
        points = of_row.sort_values("R")
        axes.plot(points["R"], points["percent"] / 100 + 1, marker="o", label=row)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(lambda ratio, _: f"{ratio:.3g}")
    axes.set_xlabel("tokens of a trace (one layer, D = 192)")
    axes.set_ylabel("time / step without statistics")
    axes.legend(fontsize=7)


def _draw_bars(ratios: pd.DataFrame, axes: Any) -> None:
    """Overheads in percent; those beyond the axis are written on their bars."""
    places = range(len(ratios))
    axes.barh(places, ratios["percent"], color="C0")
    axes.set_xlim(-1, LARGEST_BAR)
    for place, percent in zip(places, ratios["percent"], strict=True):
        axes.text(max(min(percent, LARGEST_BAR - 4), 0) + 0.3, place, f"{percent:.1f} %",
                  va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(
        places, [f"{r}, {d}" for r, d in zip(ratios["row"], ratios["dtype"], strict=True)]
    )
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("overhead of a step of SmolLM2-135M, %")


GROUP = Group(
    name="stats",
    title="a step's forward and backward with gradient statistics, relative to without",
    cases=(
        Case(SMOLLM2, rounds=3),
        Case(SMOLLM2, "bfloat16", rounds=3),
        _growth(256, 9),
        _growth(1024, 5),
        _growth(4096, 3),
        _growth(8192, 2),
    ),
    quick=(
        Case({"R": 64, "B": 2, "L": 2, "D": 192, "V": 4096}, rounds=5),
        Case({"R": 256, "B": 2, "L": 2, "D": 192, "V": 8192}, "bfloat16", rounds=3),
    ),
    rows=(
        Row("none", _plain, yardstick="the step without statistics"),
        _measured("exact", cross="none"),
        _measured("exact+sketch", cross="sketch"),
        _measured("exact+sums", cross="exact"),
        _measured("sketch", "an estimate of the same numbers", mode="sketch"),
        _measured("norm", "the norms' weights alone", mode="norm"),
        Row("loop", _loop),
        Row(
            "opacus",
            _ghost,
            lambda case: why_not("opacus", "opacus.grad_sample"),
            _ghost_bytes,
            "norms alone, the head untied",
        ),
    ),
    make_inputs=make_inputs,
    gate=gate,
    tiny=tiny,
    draw=draw,
)
