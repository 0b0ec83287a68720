"""The LM head's inputs, naive code and gate, shared by the groups that measure it.

Modes: "scores" (no gradient), "frozen" (hidden needs one, the weight does not), "trained" (both).
`ignored` is the percentage of rows that are not scored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import Call, Case, Gate, Outputs
from bvpo_kernels import IGNORE_INDEX
from bvpo_kernels.oracles import logprobs as reference

WEIGHT_STD = 0.02
LEANS_ELSEWHERE = 0.3
# Tokens and the stride of vocabulary rows that the gate looks at: enough tokens that a dW which is
# accumulated in half precision shows, and a prime stride, which meets every column of a tile.
GATE_TOKENS = 256
# Tokens whose fp64 logits are in memory at once.
ORACLE_CHUNK = 64
GATE_VOCAB_STRIDE = 37
# The two responses of a pair: TRL's log-softmax loops over the sequences of a batch.
SEQUENCES = 2

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    """`dlogprobs_T` is the upstream gradient."""

    hidden_TD: Tensor
    weight_VD: Tensor
    target_T: Tensor
    dlogprobs_T: Tensor


def make_inputs(case: Case) -> Inputs:
    """Normal weights, log-uniform targets (a Zipf law, as in text), seeded.

    Hidden states are normal and lean by a random amount towards one row of the weight, the target's
    or (LEANS_ELSEWHERE) another: tokens are uncertain, certain, or certain and wrong. Without that
    the softmax is flat, and its part of every gradient too small for the gate to see.
    """
    tokens, dim, vocab = (case.shape[key] for key in "TDV")
    generator = torch.Generator().manual_seed(0)

    def normal(std: float, *size: int) -> Tensor:
        return torch.empty(size).normal_(0, std, generator=generator)

    hidden_TD, weight_VD = normal(1.0, tokens, dim), normal(WEIGHT_STD, vocab, dim)
    uniform_T = torch.rand(tokens, generator=generator)
    target_T = ((vocab + 1.0) ** uniform_T - 1).long().clamp_(0, vocab - 1)
    ignored_T = torch.rand(tokens, generator=generator) * 100 < case.shape.get("ignored", 0)
    elsewhere_T = torch.rand(tokens, generator=generator) < LEANS_ELSEWHERE
    row_T = torch.randint(vocab, (tokens,), generator=generator).where(elsewhere_T, target_T)
    gain_T = 1.5 * math.log(vocab) * torch.rand(tokens, generator=generator)
    towards_TD = weight_VD[row_T]
    hidden_TD += gain_T[:, None] * towards_TD / towards_TD.square().sum(1, keepdim=True)
    target_T[ignored_T] = IGNORE_INDEX
    return Inputs(
        hidden_TD.to(case.device, case.torch_dtype),
        weight_VD.to(case.device, case.torch_dtype),
        target_T.to(case.device),
        normal(1.0, tokens).to(case.device),
    )


def differentiate(forward: Forward, case: Case, inputs: Inputs) -> Call:
    """A call that runs `forward` and the gradients that the mode asks for."""
    hidden = inputs.hidden_TD.detach().requires_grad_(case.mode != "scores")
    weight = inputs.weight_VD.detach().requires_grad_(case.mode == "trained")
    wanted = {
        name: leaf
        for name, leaf in (("dhidden", hidden), ("dweight", weight))
        if leaf.requires_grad
    }

    def call() -> Outputs:
        with torch.set_grad_enabled(bool(wanted)):
            logprobs = forward(hidden, weight, inputs.target_T)
        outputs = {"logprobs": logprobs.detach()}
        if wanted:
            upstream = inputs.dlogprobs_T.to(logprobs.dtype)
            grads = torch.autograd.grad(logprobs, list(wanted.values()), upstream)
            outputs.update(zip(wanted, grads, strict=True))
        return outputs

    return call


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What a training script writes first."""
    logp_TV = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    scored = target != IGNORE_INDEX
    return logp_TV.gather(1, target.where(scored, 0)[:, None])[:, 0].where(scored, 0.0)


