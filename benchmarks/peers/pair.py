"""A pair, or a unit of two, mode "dpo": from hidden states to the DPO loss and its gradients.

T tokens, half of them the chosen response; the last E of them, where the shape has E, are the pair
of the empty trace, and the loss is the mean of both. Nothing is padded, and the reference scores
are 0, so that nobody computes them. beta shrinks with T: a saturated loss has no gradient to
compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import head_cases
from benchmarks.head_cases import Inputs, gate_tokens
from benchmarks.peers import head
from benchmarks.registry import Call, Case, Gate, Outputs, Row, why_not
from bvpo_kernels import (
    IGNORE_INDEX,
    GradStats,
    PackedBatch,
    linear_bvpo_loss,
    linear_logprobs,
)
from bvpo_kernels.backends import MISSING
from bvpo_kernels.losses import dpo_loss
from bvpo_kernels.types import KINDS

MODE = "dpo"
# beta T: the scores of the two responses differ by about sqrt(T) nats.
BETA_TOKENS = 3.0
ALPHA = 0.5
LIGER = "liger_kernel.chunked_loss"
# What Liger's loss keeps of the logits of the pair: bf16 and fp32, log-softmax, their gradients.
LIGER_BYTES_PER_LOGIT = 14


def _naive_bytes(case: Case) -> int:
    return head_cases.naive_bytes(replace(case, mode="trained"))


def segments(shape: Any) -> list[int]:
    """Where the responses begin and end, chosen and rejected alternating."""
    empty = shape.get("E", 0)
    trace, whole = (shape["T"] - empty) // 2, shape["T"]
    return [0, trace, whole - empty, *([whole - empty // 2, whole] if empty else [])]


# hidden [T, D], weight [V, D], target [T], beta -> loss, and the scores.
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
    zero = torch.zeros_like(scores[::2])
    return dpo_loss(scores[::2], scores[1::2], zero, zero, beta=beta).mean()


def _from_logprobs(logprobs_of: Scores, case: Case, inputs: Inputs) -> PairLoss:
    edges = segments(case.shape)

    def loss_of(
        hidden: Tensor, weight: Tensor, target: Tensor, beta: float
    ) -> tuple[Tensor, Tensor]:
        logprobs_T = logprobs_of(hidden, weight, target).float()
        scores = torch.stack([logprobs_T[a:b].sum() for a, b in pairwise(edges)])
        return _loss(scores, beta), scores

    return loss_of


def make_batch(case: Case, target_T: Tensor) -> PackedBatch:
    """The pack whose targets these are; its token ids do not matter."""
    edges, kinds = segments(case.shape), KINDS if case.shape.get("E") else KINDS[:1]
    groups = torch.arange(len(kinds))
    target = target_T.cpu()
    scored = [int((target[a:b] != IGNORE_INDEX).sum()) for a, b in pairwise(edges)]
    return PackedBatch(
        tokens_T=torch.zeros_like(target),
        position_ids_T=torch.cat([torch.arange(b - a) for a, b in pairwise(edges)]),
        target_T=target,
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        scored_lengths_S=torch.tensor(scored),
        pair_group_P=groups,
        group_ranges_G2=torch.tensor(list(pairwise(edges[::2]))),
        group_unit_G=torch.zeros_like(groups),
        group_kind_G=groups,
        unit_ids=("unit",),
        kinds=kinds,
        max_seqlen=edges[1],
        num_scored=sum(scored),
    ).to(target_T.device)


def _weights(case: Case) -> dict[str, float]:
    return dict.fromkeys(KINDS, ALPHA) if case.shape.get("E") else {KINDS[0]: 1.0}


def _one_pass(impl: str, case: Case, inputs: Inputs) -> PairLoss:
    batch, alpha = make_batch(case, inputs.target_T), _weights(case)
    zero_S = torch.zeros(batch.num_segments, device=inputs.target_T.device)

    def loss_of(hidden: Tensor, weight: Tensor, _: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        result = linear_bvpo_loss(
            hidden, weight, batch, zero_S, alpha, beta=beta, one_pass=True, impl=impl
        )
        return result.loss, result.scores_S

    return loss_of


def _measured(name: str, one_pass: bool, case: Case, inputs: Inputs) -> Call:
    """With the Gram matrix of the unit's two gradients, as `GradStats` has it."""
    batch, alpha = make_batch(case, inputs.target_T), _weights(case)
    zero_S = torch.zeros(batch.num_segments, device=inputs.target_T.device)
    vocab, dim = inputs.weight_VD.shape
    with torch.device("meta"):
        model = nn.ModuleDict({"head": nn.Linear(dim, vocab, bias=False)})
    layer: Any = model["head"]
    layer.weight = nn.Parameter(inputs.weight_VD)
    stats = GradStats(model, head=layer, cross="none")
    hidden = inputs.hidden_TD.detach().requires_grad_()
    beta = BETA_TOKENS / case.shape["T"]

    def call() -> Outputs:
        with stats.collect(batch):
            result = linear_bvpo_loss(
                hidden, layer.weight, batch, zero_S, alpha, beta=beta, one_pass=one_pass, impl=name
            )
            dhidden, dweight = _gradients(result.loss, hidden, layer.weight)
        stats.result()
        return {"scores": result.scores_S.detach(), "dhidden": dhidden, "dweight": dweight}

    return call


