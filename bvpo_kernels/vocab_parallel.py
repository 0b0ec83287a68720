"""`linear_logprobs` for a weight that is a DTensor: a head whose vocabulary is spread over ranks.

Every rank holds the same tokens and some rows of W. It runs an ordinary backend on them, and
numbers per token are exchanged, never logits. DESIGN.md section 5, "A sharded vocabulary".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from bvpo_kernels import checks
from bvpo_kernels.derivatives import once
from bvpo_kernels.eager.logprobs import p_log_p
from bvpo_kernels.types import IGNORE_INDEX


class Options(NamedTuple):
    """What the ops of `linear_logprobs` take besides tensors."""

    temperature: float
    softcap: float | None
    ignore_index: int
    workspace_bytes: int
    need_entropy: bool
    impl: str


class _Shard(NamedTuple):
    """The rows [start, stop) of V that this rank holds, and the ranks that hold the others."""

    start: int
    stop: int
    vocab: int
    group: Any


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


def unwrap(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The call on plain tensors where every rank holds the whole weight."""
    return (
        _replicated("hidden", hidden), _replicated("weight", weight),
        _replicated("target", target), None if bias is None else _replicated("bias", bias),
    )  # fmt: skip


def _shard(weight: DTensor) -> _Shard:
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
    return _Shard(start, stop, vocab, mesh.get_group(sharded[0]))


