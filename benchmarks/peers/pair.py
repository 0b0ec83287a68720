"""One long pair, mode "dpo": from hidden states to the DPO loss and its gradients.

T tokens, half of them the chosen response. Nothing is padded, and the reference scores are 0, so
that nobody computes them. beta shrinks with T: a saturated loss has no gradient to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.groups import logprobs
from benchmarks.groups.logprobs import Inputs, gate_tokens
from benchmarks.peers import head
from benchmarks.registry import Call, Case, Gate, Outputs, Row, why_not
from bvpo_kernels import IGNORE_INDEX, linear_logprobs, segment_sum
from bvpo_kernels.losses import dpo_loss

MODE = "dpo"
# beta T: the scores of the two responses differ by about sqrt(T) nats.
BETA_TOKENS = 3.0
LIGER = "liger_kernel.chunked_loss"
# What Liger's loss keeps of the logits of the pair: bf16 and fp32, log-softmax, their gradients.
LIGER_BYTES_PER_LOGIT = 14


def _naive_bytes(case: Case) -> int:
    return logprobs.naive_bytes(replace(case, mode="trained"))


# hidden [T, D], weight [V, D], target [T], beta -> loss, and the two scores.
PairLoss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Scores = Callable[[Tensor, Tensor, Tensor], Tensor]


def _differentiate(loss_of: PairLoss, case: Case, inputs: Inputs) -> Call:
    hidden = inputs.hidden_TD.detach().requires_grad_()
    weight = inputs.weight_VD.detach().requires_grad_()
    beta = BETA_TOKENS / case.shape["T"]

    def call() -> Outputs:
        loss, scores = loss_of(hidden, weight, inputs.target_T, beta)
        dhidden, dweight = torch.autograd.grad(loss, [hidden, weight])
        return {"scores": scores.detach(), "dhidden": dhidden, "dweight": dweight}

    return call


def _loss(scores: Tensor, beta: float) -> Tensor:
    zero = torch.zeros_like(scores[:1])
    return dpo_loss(scores[:1], scores[1:], zero, zero, beta=beta).mean()


def _from_logprobs(logprobs_of: Scores) -> PairLoss:
    def loss_of(
        hidden: Tensor, weight: Tensor, target: Tensor, beta: float
    ) -> tuple[Tensor, Tensor]:
        logprobs_T = logprobs_of(hidden, weight, target)
        scores = logprobs_T.float().unflatten(0, (2, -1)).sum(1)
        return _loss(scores, beta), scores

    return loss_of


def _ours(hidden: Tensor, weight: Tensor, target: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    half, tokens = len(target) // 2, len(target)
    cu_seqlens = torch.tensor([0, half, tokens], dtype=torch.int32, device=target.device)
    scores = segment_sum(linear_logprobs(hidden, weight, target), cu_seqlens)
    return _loss(scores, beta), scores


def _liger(hidden: Tensor, weight: Tensor, target: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    function = LigerFusedLinearDPOLoss(beta=beta, use_ref_model=False)
    loss, (chosen, rejected, *_) = function(
        weight, hidden.unflatten(0, (2, -1)), target.unflatten(0, (2, -1))
    )
    return loss, torch.cat([chosen, rejected])


def gate(case: Case, inputs: Inputs) -> Gate:
    """All targets but a few are ignored: then the gradients are those of these tokens alone.

    d loss / d logp is -beta sigma(-z) for a chosen token and the opposite for a rejected one, so
    that the oracle of the head, given that upstream gradient, is the oracle of the loss.
    """
    tokens = gate_tokens(case.shape["T"])
    chosen_N = tokens < case.shape["T"] // 2
    scored = logprobs.gate(replace(case, mode="scores"), inputs)
    logprobs_N, naive_N = (
        outputs["logprobs"].cpu() for outputs in (scored.oracle, scored.baseline)
    )

    def scores(values_N: Tensor) -> Tensor:
        return torch.stack([values_N[chosen_N].sum(), values_N[~chosen_N].sum()])

    beta = BETA_TOKENS / case.shape["T"]
    chosen, rejected = scores(logprobs_N)
    slope = beta * torch.sigmoid(-beta * (chosen - rejected))
    upstream_T = torch.zeros(case.shape["T"]).double()
    upstream_T[tokens] = torch.where(chosen_N, -slope, slope)
    given = inputs._replace(dlogprobs_T=upstream_T.to(inputs.dlogprobs_T.device))
    head_gate = logprobs.gate(replace(case, mode="trained"), given)

    def with_scores(outputs: Outputs, values: Tensor) -> Outputs:
        return {name: value for name, value in outputs.items() if name != "logprobs"} | {
            "scores": values
        }

    def select(outputs: Outputs) -> Outputs:
        # The head's gate picks per-token values, of which a pair's loss returns none.
        picked = head_gate.select({"logprobs": inputs.dlogprobs_T, **outputs})
        return with_scores(picked, outputs["scores"])

    target_T = torch.full_like(inputs.target_T, IGNORE_INDEX)
    target_T[tokens] = inputs.target_T[tokens]
    device = inputs.target_T.device
    return Gate(
        inputs=inputs._replace(target_T=target_T),
        select=select,
        oracle=with_scores(head_gate.oracle, scores(logprobs_N).to(device)),
        baseline=with_scores(head_gate.baseline, scores(naive_N).to(device)),
    )


def _row(name: str, loss_of: PairLoss, **options: Any) -> Row:
    return Row(
        name, lambda case, inputs: _differentiate(loss_of, case, inputs), modes=(MODE,), **options
    )


def _liger_bytes(case: Case) -> int:
    return LIGER_BYTES_PER_LOGIT * case.shape["T"] * case.shape["V"]


ROWS = (
    _row("naive", _from_logprobs(logprobs.naive), predicted_bytes=_naive_bytes),
    _row("TRL selective", _from_logprobs(head.trl_selective), package="trl",
         missing=head.trl_missing, predicted_bytes=_naive_bytes),
    _row("TRL chunked", _from_logprobs(head.trl_chunked), package="trl", missing=head.trl_missing),
    _row("Liger DPO", _liger, package="liger-kernel", predicted_bytes=_liger_bytes,
         missing=lambda _: why_not("liger-kernel", LIGER)),
    _row("bvpo_kernels", _ours, package="bvpo_kernels"),
)  # fmt: skip
