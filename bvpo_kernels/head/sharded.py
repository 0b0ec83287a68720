"""`linear_logprobs` for a weight that is a DTensor: a head whose vocabulary is spread over ranks.

Every rank holds the same tokens and some rows of W. It runs an ordinary backend on them, and
numbers per token are exchanged, never logits. Derivation: bvpo_kernels/head/README.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from bvpo_kernels import checks, ops
from bvpo_kernels.backends.schedule import no_lists, p_log_p
from bvpo_kernels.call import Call, Inputs, inputs_of
from bvpo_kernels.ops.derivatives import once
from bvpo_kernels.types import IGNORE_INDEX


class _Shard(NamedTuple):
    """The rows [start, stop) of V that this rank holds, and the ranks that hold the others."""

    start: int
    stop: int
    vocab: int
    group: Any
    ignore_index: int


def _replicated(name: str, tensor: Tensor) -> Tensor:
    """A tensor that is the same on every rank, as a plain one."""
    if not isinstance(tensor, DTensor):
        return tensor
    if not all(isinstance(placement, Replicate) for placement in tensor.placements):
        raise ValueError(
            f"{name}: expected a plain Tensor or a DTensor with placements Replicate(), got "
            f"{tensor.placements}"
        )
    return tensor.to_local()


def is_replicated(weight: Any) -> bool:
    """Whether every rank holds the whole of a DTensor."""
    return all(isinstance(placement, Replicate) for placement in weight.placements)


def unwrap(inputs: Inputs) -> Inputs:
    """The call on plain tensors where every rank holds the whole weight."""
    names = ("hidden", "weight", "target", "bias", "lora[0]", "lora[1]")
    return inputs_of(
        tensor if tensor is None else _replicated(name, tensor)
        for name, tensor in zip(names, inputs, strict=True)
    )


def _shard(weight: Any, ignore_index: int) -> _Shard:
    """Which rows of the vocabulary are here.

    Raises:
        ValueError: for placements other than Shard(0) on one dimension of the mesh and Replicate()
            on the others, or rows that are not distributed as `distribute_tensor` does it.
    """
    sharded = [i for i, p in enumerate(weight.placements) if not isinstance(p, Replicate)]
    if len(sharded) != 1 or weight.placements[sharded[0]] != Shard(0):
        raise ValueError(
            f"weight: expected placements Shard(0) (the vocabulary) on one dimension of the mesh "
            f"and Replicate() on the others, got {weight.placements}"
        )
    mesh, (vocab, _) = weight.device_mesh, weight.shape
    rows = -(-vocab // mesh.size(sharded[0]))
    start = min(mesh.get_local_rank(sharded[0]) * rows, vocab)
    stop = min(start + rows, vocab)
    found = weight.to_local().shape[0]
    if found != stop - start:
        raise ValueError(
            f"weight: expected {stop - start} of the {vocab} rows on this rank, as Shard(0) "
            f"distributes them, got {found}"
        )
    return _Shard(start, stop, vocab, mesh.get_group(sharded[0]), ignore_index)


class _Own(NamedTuple):
    """Of this rank's columns without the target's, fp64: shift c, log of s = sum exp(z_v - c),
    sum exp(z_v - c)(z_v - c); then z_y - c, and z_j - c of the stand-in j, where y is elsewhere."""

    shift_T: Tensor
    log_sum_T: Tensor
    weighted_T: Tensor
    own_T: Tensor
    stand_in_T: Tensor


def _own(inputs: Inputs, call: Call, owned_T: Tensor) -> _Own:
    """What this rank's backend says, put so that ranks can be merged.

    The backend has scored column y, or else j. With l = lse - m, the m that it subtracted,
    z_y - m = l + logp and log s = l + log(1 - p): no term cancels, for p -> 1 nor for p -> 0.
    Where y is elsewhere the shift is lse itself, so s = 1 and the last sum is minus the entropy.
    """
    if inputs.weight_VD.shape[0] == 0:
        nothing_T = inputs.hidden_TD.new_zeros(inputs.hidden_TD.shape[0], dtype=torch.float64)
        return _Own(nothing_T - torch.inf, nothing_T - torch.inf, *[nothing_T] * 3)
    logprobs_T, max_T, logsum_T, *_, entropy_T, _ = ops.linear_logprobs_forward(
        *inputs, *call, False
    )
    logp_T, max_T, logsum_T = logprobs_T.double(), max_T.double(), logsum_T.double()
    rest_T = -torch.expm1(logp_T)
    shift_T = torch.where(owned_T, max_T, max_T + logsum_T)
    log_sum_T = torch.where(owned_T, logsum_T + rest_T.log(), 0.0)
    weighted_T = torch.zeros_like(logp_T)
    if call.need_entropy:
        # H = -p log p - sum_{v != y} p_v (z_v - m) + l (1 - p), solved for the sum.
        own_T = (logsum_T * rest_T - entropy_T - p_log_p(logp_T)) * logsum_T.exp()
        weighted_T = torch.where(owned_T, own_T.where(rest_T > 0, 0.0), -entropy_T.double())
    return _Own(shift_T, log_sum_T, weighted_T, logsum_T + logp_T, logp_T)


class _Whole(NamedTuple):
    """Per token, of the whole vocabulary: lse = top + logsum; `top` has the result's dtype."""

    logp_T: Tensor
    entropy_T: Tensor
    top_T: Tensor
    logsum_T: Tensor