def _statistics(
    hidden_TD: Tensor, weight_VD: Tensor, local_T: Tensor, bias_V: Tensor | None, owned_T: Tensor,
    options: Options,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of this rank's columns without the target's, fp64: shift c, log of s = sum exp(z_v - c),
    sum exp(z_v - c)(z_v - c); then z_y - c, and z_j - c of the stand-in j, where y is elsewhere.

    The backend has scored column y, or else j. With l = lse - m, the m that it subtracted,
    z_y - m = l + logp and log s = l + log(1 - p): no term cancels, for p -> 1 nor for p -> 0.
    Where y is elsewhere the shift is lse itself, so s = 1 and the last sum is minus the entropy.
    """
    if weight_VD.shape[0] == 0:
        nothing_T = hidden_TD.new_zeros(hidden_TD.shape[0], dtype=torch.float64)
        return nothing_T - torch.inf, nothing_T - torch.inf, nothing_T, nothing_T, nothing_T
    logp_T, max_T, logsum_T, entropy_T, _ = torch.ops.bvpo.linear_logprobs_forward(
        hidden_TD, weight_VD, local_T, bias_V, options.temperature, options.softcap, IGNORE_INDEX,
        options.workspace_bytes, options.need_entropy, False, options.impl,
    )  # fmt: skip
    logp_T, max_T, logsum_T = logp_T.double(), max_T.double(), logsum_T.double()
    rest_T = -torch.expm1(logp_T)
    shift_T = torch.where(owned_T, max_T, max_T + logsum_T)
    log_sum_T = torch.where(owned_T, logsum_T + rest_T.log(), 0.0)
    weighted_T = torch.zeros_like(logp_T)
    if options.need_entropy:
        # H = -p log p - sum_{v != y} p_v (z_v - m) + l (1 - p), solved for the sum.
        own_T = (logsum_T * rest_T - entropy_T - p_log_p(logp_T)) * logsum_T.exp()
        weighted_T = torch.where(owned_T, own_T.where(rest_T > 0, 0.0), -entropy_T.double())
    return shift_T, log_sum_T, weighted_T, logsum_T + logp_T, logp_T


class _Whole(NamedTuple):
    """Per token, of the whole vocabulary: lse = top + logsum; `top` has the result's dtype."""

    logp_T: Tensor
    entropy_T: Tensor
    top_T: Tensor
    logsum_T: Tensor


def _combine(
    shift_T: Tensor, log_sum_T: Tensor, weighted_T: Tensor, own_T: Tensor, target: Tensor,
    owned_T: Tensor, scored_T: Tensor, shard: _Shard, options: Options, dtype: torch.dtype,
) -> _Whole:  # fmt: skip
    """Join the ranks' statistics: the formulas of `eager.logprobs.finish_rows`, in fp64."""
    top_T = shift_T.clone()
    dist.all_reduce(top_T, dist.ReduceOp.MAX, shard.group)
    top_T = top_T.to(dtype)
    delta_T = shift_T - top_T
    sum_T = (log_sum_T + delta_T).exp()
    # A shift of -inf comes with a sum of 0.
    moved_T = (weighted_T * delta_T.exp() + delta_T * sum_T).where(sum_T > 0, 0.0)
    target_T = torch.where(owned_T, own_T + delta_T, 0.0)
    joined_4T = torch.stack((sum_T, moved_T, target_T, owned_T.double()))
    dist.all_reduce(joined_4T, dist.ReduceOp.SUM, shard.group)
    sum_T, moved_T, target_T, owners_T = joined_4T
    checks.require(
        ((owners_T == 1) | ~scored_T).all(),
        f"target: expected values in [0, {shard.vocab}) or ignore_index="
        f"{options.ignore_index}, the same on every rank that shares the vocabulary",
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
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
        whole_bias: bool, shard: _Shard, options: Options,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scored_T = target != options.ignore_index
        owned_T = scored_T & (target >= shard.start) & (target < shard.stop)
        # Another rank's target needs a stand-in that the backend can score; the remainder spreads
        # them over the columns and leaves a target of this rank where it is.
        local_T = (target - shard.start) % max(shard.stop - shard.start, 1)
        local_T = local_T.masked_fill(~scored_T, IGNORE_INDEX)
        bias_V = bias
        if bias is not None and whole_bias:
            bias_V = bias[shard.start : shard.stop]
        shift_T, log_sum_T, weighted_T, own_T, stand_in_T = _statistics(
            hidden, weight, local_T, bias_V, owned_T, options
        )
        whole = _combine(
            shift_T, log_sum_T, weighted_T, own_T, target, owned_T, scored_T, shard, options,
            torch.promote_types(hidden.dtype, torch.float32),
        )  # fmt: skip
        # The backward of a backend gives column y the factor -expm1(logp) = 1 - p_y. A stand-in's
        # is -p_j, which logp = log1p(p_j) yields.
        stand_in_T = (stand_in_T - (whole.logsum_T - (shift_T - whole.top_T))).exp().log1p()
        kept_T = torch.where(owned_T, whole.logp_T, stand_in_T)
        dtype = whole.top_T.dtype
        kept = (kept_T.to(dtype), whole.top_T, whole.logsum_T.to(dtype))
        ctx.save_for_backward(hidden, weight, local_T, bias_V, *kept)
        ctx.shard, ctx.options, ctx.whole_bias = shard, options, whole_bias
        logprobs, entropy = whole.logp_T.to(dtype), whole.entropy_T.to(dtype)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once
    def backward(ctx: Any, dlogprobs: Tensor, _: Tensor) -> tuple:
        hidden, weight, local_T, bias_V, *kept = ctx.saved_tensors
        shard, options = ctx.shard, ctx.options
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        if weight.shape[0] == 0:
            tensors = (hidden, weight, bias_V)
            grads: Any = [t if t is None else torch.zeros_like(t) for t in tensors]
        else:
            grads = list(torch.ops.bvpo.linear_logprobs_backward(
                dlogprobs, hidden, weight, local_T, bias_V, *kept, options.temperature,
                options.softcap, IGNORE_INDEX, options.workspace_bytes, need_hidden, need_weight,
                need_bias, options.impl,
            ))  # fmt: skip
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
        return dhidden, dweight, None, dbias, None, None, None


def _sum_over_ranks(values: Tensor, group: Any) -> Tensor:
    """Added in fp32 (fp64), rounded once."""
    total = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
    dist.all_reduce(total, group=group)
    return total.to(values.dtype)


def linear_logprobs(
    hidden: Tensor, weight: Any, target: Tensor, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [T] of `bvpo_kernels.linear_logprobs`, on every rank.

    hidden, target: plain or Replicate(), the same on every rank. weight: Shard(0), uneven and
    empty shards included; its gradient is a DTensor like it. bias: sharded like the weight, or
    whole on every rank. Cost per rank: its share of the GEMMs (6 TVD where the weight is frozen);
    all-reduces of 5 T fp64 numbers in the forward and of dH, T D fp32 numbers, in the backward.

    Raises:
        ValueError: for other placements, or targets that differ between ranks.
    """
    shard = _shard(weight)
    whole_bias = False
    if isinstance(bias, DTensor) and bias.placements == weight.placements:
        bias = bias.to_local()
    elif bias is not None:
        bias, whole_bias = _replicated("bias", bias), True
    return _VocabParallel.apply(
        _replicated("hidden", hidden), weight.to_local(), _replicated("target", target), bias,
        whole_bias, shard, options,
    )  # fmt: skip
