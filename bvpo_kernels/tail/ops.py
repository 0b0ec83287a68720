"""Schemas, fakes and the autograd formula of `linear_logprobs` with tail_tolerance > 0."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bvpo_kernels import backends, ops
from bvpo_kernels.derivatives import once
from bvpo_kernels.eager import tail as eager_tail
from bvpo_kernels.tail import rule

_FORWARD = (
    "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float temperature, "
    "float? softcap, int ignore_index, int workspace_bytes, float tail_tolerance, "
)
_BACKWARD = (
    "Tensor dlogprobs, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
    "Tensor logprobs, Tensor max, Tensor logsum, Tensor tail, Tensor offsets, Tensor columns, "
    "Tensor entries, float temperature, float? softcap, int ignore_index, int workspace_bytes, "
    "float tail_tolerance, bool need_hidden, bool need_weight, bool need_bias"
)
ops.LIB.define(
    f"tail_logprobs_forward({_FORWARD}bool need_entropy, str impl) -> (Tensor logprobs, "
    "Tensor max, Tensor logsum, Tensor entropy, Tensor tail, Tensor offsets, Tensor columns, "
    "Tensor entries)"
)
ops.LIB.define(
    f"tail_logprobs_backward({_BACKWARD}, str impl) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
# Implemented in csrc/cpu.
ops.LIB.define(
    f"cpu_tail_logprobs_forward({_FORWARD}int longest, int capacity, bool need_entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
ops.LIB.define(f"cpu_tail_logprobs_backward({_BACKWARD}) -> (Tensor, Tensor, Tensor)")

_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "eager": (eager_tail.forward, eager_tail.backward),
    "cpp": (
        torch.ops.bvpo.cpu_tail_logprobs_forward,
        torch.ops.bvpo.cpu_tail_logprobs_backward,
    ),
}

if not backends.MISSING["triton"]:  # importing these modules needs triton
    from bvpo_kernels.gpu import tail as gpu_tail
    from bvpo_kernels.gpu.logprobs import RowKernels
    from bvpo_kernels.kernels import logprobs as triton_kernels

    _kernels = RowKernels(triton_kernels.forward_rows, triton_kernels.backward_rows)
    _IMPLEMENTATIONS["triton"] = (
        functools.partial(gpu_tail.forward, kernels=_kernels),
        functools.partial(gpu_tail.backward, kernels=_kernels),
    )


@torch.library.impl(ops.LIB, "tail_logprobs_forward", "CompositeExplicitAutograd")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int,
    tail_tolerance: float,
    need_entropy: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    ops.check_target_values(target, weight.shape[0], ignore_index)
    longest = rule.longest_list(weight.shape[0], impl)
    room = rule.capacity(hidden.shape[0], longest, workspace_bytes)
    return _IMPLEMENTATIONS[impl][0](
        hidden, weight, target, bias, temperature, softcap, ignore_index, workspace_bytes,
        tail_tolerance, longest, room, need_entropy,
    )  # fmt: skip


@torch.library.register_fake("bvpo::tail_logprobs_forward", lib=ops.LIB)
def _forward_fake(
    hidden, weight, target, bias, temperature, softcap, ignore_index, workspace_bytes,
    tail_tolerance, need_entropy, impl,
):  # fmt: skip
    num_tokens = hidden.shape[0]
    acc = torch.promote_types(hidden.dtype, torch.float32)
    room = rule.capacity(num_tokens, rule.longest_list(weight.shape[0], impl), workspace_bytes)
    new = functools.partial(torch.empty, device=hidden.device)
    logprobs, max_T, logsum, tail = (new(num_tokens, dtype=acc) for _ in range(4))
    entropy = new(num_tokens, dtype=acc) if need_entropy else new(0, dtype=hidden.dtype)
    offsets = new(num_tokens + 1, dtype=torch.int64)
    lists = new(room, dtype=torch.int32), new(room, dtype=acc)
    return logprobs, max_T, logsum, entropy, tail, offsets, *lists


@torch.library.impl(ops.LIB, "tail_logprobs_backward", "CompositeExplicitAutograd")
def _backward(*args: Any) -> tuple[Tensor, ...]:
    return _IMPLEMENTATIONS[args[-1]][1](*args[:-1])


@torch.library.register_fake("bvpo::tail_logprobs_backward", lib=ops.LIB)
def _backward_fake(*args):
    hidden, weight, bias, need = args[1], args[2], args[4], args[-4:-1]
    return ops.backward_buffers(hidden, weight, bias, need, torch.empty)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, target, bias = inputs[:4]
    logprobs, max_T, logsum, _, *lists = output
    ctx.options, ctx.impl = inputs[4:9], inputs[10]
    ctx.save_for_backward(hidden, weight, target, bias, logprobs, max_T, logsum, *lists)
    # Otherwise every backward would fill a tensor of zeros as large as the lists.
    ctx.set_materialize_grads(False)


@once
def _autograd(ctx: Any, dlogprobs: Tensor | None, *_: Tensor | None) -> tuple:
    """Gradients of the log-probabilities only: the other outputs are not differentiable."""
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if dlogprobs is not None:
        hidden, weight, target, bias, *kept = ctx.saved_tensors
        grads = torch.ops.bvpo.tail_logprobs_backward(
            dlogprobs, hidden, weight, target, bias, *kept, *ctx.options,
            need_hidden, need_weight, need_bias, ctx.impl,
        )  # fmt: skip
    dhidden = grads[0] if need_hidden else None
    dweight = grads[1] if need_weight else None
    dbias = grads[2] if need_bias else None
    return dhidden, dweight, None, dbias, *[None] * 7


torch.library.register_autograd(
    "bvpo::tail_logprobs_forward", _autograd, setup_context=_setup, lib=ops.LIB
)