def _merge(own: _Own, target: Tensor, owned_T: Tensor, shard: _Shard, dtype: torch.dtype) -> _Whole:
    """Join the ranks' statistics: the formulas of `schedule.finish_rows`, in fp64."""
    scored_T = target != shard.ignore_index
    top_T = own.shift_T.clone()
    dist.all_reduce(top_T, dist.ReduceOp.MAX, shard.group)
    top_T = top_T.to(dtype)
    delta_T = own.shift_T - top_T
    sum_T = (own.log_sum_T + delta_T).exp()
    # A shift of -inf comes with a sum of 0.
    moved_T = (own.weighted_T * delta_T.exp() + delta_T * sum_T).where(sum_T > 0, 0.0)
    target_T = torch.where(owned_T, own.own_T + delta_T, 0.0)
    joined_4T = torch.stack((sum_T, moved_T, target_T, owned_T.double()))
    dist.all_reduce(joined_4T, dist.ReduceOp.SUM, shard.group)
    sum_T, moved_T, target_T, owners_T = joined_4T
    checks.require(
        ((owners_T == 1) | ~scored_T).all(),
        f"target: expected values in [0, {shard.vocab}) or ignore_index="
        f"{shard.ignore_index}, the same on every rank that shares the vocabulary",
        lambda: (
            f"{int(target[(owners_T != 1) & scored_T][0])} at a token that "
            f"{int(owners_T[(owners_T != 1) & scored_T][0])} ranks claim"
        ),
    )
    logp_T = torch.nn.functional.logsigmoid(target_T - sum_T.log())
    logsum_T = torch.logaddexp(target_T, sum_T.log())
    entropy_T = -(p_log_p(logp_T) + moved_T * torch.exp(-logsum_T))
    entropy_T = (entropy_T - logsum_T * torch.expm1(logp_T)).where(scored_T, 0.0)
    return _Whole(logp_T.where(scored_T, 0.0), entropy_T, top_T, logsum_T)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shard: _Shard, call: Call, whole_bias: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        inputs = inputs_of(tensors)
        target = inputs.target_T
        scored_T = target != shard.ignore_index
        owned_T = scored_T & (target >= shard.start) & (target < shard.stop)
        # Another rank's target needs a stand-in that the backend can score; the remainder spreads
        # them over the columns and leaves a target of this rank where it is.
        local_T = (target - shard.start) % max(shard.stop - shard.start, 1)
        local_T = local_T.masked_fill(~scored_T, IGNORE_INDEX)
        bias_V = inputs.bias_V
        if bias_V is not None and whole_bias:
            bias_V = bias_V[shard.start : shard.stop]
        inputs = inputs._replace(target_T=local_T, bias_V=bias_V)
        own = _own(inputs, call, owned_T)
        dtype = torch.promote_types(inputs.hidden_TD.dtype, torch.float32)
        whole = _merge(own, target, owned_T, shard, dtype)
        # The backward of a backend gives column y the factor -expm1(logp) = 1 - p_y. A stand-in's
        # is -p_j, which logp = log1p(p_j) yields.
        stand_in_T = own.stand_in_T - (whole.logsum_T - (own.shift_T - whole.top_T))
        kept_T = torch.where(owned_T, whole.logp_T, stand_in_T.exp().log1p())
        kept = (kept_T.to(dtype), whole.top_T, whole.logsum_T.to(dtype))
        ctx.save_for_backward(*inputs, *kept)
        ctx.shard, ctx.call, ctx.whole_bias = shard, call, whole_bias
        logprobs, entropy = whole.logp_T.to(dtype), whole.entropy_T.to(dtype)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once
    def backward(ctx: Any, dlogprobs: Tensor, _: Tensor) -> tuple:
        *given, logprobs, top, logsum = ctx.saved_tensors
        inputs, shard = Inputs(*given), ctx.shard
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[3:7]
        if inputs.weight_VD.shape[0] == 0:
            tensors = (inputs.hidden_TD, inputs.weight_VD, inputs.bias_V)
            grads: Any = [t if t is None else torch.zeros_like(t) for t in tensors]
        else:
            grads = ops.linear_logprobs_backward(
                dlogprobs, *inputs, logprobs, top, logsum, *no_lists(logprobs), *ctx.call,
                need_hidden, need_weight, need_bias,
            )  # fmt: skip
        dhidden = dweight = dbias = None
        if need_hidden:
            dhidden = _sum_over_ranks(grads[0], shard.group)
        if need_weight:
            dweight = grads[1]
        if need_bias:
            dbias = grads[2]
            if ctx.whole_bias:
                whole_V = dbias.new_zeros(shard.vocab)
                whole_V[shard.start : shard.stop] = dbias
                dbias = _sum_over_ranks(whole_V, shard.group)
        return None, None, None, dhidden, dweight, None, dbias, None, None


