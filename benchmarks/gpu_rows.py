"""The group of the row kernels alone, over whole rows of the vocabulary: bandwidth, and no GEMM."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import Call, Case, Gate, Group, Outputs, Row
from bvpo_kernels.backends import MISSING
from bvpo_kernels.call import Head

FORWARD, BACKWARD = "rows forward", "rows backward"
# Bytes per logit that must move: z in fp32, and dZ in bf16 over it.
BYTES = {FORWARD: 4, BACKWARD: 6}
GATE_ROW_STRIDE = 97


class Logits(NamedTuple):
    """z [T, V] fp32, the target of each row, dlogp, and log sum exp z_v."""

    z: Tensor
    target_T: Tensor
    upstream_T: Tensor
    lse_T: Tensor


@functools.lru_cache(maxsize=1)
def _logits(tokens: int, vocab: int, device: str) -> Logits:
    generator = torch.Generator(device).manual_seed(0)
    on: dict[str, Any] = {"generator": generator, "device": device}
    z = torch.randn(tokens, vocab, **on) * 3
    target_T = torch.randint(vocab, (tokens,), **on)
    return Logits(z, target_T, torch.randn(tokens, **on), z.logsumexp(1))


def _inputs(case: Case) -> Logits:
    return _logits(case.shape["T"], case.shape["V"], case.device)


def release_inputs() -> None:
    """Give back the memory of the last case's inputs."""
    _logits.cache_clear()


def rows_bytes(case: Case) -> int:
    """Bytes that must move."""
    return case.shape["T"] * case.shape["V"] * BYTES[case.mode]


def _naive_dz(z: Tensor, inputs: Logits, rows: slice) -> Tensor:
    """dlogp (1[v = y] - p_v), in the dtype of z."""
    upstream = inputs.upstream_T[rows, None].to(z.dtype)
    dz = torch.softmax(z, 1).mul_(-upstream)
    return dz.scatter_add_(1, inputs.target_T[rows, None], upstream)


def _naive(case: Case, inputs: Logits) -> Call:
    def forward() -> Outputs:
        logp = torch.log_softmax(inputs.z, 1).gather(1, inputs.target_T[:, None])
        return {"logprobs": logp[:, 0]}

    def backward() -> Outputs:
        return {"dz": _naive_dz(inputs.z, inputs, slice(None)).to(case.torch_dtype)}

    return forward if case.mode == FORWARD else backward


def _triton(case: Case, inputs: Logits) -> Call:
    from bvpo_kernels.backends import schedule
    from bvpo_kernels.backends.triton import engine, logprobs

    z = inputs.z.clone()  # a call of the backward writes dZ over it
    rows, head = z.shape[0], Head(z.new_zeros(1, 1))  # no bias, no softcap
    count = torch.full((1,), rows, dtype=torch.int32, device=z.device)
    scored = logprobs.Scored(inputs.target_T, count)
    chosen_T = z.gather(1, inputs.target_T[:, None])[:, 0]
    coefficient_T = -torch.expm1(chosen_T - inputs.lse_T) * inputs.upstream_T
    max_T = z.amax(1)
    values = logprobs.Upstream(inputs.upstream_T, coefficient_T, max_T, inputs.lse_T - max_T)

    def forward() -> Outputs:
        state = logprobs.new_state(rows, z.device)
        logprobs.forward_rows(z, scored, state, (0, 0), head)
        finished = schedule.finish_rows(head, inputs.target_T, state, entropy=False)
        return {"logprobs": finished.logprobs_T}

    def backward() -> Outputs:
        dz = engine.over(z, case.torch_dtype)
        logprobs.backward_rows(z, dz, scored, values, (0, 0), head)
        return {"dz": dz}

    return forward if case.mode == FORWARD else backward


def _gate(case: Case, inputs: Logits) -> Gate:
    rows = slice(None, None, GATE_ROW_STRIDE)

    def pick(outputs: Outputs) -> Outputs:
        return {name: value[rows] for name, value in outputs.items()}

    z = inputs.z[rows].double()
    if case.mode == FORWARD:
        logp = torch.log_softmax(z, 1).gather(1, inputs.target_T[rows, None])
        oracle = {"logprobs": logp[:, 0]}
    else:
        oracle = {"dz": _naive_dz(z, inputs, rows)}
    return Gate(inputs, pick, oracle, pick(_naive(case, inputs)()))


def rows_group(device: str, tokens: int = 2048, vocab: int = 151_936) -> Group:
    """Softmax statistics of a chunk of logits, and dZ in bf16 over it."""
    cases = tuple(
        Case({"T": tokens, "V": vocab}, "bfloat16", mode, device, rounds=7) for mode in BYTES
    )
    rows = (Row("naive", _naive), Row("triton", _triton, lambda _: MISSING["triton"]))
    return Group(
        name="gpu-rows", title="row kernels on a GPU", cases=cases, quick=cases, rows=rows,
        make_inputs=_inputs, gate=_gate, memory=False,
        tiny=lambda case: replace(case, shape={"T": 8, "V": 640}),
    )  # fmt: skip
