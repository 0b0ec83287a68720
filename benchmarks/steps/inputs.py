"""The units of a step, their reference scores, and how a step's result is judged."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import records
from benchmarks.registry import Case, Outputs
from bvpo_kernels.types import EMPTY, KINDS, TRACE, TokenPair, Unit
from train.cli import parse
from train.config import RunConfig
from train.inputs import load_inputs
from train.model.models import load_model
from train.reference import response_key
from train.steps import StepPlan

DEMO = records.ROOT / "train" / "presets" / "demo.yaml"
PAIRS = records.ROOT / "train" / "data" / "smollm2_pairs.jsonl"
# Tokens of a trace in the mode "long".
LONG_TRACE = 1024
# Sizes of the model of the mode "tiny", and of its traces and answers.
TINY: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
TINY_TOKENS = {TRACE: 150, EMPTY: 6}
TINY_PROMPT = 20
# A reference that the policy has moved away from by so many nats per response, up or down: at the
# policy itself every loss is log 2, whatever the scores.
REFERENCE_SHIFT = 4.0
# Rows of the (tied) embedding whose gradient is compared.
EMBEDDING_ROWS = 256


@dataclass(frozen=True)
class StepInputs:
    """What every implementation of a step gets.

    micro_batches: the units of the step as the loop packs them. reference: nats by `response_key`.
    """

    case: Case
    cfg: RunConfig
    micro_batches: tuple[tuple[Unit, ...], ...]
    reference: Mapping[str, float]

    @property
    def units(self) -> list[Unit]:
        return list(chain.from_iterable(self.micro_batches))

    @property
    def num_tokens(self) -> int:
        """Tokens of the step without padding; a prompt counts once per response."""
        return sum(unit.num_tokens for unit in self.units)

    def load(self) -> Any:
        """The model of the case, fp32, in eval mode, with an attention that takes padding."""
        if self.case.mode != "tiny":
            return load_model(self.cfg.model, packed=False)[0]
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**TINY)).eval()

    def reference_of(self, pair: TokenPair) -> tuple[float, float]:
        """Scores of the chosen and the rejected response under the reference."""
        keys = (response_key(pair.prompt, response) for response in (pair.chosen, pair.rejected))
        chosen, rejected = (self.reference[key] for key in keys)
        return chosen, rejected


class Step(Protocol):
    """A step that can be repeated."""

    @property
    def model(self) -> Any:
        """The causal LM that is trained, without what is wrapped around it."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What moves its parameters."""

    def run(self) -> Tensor:
        """Zero gradients, forward, backward, clip, optimizer; the loss of the whole step."""


def config_of(case: Case) -> RunConfig:
    """The demo's configuration with a fixed weight, and the case's units per step and dtype.

    The learning rate is 0: the optimizer works as ever, and every step is the first one.
    """
    overrides = [
        "--alpha.estimate", "null", "--optim.lr", "0", "--train.pairs", str(PAIRS),
        "--model.compute_dtype", case.dtype, "--train.units_per_step", str(case.shape["units"]),
    ]  # fmt: skip
    return parse(["train", "--config", str(DEMO), *overrides])[1]


def _long(units: Sequence[Unit], count: int) -> list[Unit]:
    """The first units with the traces of the following ones appended, to LONG_TRACE tokens."""

    def extended(start: int, side: str) -> tuple[int, ...]:
        order = [*units[start:], *units[:start]]
        tokens = chain.from_iterable(getattr(unit.pairs[TRACE][0], side) for unit in order)
        return tuple(token for token, _ in zip(tokens, range(LONG_TRACE), strict=False))

    return [
        Unit(unit.unit_id, {
            TRACE: [TokenPair(unit.pairs[TRACE][0].prompt, extended(n, "chosen"),
                              extended(n, "rejected"))],
            EMPTY: unit.pairs[EMPTY],
        })
        for n, unit in enumerate(units[:count])
    ]  # fmt: skip