def trl_style(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Selective log-softmax: all logits at once, then one sequence at a time.

    In fp32 the chosen logit minus the logsumexp; in bf16, where that would cancel, a log-softmax
    whose result stays in bf16.
    """
    scored = target != IGNORE_INDEX
    index = target.where(scored, 0)[:, None]
    logits = hidden @ weight.T
    parts = []
    for rows, columns in zip(logits.chunk(SEQUENCES), index.chunk(SEQUENCES), strict=True):
        if logits.dtype == torch.float32:
            parts.append(rows.gather(1, columns)[:, 0] - rows.logsumexp(-1))
        else:
            parts.append(rows.log_softmax(-1).gather(1, columns)[:, 0])
    return torch.cat(parts).where(scored, 0.0)


def naive_bytes(case: Case) -> int:
    """fp32 logits and log-softmax; with gradients the saved one, its gradient and the logits'."""
    per_logit = 8 if case.mode == "scores" else 12
    return per_logit * case.shape["T"] * case.shape["V"] + gradient_bytes(case)


def trl_bytes(case: Case) -> int:
    """Logits, and a log-softmax or an exp of one sequence; with gradients theirs and a sum."""
    in_logits = 1.5 if case.mode == "scores" else 3
    size = case.torch_dtype.itemsize
    return int(in_logits * size * case.shape["T"] * case.shape["V"]) + gradient_bytes(case)


def gradient_bytes(case: Case) -> int:
    rows = {"scores": 0, "frozen": case.shape["T"], "trained": case.shape["T"] + case.shape["V"]}
    return rows[case.mode] * case.shape["D"] * case.torch_dtype.itemsize


def oracle(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The library's own definition, in the dtype of its inputs."""
    return reference.linear_logprobs(hidden, weight, target)[0]


def _join(name: str, parts: list[Tensor]) -> Tensor:
    """A result of all tokens from those of chunks: weight gradients add up."""
    return torch.stack(parts).sum(0) if name.startswith("dweight") else torch.cat(parts)


def gate_tokens(num_tokens: int) -> Tensor:
    """Indices of the tokens that the gate looks at."""
    return torch.linspace(0, num_tokens - 1, min(GATE_TOKENS, num_tokens)).long()


def gate(case: Case, inputs: Inputs) -> Gate:
    """The upstream gradient is cut to a few tokens, at the case's own sizes.

    Then dW depends on those tokens alone, and their fp64 oracle is the oracle of the call. Rows of
    dW that a token is likely to hit are judged apart from the others, whose scale is far smaller.
    """
    num_tokens, vocab = case.shape["T"], case.shape["V"]
    device = inputs.target_T.device
    tokens = gate_tokens(num_tokens).to(device)
    few = Inputs(
        inputs.hidden_TD[tokens],
        inputs.weight_VD,
        inputs.target_T[tokens],
        inputs.dlogprobs_T[tokens],
    )
    likely = (few.hidden_TD @ few.weight_VD.T).argmax(1)
    hit_rows = torch.cat([few.target_T[few.target_T != IGNORE_INDEX], likely]).unique()
    strided = torch.arange(0, vocab, GATE_VOCAB_STRIDE, device=device)
    rest_rows = strided[~torch.isin(strided, hit_rows)]

    def pick(outputs: Outputs, rows: Tensor | slice) -> Outputs:
        by_token = [name for name in ("logprobs", "dhidden") if name in outputs]
        picked: Outputs = {name: outputs[name][rows] for name in by_token}
        if "dweight" in outputs:
            picked["dweight"] = outputs["dweight"][hit_rows]
            picked["dweight_rest"] = outputs["dweight"][rest_rows]
        return picked

    weight64_VD = few.weight_VD.double()
    chunks = [
        pick(differentiate(oracle, case, chunk)(), slice(None))
        for chunk in map(
            Inputs,
            few.hidden_TD.double().split(ORACLE_CHUNK),
            itertools.repeat(weight64_VD),
            few.target_T.split(ORACLE_CHUNK),
            few.dlogprobs_T.double().split(ORACLE_CHUNK),
        )
    ]
    dlogprobs_T = torch.zeros_like(inputs.dlogprobs_T).index_copy_(0, tokens, few.dlogprobs_T)
    return Gate(
        inputs=inputs._replace(dlogprobs_T=dlogprobs_T),
        select=lambda outputs: pick(outputs, tokens),
        oracle={name: _join(name, [chunk[name] for chunk in chunks]) for name in chunks[0]},
        baseline=pick(differentiate(naive, case, few)(), slice(None)),
    )


def tiny(case: Case) -> Case:
    return replace(case, shape={**case.shape, "T": 64, "D": 64, "V": 512})


MODES = ("scores", "frozen", "trained")
SMOLLM2 = {"D": 576, "V": 49_152}
QWEN25 = {"D": 896, "V": 151_936}
