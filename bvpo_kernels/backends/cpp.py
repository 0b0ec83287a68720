"""`impl="cpp"`: the kernels of csrc/cpu, which have a sweep of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from bvpo_kernels.backends import sparse, statistics
from bvpo_kernels.backends.eager.grad_stats import group_bounds, signs
from bvpo_kernels.backends.schedule import no_lists
from bvpo_kernels.backends.statistics import Asked
from bvpo_kernels.call import Call, Gradients, Inputs, Kept, Need, Pairs


def _options(call: Call) -> tuple[float, float | None, int, int]:
    return call.temperature, call.softcap, call.ignore_index, call.workspace_bytes


def forward(inputs: Inputs, call: Call, unit: bool) -> tuple[Tensor, ...]:
    """See `schedule.forward`."""
    if call.tail_tolerance > 0:
        vocab = inputs.weight_VD.shape[0]
        longest = sparse.longest_list(vocab, "cpp")
        room = sparse.capacity(inputs.hidden_TD.shape[0], longest, call.workspace_bytes)
        logprobs, max_T, logsum, entropy, *lists = torch.ops.bvpo.cpu_tail_logprobs_forward(
            *inputs[:4], *_options(call), call.tail_tolerance, longest, room, call.need_entropy
        )
        if not call.need_entropy:
            entropy = logprobs.new_empty(0)
        return logprobs, max_T, logsum, *lists, entropy, inputs.hidden_TD.new_empty(0)
    logprobs, max_T, logsum, entropy, unit_TD = torch.ops.bvpo.cpu_linear_logprobs_forward(
        *inputs[:4], *_options(call), call.need_entropy, unit
    )
    if not call.need_entropy:
        entropy = logprobs.new_empty(0)
    return logprobs, max_T, logsum, *no_lists(logprobs), entropy, unit_TD


def backward(dlogprobs_T: Tensor, inputs: Inputs, kept: Kept, call: Call, need: Need) -> Gradients:
    """See `schedule.backward`."""
    if call.tail_tolerance > 0:
        grads = torch.ops.bvpo.cpu_tail_logprobs_backward(
            dlogprobs_T, *inputs[:4], *kept, *_options(call), call.tail_tolerance, *need
        )
    else:
        grads = torch.ops.bvpo.cpu_linear_logprobs_backward(
            dlogprobs_T, *inputs[:4], *kept[:3], *_options(call), *need
        )
    return Gradients(*grads)


def pair_gradients(
    inputs: Inputs, call: Call, factor_T: Tensor, chunk_tokens: int, into: tuple[Tensor | None, ...]
) -> Tensor:
    """logp [T], fp32.

    into: the results besides, overwritten, None where not wanted; contiguous: factor_t d logp_t / d
    hidden_t [T, D], in its dtype; in fp32 sum_t factor_t d logp_t / d W and d bias. The logits of
    about `chunk_tokens` tokens exist at once: 4 V chunk_tokens bytes.
    """
    options = (call.temperature, call.softcap, call.ignore_index, chunk_tokens)
    return torch.ops.bvpo.cpu_pair_gradients(*inputs[:4], factor_T, *options, *into)


def head_statistics(
    dlogprobs_T: Tensor, inputs: Inputs, kept: Kept, call: Call, need: Need, asked: Asked
) -> tuple[Tensor, ...]:
    """See `statistics.backward`.

    A panel of the vocabulary is recomputed once for all groups. The groups' panels of dW, fp32,
    take a quarter of the workspace, or 256 D numbers each where that is more.
    """
    (hidden_TD, weight_VD, _, bias_V), plan = inputs[:4], asked.plan
    need = need._replace(bias=need.bias and bias_V is not None)
    left_Vk, unit = _left(weight_VD, asked) if need.weight and plan.sketch else (None, 1.0)
    apart = plan.exact or plan.num_kinds or need.bias
    dhidden, dweight, dbias_GV, gram_GG, kinds_KVD, rows_GUD, left_Tk = (
        torch.ops.bvpo.cpu_linear_logprobs_statistics(
            dlogprobs_T, *inputs[:4], *kept[:3], *_options(call), *need,
            plan.ranges_G2 if apart else None, plan.kinds_G, plan.num_kinds,
            asked.rows_U if plan.exact else None, left_Vk,
        )
    )  # fmt: skip
    sums = statistics.Sums(
        gram_GG if apart else None,
        kinds_KVD,
        rows_GUD,
        dbias_GV if need.bias else None,
        None if left_Vk is None else left_Tk * unit,
    )
    bounds = group_bounds(plan, hidden_TD.shape[0])
    return dhidden, dweight, *statistics.finish(hidden_TD, bias_V, bounds, sums, asked)


def _left(weight_VD: Tensor, asked: Asked) -> tuple[Tensor, float]:
    """The signs of the sketch as +-1, which bf16 holds exactly, and their factor."""
    vocab, k = weight_VD.shape[0], asked.plan.sketch
    left_Vk = signs(vocab, k, asked.plan.seed, asked.layer, 0, weight_VD)
    return (left_Vk, 1.0) if vocab <= k else (left_Vk.sign(), k**-0.5)


class PairFormer:
    """`one_pass.Former` over the C++ kernel, which compacts the scored rows itself."""

    def __init__(
        self, inputs: Inputs, call: Call, pairs: Pairs, factor_T: Tensor, need: Need, room: int
    ) -> None:
        self.inputs, self.call, self.factor_T = inputs, call, factor_T
        self.ranges = pairs.ranges_P2.tolist()
        self.cu_seqlens = pairs.cu_seqlens
        self.chunk = max(room // (4 * inputs.weight_VD.shape[0]), 1)
        self.logprobs_T = torch.zeros_like(factor_T)
        shape = inputs.hidden_TD.shape if need.hidden else (0,)
        self.unit_TD = inputs.hidden_TD.new_empty(shape)
        self.wants_unit = need.hidden

    def tiles(self, shape: tuple[int, int, int]) -> Tensor:
        return torch.ops.bvpo.cpu_scratch(shape)

    def form(self, pair: int, sums_VE: Tensor | None, dbias_V: Tensor | None) -> None:
        tokens = slice(*self.ranges[pair])
        own = self.inputs._replace(
            hidden_TD=self.inputs.hidden_TD[tokens], target_T=self.inputs.target_T[tokens]
        )
        unit = self.unit_TD[tokens] if self.wants_unit else None
        into = (unit, sums_VE, dbias_V)
        self.logprobs_T[tokens] = pair_gradients(
            own, self.call, self.factor_T[tokens], self.chunk, into
        )

    def scores(self, pair: int) -> Tensor:
        edges = self.cu_seqlens[2 * pair : 2 * pair + 3]
        values = self.logprobs_T[slice(*self.ranges[pair])]
        return torch.ops.bvpo.segment_sum(values, edges - edges[0], "eager")

    def results(self) -> tuple[Tensor, Tensor]:
        return self.logprobs_T, self.unit_TD