def _tiny(count: int) -> list[Unit]:
    rng = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, TINY["vocab_size"]) for _ in range(length))

    def pair(length: int) -> TokenPair:
        return TokenPair(ids(TINY_PROMPT), ids(length), ids(length // 2))

    return [
        Unit(str(number), {kind: [pair(length)] for kind, length in TINY_TOKENS.items()})
        for number in range(count)
    ]


def _units(case: Case, cfg: RunConfig) -> list[Unit]:
    if case.mode == "tiny":
        return _tiny(case.shape["units"])
    training = load_inputs(cfg).training
    if case.mode == "long":
        return _long(training, case.shape["units"])
    return list(StepPlan(training, cfg.train, cfg.seed)[0].units)


def make_inputs(case: Case) -> StepInputs:
    """Units of the case, packed as the loop packs them, and their shifted reference scores."""
    cfg = config_of(case)
    units = _units(case, cfg)
    longest = max(unit.num_tokens for unit in units)
    # Packs are dealt to ranks whole: with several, a unit each.
    least = 0 if case.shape["ranks"] > 1 else cfg.train.tokens_per_micro_batch
    cfg.train.tokens_per_micro_batch = max(longest, least)
    step = StepPlan(units, cfg.train, cfg.seed)[0]
    micro_batches = tuple(micro.units for micro in step.micro_batches)
    bare = StepInputs(case, cfg, micro_batches, {})
    return StepInputs(case, cfg, micro_batches, _shifted_scores(bare))


@torch.no_grad()
def _shifted_scores(inputs: StepInputs) -> dict[str, float]:
    model, scores = inputs.load(), {}
    for unit in inputs.units:
        for pairs in unit.pairs.values():
            for pair in pairs:
                for shift, response in ((1, pair.chosen), (-1, pair.rejected)):
                    key = response_key(pair.prompt, response)
                    score = score_alone(model, pair.prompt, response).item()
                    scores[key] = score + shift * REFERENCE_SHIFT
    return scores


def score_alone(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """log pi(y|x) of one sequence, unpadded, from all of its logits."""
    tokens_1L = torch.tensor([[*prompt, *response]])
    logits_LV = model(input_ids=tokens_1L, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits_LV.log_softmax(-1).gather(1, tokens_1L[0, len(prompt) :, None]).sum()


def oracle(inputs: StepInputs) -> Outputs:
    """Loss and gradient in fp64, a pair at a time and without padding."""
    model = inputs.load().double()
    total = torch.zeros((), dtype=torch.float64)
    for unit in inputs.units:
        for kind in KINDS:
            for pair in unit.pairs[kind]:
                chosen, rejected = (
                    score_alone(model, pair.prompt, response)
                    for response in (pair.chosen, pair.rejected)
                )
                margin = chosen - rejected - _difference(inputs.reference_of(pair))
                weight = inputs.cfg.alpha.fixed
                weight = (weight if kind == TRACE else 1 - weight) / len(inputs.units)
                loss = -weight * logsigmoid(inputs.cfg.loss.beta * margin)
                loss.backward()
                total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), inputs.cfg.optim.max_grad_norm)
    return {"loss": total.reshape(1), "gradient": gradient_sample(model)}


def _difference(scores: tuple[float, float]) -> float:
    return scores[0] - scores[1]


def gradient_sample(model: Any) -> Tensor:
    """Gradients of both ends of the decoder, whole, and of some rows of the tied embedding."""
    inner = model.model
    first, last = inner.layers[0], inner.layers[-1]
    weights = (
        inner.norm.weight,
        first.self_attn.k_proj.weight,
        last.mlp.down_proj.weight,
        inner.embed_tokens.weight,
    )
    grads = [getattr(w.grad, "full_tensor", lambda w=w: w.grad)().detach() for w in weights]
    grads[-1] = grads[-1][:EMBEDDING_ROWS]
    return torch.cat([grad.double().flatten() for grad in grads])


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the optimizer's state with a step of zero gradients, which moves nothing."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
