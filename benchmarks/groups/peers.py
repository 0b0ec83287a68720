"""Group "peers": the package beside other people's kernels, on the same inputs in one process.

Modes "scores", "frozen" and "trained" are the LM head (`benchmarks/peers/head.py`), "dpo" one long
pair (`pair.py`), "stats" gradient statistics per unit (`stats.py`). Sizes D=896 V=151936 are
Qwen2.5-0.5B's, D=576 V=49152 SmolLM2-135M's. On a CPU without AVX-512
torch multiplies bf16 far slower than fp32, so that all other rows take minutes: there fp32 compares
the schedules, and a few tokens in bf16 show that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks import head_cases
from benchmarks.head_cases import QWEN25, SMOLLM2
from benchmarks.peers import head, pair, stats
from benchmarks.registry import Case, Gate, Group

TOKENS = {"bfloat16": (16, 256, 1024), "float32": (256, 1024)}
PAIR_TOKENS = (1024, 4096, 16_384)


# What makes inputs, gate and tiny case of a mode.
_INPUTS: dict[str, Callable[[Case], Any]] = {stats.MODE: stats.make_inputs}
_GATES: dict[str, Callable[[Case, Any], Gate]] = {pair.MODE: pair.gate, stats.MODE: stats.gate}


def _make_inputs(case: Case) -> Any:
    return _INPUTS.get(case.mode, head_cases.make_inputs)(case)


def _gate(case: Case, inputs: Any) -> Gate:
    return _GATES.get(case.mode, head_cases.gate)(case, inputs)


def _tiny(case: Case) -> Case:
    if case.mode != stats.MODE:
        return head_cases.tiny(case)
    return replace(case, shape={**case.shape, "R": 8, "D": 16})


def _stats_case(tokens: int, dim: int, layers: int, rounds: int) -> Case:
    shape = {"B": 4, "R": tokens, "L": layers, "D": dim}
    return Case(shape, "float32", stats.MODE, rounds=rounds)


def _head_case(
    tokens: int, model: dict[str, int], mode: str, rounds: int, dtype: str = "bfloat16"
) -> Case:
    return Case({"T": tokens, **model}, dtype, mode, rounds=rounds)


GROUP = Group(
    name="peers",
    title="head, a pair's DPO, statistics: beside TRL, Liger, CCE, torch, Opacus, BackPACK",
    cases=(
        *(
            _head_case(tokens, QWEN25, mode, 3, dtype)
            for dtype, sizes in TOKENS.items()
            for mode in (*head.MODES, pair.MODE)
            for tokens in (PAIR_TOKENS if mode == pair.MODE else sizes)
        ),
        _stats_case(512, 576, 4, 3),
    ),
    quick=(
        *(_head_case(256, SMOLLM2, mode, 3) for mode in head.MODES),
        _head_case(256, SMOLLM2, pair.MODE, 3),
        _stats_case(128, 192, 2, 3),
    ),
    rows=(*head.ROWS, *pair.ROWS, *stats.ROWS),
    make_inputs=_make_inputs,
    gate=_gate,
    tiny=_tiny,
    against_T=("time", "peak_memory"),
)