def _sum_over_ranks(values: Tensor, group: Any) -> Tensor:
    """Added in fp32 (fp64), rounded once."""
    total = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
    dist.all_reduce(total, group=group)
    return total.to(values.dtype)


def linear_logprobs(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [T] of `bvpo_kernels.linear_logprobs`, on every rank.

    hidden, target: plain or Replicate(), the same on every rank. weight: Shard(0), uneven and
    empty shards included; its gradient is a DTensor like it. bias: sharded like the weight, or
    whole on every rank. Cost per rank: its share of the GEMMs (6 TVD where the weight is frozen);
    all-reduces of 5 T fp64 numbers in the forward and of dH, T D fp32 numbers, in the backward.

    Raises:
        ValueError: for other placements, or targets that differ between ranks.
    """
    hidden, target, bias = inputs.hidden_TD, inputs.target_T, inputs.bias_V
    weight: Any = inputs.weight_VD
    if inputs.lora_b_VR is not None:
        raise ValueError("lora: expected None for a sharded weight, got LoRA")
    shard = _shard(weight, call.ignore_index)
    whole_bias = False
    if isinstance(bias, DTensor) and bias.placements == weight.placements:
        bias = bias.to_local()
    elif bias is not None:
        bias, whole_bias = _replicated("bias", bias), True
    # Targets of other ranks have stand-ins, and ignored ones this package's index.
    local = call._replace(ignore_index=IGNORE_INDEX)
    return _VocabParallel.apply(
        shard, local, whole_bias, _replicated("hidden", hidden), weight.to_local(),
        _replicated("target", target), bias, None, None,
    )  # fmt: skip