def _gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """By `backward`: the statistics are gradients of leaves, too."""
    loss.backward()
    result = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    return result  # type: ignore[return-value]


def _by_tiles(impl: str) -> Scores:
    def logprobs_of(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, target, impl=impl)

    return logprobs_of


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
    tokens, edges = gate_tokens(case.shape["T"]), segments(case.shape)
    segment_N = torch.searchsorted(torch.tensor(edges[1:]), tokens, right=True)
    scored = head_cases.gate(replace(case, mode="scores"), inputs)
    logprobs_N, naive_N = (
        outputs["logprobs"].cpu() for outputs in (scored.oracle, scored.baseline)
    )

    def scores(values_N: Tensor) -> Tensor:
        return torch.stack([values_N[segment_N == s].sum() for s in range(len(edges) - 1)])

    beta = BETA_TOKENS / case.shape["T"]
    scores_P2 = scores(logprobs_N).view(-1, 2)
    slope_P = beta * torch.sigmoid(-beta * (scores_P2[:, 0] - scores_P2[:, 1])) / len(scores_P2)
    upstream_T = torch.zeros(case.shape["T"]).double()
    upstream_T[tokens] = torch.stack([-slope_P, slope_P], 1).flatten()[segment_N]
    given = inputs._replace(dlogprobs_T=upstream_T.to(inputs.dlogprobs_T.device))
    head_gate = head_cases.gate(replace(case, mode="trained"), given)

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


def _row(name: str, make_loss: Callable[[Case, Inputs], PairLoss], **options: Any) -> Row:
    def make(case: Case, inputs: Inputs) -> Call:
        return _differentiate(make_loss(case, inputs), case, inputs)

    return Row(name, make, **{"modes": (MODE,), **options})


def _liger_bytes(case: Case) -> int:
    return LIGER_BYTES_PER_LOGIT * case.shape["T"] * case.shape["V"]


def _missing(impl: str, case: Case) -> str:
    return MISSING[impl]


def measured_rows(impl: str) -> tuple[Row, ...]:
    """What the statistics of the two gradients cost, by either schedule."""
    missing = partial(_missing, impl)
    return tuple(
        Row(f"{name} + statistics", partial(_measured, impl, one_pass), missing, modes=(MODE,))
        for name, one_pass in (("one pass", True), ("tiles again", False))
    )


def own_rows(impl: str, name: str = "") -> tuple[Row, ...]:
    """One pass, and tiles of logits that are computed again, on a backend."""
    missing = partial(_missing, impl)
    return (
        _row(f"one pass{name}", partial(_one_pass, impl), missing=missing),
        _row(f"tiles again{name}", partial(_from_logprobs, _by_tiles(impl)), missing=missing),
    )


NAIVE = _row("naive", partial(_from_logprobs, head_cases.naive), predicted_bytes=_naive_bytes)
OURS = (NAIVE, *own_rows("cpp"), *own_rows("eager", ", eager"))
ROWS = (
    NAIVE,
    _row("TRL selective", partial(_from_logprobs, head.trl_selective), package="trl",
         missing=head.trl_missing, predicted_bytes=_naive_bytes),
    _row("TRL chunked", partial(_from_logprobs, head.trl_chunked), package="trl",
         missing=head.trl_missing),
    _row("Liger DPO", lambda *_: _liger, package="liger-kernel", predicted_bytes=_liger_bytes,
         missing=lambda _: why_not("liger-kernel", LIGER)),
    _row("one pass", partial(_one_pass, "auto"), package="bvpo_kernels"),
    _row("bvpo_kernels", partial(_from_logprobs, _by_tiles("auto")), package="bvpo_kernels"),
)  # fmt: skip
