"""`linear_bvpo_loss`: the BVPO loss from hidden states, the head's gradients formed in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bvpo_kernels import checks, ops, scope
from bvpo_kernels.backends import one_pass as schedule
from bvpo_kernels.backends.slopes import SLOPES
from bvpo_kernels.call import Call, Inputs, Need, Pairs, accumulate_dtype
from bvpo_kernels.head.api import linear_logprobs, prepare, workspace_for
from bvpo_kernels.head.cost import HeadShape, one_pass_bytes
from bvpo_kernels.losses import LOSSES, bvpo_loss
from bvpo_kernels.losses.mixture import KindWeight, check_loss, kind_weights, report
from bvpo_kernels.ops.packing import choose_sum
from bvpo_kernels.types import IGNORE_INDEX, BVPOLoss, PackedBatch


class _Request(NamedTuple):
    """A call that one pass may serve; `owner`: weight and bias before casts."""

    inputs: Inputs
    call: Call
    need: Need
    pairs: Pairs
    owner: tuple[Any, Any]


def _need(inputs: Inputs) -> Need:
    hidden, weight, _, bias, low, _ = inputs
    return Need(
        hidden.requires_grad or (low is not None and low.requires_grad),
        weight.requires_grad,
        bias is not None and bias.requires_grad,
    )


def _unserved(inputs: Inputs, call: Call, sharded: bool, loss: str, batch: PackedBatch) -> str:
    """Why the gradients of this call cannot be formed with its scores; '' where they can."""
    need = _need(inputs)
    if not torch.is_grad_enabled():
        return "no gradient is wanted"
    lora_b_VR = inputs.lora_b_VR
    trained = need.weight or need.bias or (lora_b_VR is not None and lora_b_VR.requires_grad)
    if not trained:
        return "the head is frozen: 4 TVD already"
    if loss not in SLOPES:
        return f"loss {loss!r} is no function of a pair's margin"
    if call.impl == "reference" or sharded:
        return "impl 'reference' keeps all logits" if not sharded else "the weight is sharded"
    if call.tail_tolerance > 0:
        return "tail_tolerance > 0 asks for the sparse backward"
    if batch.on_host is None:
        return "the batch was not moved to its device by `PackedBatch.to`"
    if scope.active is not None and (why := scope.active.no_pair_loss(batch)):
        return why
    return ""


def _workspace(
    inputs: Inputs, call: Call, given: int | None, batch: PackedBatch
) -> tuple[int, str]:
    """Bytes that the pass may take, and why they are too few; '' where they are not."""
    apart = scope.active is not None and scope.active.keeps_groups_apart
    tiles = batch.num_pairs if apart else min(batch.num_pairs, 2)
    vocab, dim = inputs.weight_VD.shape
    rank = 0 if inputs.lora_b_VR is None else inputs.lora_b_VR.shape[1]
    shape = HeadShape(inputs.target_T.shape[0], dim, vocab, rank)
    options: Any = {"weight": _need(inputs).weight, "tiles": tiles}
    bytes_of = partial(one_pass_bytes, shape, inputs.hidden_TD.dtype, call.impl, **options)
    if given is None:
        default = bytes_of()
        fits = schedule.fits_default(tiles, default.tiles)
        return (
            default.total,
            "" if fits else f"{tiles} groups are measured, in {default.tiles} bytes",
        )
    least = bytes_of(rows=schedule.LEAST_ROWS).total
    return given, "" if given >= least else f"workspace_bytes: expected {least}, got {given}"


def _pairs(
    batch: PackedBatch,
    objective: tuple[str, float, Mapping[str, float]],
    ref_scores_S: Tensor | None,
    weights: Mapping[str, KindWeight],
    ignore_index: int,
    dtype: torch.dtype,
) -> Pairs:
    """objective: name of the loss, beta, options."""
    loss, beta, options = objective
    weight_P = torch.zeros_like(batch.pair_group_P, dtype=torch.float64)
    for kind in weights.values():
        weight_P = torch.where(kind.mask_P, kind.by_pair, weight_P)
    host, device = batch.on_host, weight_P.device
    assert host is not None
    edges = host.cu_seqlens.to(torch.int64)
    # Counted, for targets may have been masked since the batch was packed.
    scored_T = (host.target_T != ignore_index).to(torch.int64)
    before = torch.cat([scored_T.new_zeros(1), scored_T.cumsum(0)])[edges]
    sign_S = torch.ones(batch.num_segments, dtype=torch.float64, device=device)
    sign_S[1::2] = -1
    if LOSSES[loss].lengths:
        sign_S = sign_S / batch.scored_lengths_S
    if ref_scores_S is not None:
        checks.vector_like(sign_S, "ref_scores_S", ref_scores_S, checks.SCORE_DTYPES)
    if ref_scores_S is None or not LOSSES[loss].reference:
        ref_scores_S = sign_S.new_zeros(sign_S.shape)
    return Pairs(
        batch.cu_seqlens,
        torch.stack([edges[:-1:2], edges[2::2]], 1),
        before[2::2] - before[:-1:2],
        sign_S,
        ref_scores_S.detach().to(dtype),
        weight_P,
        loss,
        beta,
        list(options),
        [float(value) for value in options.values()],
    )


def _scores(request: _Request) -> tuple[Tensor, Tensor]:
    """A 0 that has the loss's gradient, and the segments' scores."""
    if scope.active is not None:
        measured = scope.active.head_pair_loss(
            request.inputs, request.call, request.pairs, request.need, request.owner
        )
        if measured is not None:
            return measured
    carrier, scores_S, *_ = ops.linear_pair_loss(
        *request.inputs, *request.call, *request.pairs, *request.need
    )
    return carrier, scores_S.detach()


def linear_bvpo_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: PackedBatch,
    ref_scores_S: Tensor | None,
    alpha: float | Tensor | Mapping[str, float | Tensor],
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    pair_counts: Mapping[str, int | Tensor] | None = None,
    unit_counts: Mapping[str, int] | None = None,
    kl: Tensor | Mapping[str, Tensor] | None = None,
    one_pass: bool | None = None,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    tail_tolerance: float = 0.0,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    **loss_options: float,
) -> BVPOLoss:
    """bvpo_loss(segment_sum(linear_logprobs(h, W, targets)), ...), a trained head at 6 TVD FLOPs.

    The gradient of a pair's loss f(m) to the logits is f'(m) times what is known before the scores
    are. So dZ, dH and dW of the margins m are formed in the forward, from logits that are computed
    once, and multiplied by f'(m) when it is there; `linear_logprobs` computes each tile twice (8
    TVD) or three times.

    Args:
        hidden: [T, D], bf16, fp16, fp32 or fp64, of `batch.tokens_T`.
        weight, bias, lora, temperature, softcap, ignore_index, tail_tolerance, impl: of
            `linear_logprobs`; targets are `batch.target_T`.
        batch, ref_scores_S, alpha, loss, beta, pair_counts, unit_counts, kl, loss_options: of
            `bvpo_loss`.
        one_pass: None takes one pass where it serves and is not slower (half precision on a CPU
            with AMX, or on "eager"); True refuses, with the reason, where it does not serve; False
            never takes it. It serves a trained head (weight, bias or LoRA's B) of any
            loss of a margin ("dpo", "ipo", "ipo_sum", "hinge", "simpo"; not "kto"), whole on its
            rank, with tail_tolerance 0, of a batch that was packed on the host (`pack`,
            `PackedBatch.to`); while gradient statistics are collected, with one pair per group, or
            `within`.
        workspace_bytes: bound on temporary memory. One pass takes two tiles [V, D] in fp32 (one if
            there is one pair; with exact gradient statistics one per group) and the logits of a
            chunk of rows, 4 bytes each (16 on "eager"), of at least 64 rows. None: as much as that
            with 2048 rows on a GPU, 1024 on "cpp", 256 on "eager", whatever T is, and for more than
            two groups up to 8 of them in 4 GiB; where one pass does not serve, the default of
            `linear_logprobs`.

    Returns:
        BVPOLoss: as of `bvpo_loss`, with `scores_S`. After one pass (`one_pass` in it) the gradient
        of `loss` alone is there: `kind_losses` and `scores_S` are detached. dH is rounded twice,
        with and without the pair's factor; dW is summed in fp32 and rounded once.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
        NotImplementedError: for second derivatives and forward mode (not with impl="reference").

    Source: DESIGN.md, "LM-head schedules"; arXiv 2510.05095 (BVPO).
    """
    check_loss(loss, loss_options, ref_scores_S, kl)
    mixture: dict[str, Any] = {
        "loss": loss,
        "beta": beta,
        "pair_counts": pair_counts,
        "unit_counts": unit_counts,
        "kl": kl,
        **loss_options,
    }
    given = Inputs(hidden, weight, batch.target_T, bias, *(lora or (None, None)))
    bound = workspace_for(hidden, workspace_bytes)
    asked = Call(
        temperature, softcap, ignore_index, bound, batch.num_scored, tail_tolerance, False, impl
    )
    inputs, call, sharded = prepare(given, asked)
    why = "it was not asked for"
    if one_pass is not False:
        why = _unserved(inputs, call, sharded, loss, batch)
    if not why and one_pass is None:
        why = schedule.slower(call.impl, inputs.hidden_TD.dtype, inputs.hidden_TD.device.type)
    if not why:
        bound, why = _workspace(inputs, call, workspace_bytes, batch)
    if why and one_pass:
        raise ValueError(f"one_pass: expected a call that one pass serves, got {why}")
    if why:
        scores_S = _scores_by_tiles(given, asked, batch)
        return bvpo_loss(scores_S, ref_scores_S, batch, alpha, **mixture)
    weights = kind_weights(batch, alpha, inputs.hidden_TD.device, pair_counts, unit_counts)
    dtype = accumulate_dtype(inputs.hidden_TD.dtype)
    pairs = _pairs(batch, (loss, beta, loss_options), ref_scores_S, weights, ignore_index, dtype)
    call = call._replace(workspace_bytes=bound)
    carrier, scores_S = _scores(_Request(inputs, call, _need(inputs), pairs, (weight, bias)))
    with torch.no_grad():
        result = bvpo_loss(scores_S, ref_scores_S, batch, alpha, **mixture)
    report(weights, pair_counts is None or unit_counts is not None)
    return result._replace(loss=result.loss + carrier, one_pass=True)


def _scores_by_tiles(inputs: Inputs, call: Call, batch: PackedBatch) -> Tensor:
    """Of the segments, differentiable."""
    hidden, weight, target, bias, low, lora_b = inputs
    logprobs_T = linear_logprobs(
        hidden,
        weight,
        target,
        bias=bias,
        lora=None if low is None or lora_b is None else (low, lora_b),
        temperature=call.temperature,
        softcap=call.softcap,
        ignore_index=call.ignore_index,
        tail_tolerance=call.tail_tolerance,
        workspace_bytes=call.workspace_bytes,
        max_scored=call.max_scored,
        impl=call.impl,
    )
    chosen = choose_sum("auto", logprobs_T.device.type)
    return ops.segment_sum(logprobs_T, batch.cu_seqlens, chosen)
