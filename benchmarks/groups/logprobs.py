"""Group "logprobs": log-probabilities of targets under a linear head, and their gradients.

Modes "scores", "frozen" and "trained" (`head_cases`), and "dpo", one long pair whose gradients are
formed with its scores or by computing tiles again (`benchmarks/peers/pair.py`). Models: D=576
V=49152 is SmolLM2-135M, D=896 V=151936 is Qwen2.5-0.5B. T=32768 is one pair of 2 x 16384 tokens.
Other people's kernels are in the group "peers".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.head_cases import (
    MODES,
    QWEN25,
    SMOLLM2,
    Inputs,
    differentiate,
    make_inputs,
    naive,
    naive_bytes,
    tiny,
    trl_bytes,
    trl_style,
)
from benchmarks.head_cases import gate as head_gate
from benchmarks.peers import pair
from benchmarks.registry import Call, Case, Gate, Group, Outputs, Row
from bvpo_kernels import linear_logprobs
from bvpo_kernels.backends import MISSING
from train.model.devices import multiplies_bf16

# Tokens of a product of the bare GEMM: its logits stay within memory.
GEMM_TOKENS = 2048


def _gate(case: Case, inputs: Any) -> Gate:
    return (pair.gate if case.mode == pair.MODE else head_gate)(case, inputs)


def _ours(impl: str) -> Row:
    def forward(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, target, impl=impl)

    return Row(
        impl,
        lambda case, inputs: differentiate(forward, case, inputs),
        missing=lambda case: MISSING[impl],
        modes=MODES,
    )


def _make_gemm(case: Case, inputs: Inputs) -> Call:
    """The products of the textbook path alone, into memory that is there: 2, 4 or 6 TVD FLOPs."""
    hidden, weight = inputs.hidden_TD, inputs.weight_VD
    logits = hidden.new_zeros(min(len(hidden), GEMM_TOKENS), len(weight))
    dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def call() -> Outputs:
        with torch.no_grad():
            for rows in hidden.split(GEMM_TOKENS):
                tile = torch.mm(rows, weight.T, out=logits[: len(rows)])
                if case.mode != "scores":
                    torch.mm(tile, weight, out=dhidden[: len(rows)])
                if case.mode == "trained":
                    torch.mm(tile.T, rows, out=dweight)
        return {}

    return call


# Emulated bf16 products take minutes where fp32 ones take seconds.
QUICK_DTYPE = "bfloat16" if multiplies_bf16() else "float32"


def _cases(
    tokens: int,
    model: dict[str, int],
    dtype: str,
    modes: tuple[str, ...],
    rounds: int,
    **extra: int,
) -> tuple[Case, ...]:
    return tuple(
        Case({"T": tokens, **model, **extra}, dtype, mode, rounds=rounds) for mode in modes
    )


GROUP = Group(
    name="logprobs",
    title="log-probabilities of targets under a linear head, scores only and with gradients",
    cases=(
        *_cases(4096, SMOLLM2, "bfloat16", MODES, 5),
        *_cases(4096, SMOLLM2, "float32", MODES, 3),
        *_cases(4096, QWEN25, "bfloat16", MODES, 3),
        *_cases(4096, QWEN25, "float32", MODES, 1),
        # One pair of 2 x 16 384 tokens. What these show is memory: naive code does not fit in most
        # machines.
        *_cases(32_768, SMOLLM2, "float32", MODES, 1),
        *_cases(32_768, SMOLLM2, "bfloat16", MODES, 1),
        *_cases(32_768, QWEN25, "bfloat16", ("trained",), 1),
        # The pair's loss and its gradients.
        *_cases(4096, SMOLLM2, "float32", (pair.MODE,), 5),
        *_cases(4096, SMOLLM2, "bfloat16", (pair.MODE,), 5),
        *_cases(2048, QWEN25, "bfloat16", (pair.MODE,), 3),
        *_cases(65_536, SMOLLM2, "bfloat16", ("scores", "trained"), 1),
        # How time and memory grow, on any machine: naive code fits, and no bf16 GEMM is needed.
        *(
            case
            for tokens in (4096, 16_384, 65_536)
            for mode in ("scores", "trained", pair.MODE)
            for case in _cases(tokens, {"D": 576, "V": 8192}, "float32", (mode,), 1)
        ),
    ),
    quick=(
        *_cases(512, SMOLLM2, QUICK_DTYPE, MODES, 3),
        *_cases(1024, SMOLLM2, QUICK_DTYPE, ("trained",), 3),
        *_cases(1024, SMOLLM2, QUICK_DTYPE, ("trained",), 3, ignored=50),
        *_cases(256, SMOLLM2, "float32", ("trained",), 3),
        *_cases(256, {"D": 576, "V": 151_936}, QUICK_DTYPE, ("trained",), 3),
        *_cases(1024, SMOLLM2, QUICK_DTYPE, (pair.MODE,), 3),
    ),
    rows=(
        Row("naive", lambda case, inputs: differentiate(naive, case, inputs), modes=MODES,
            predicted_bytes=naive_bytes),
        Row("trl-style", lambda case, inputs: differentiate(trl_style, case, inputs), modes=MODES,
            predicted_bytes=trl_bytes),
        _ours("eager"),
        _ours("cpp"),
        Row("bare GEMM", _make_gemm, yardstick="the products of the textbook path", modes=MODES),
        *pair.OURS,
    ),
    make_inputs=make_inputs,
    gate=_gate,
    tiny=tiny,
)  # fmt: skip
