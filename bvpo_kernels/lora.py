"""LoRA on the LM head, inside the op: [h, x] against [W, B], and no dense delta."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from bvpo_kernels import logprobs as dense
from bvpo_kernels.derivatives import check_reverse_mode, once
from bvpo_kernels.eager import lora as eager
from bvpo_kernels.ops import LIB, check_target_values
from bvpo_kernels.types import IGNORE_INDEX

LIB.define(
    "lora_logprobs_forward(Tensor hidden, Tensor low, Tensor weight, Tensor lora_b, Tensor target, "
    "Tensor? bias, float temperature, float? softcap, int ignore_index, int workspace_bytes, "
    "bool need_entropy) -> (Tensor logprobs, Tensor max, Tensor logsum, Tensor entropy)"
)
LIB.define(
    "lora_logprobs_backward(Tensor dlogprobs, Tensor hidden, Tensor low, Tensor weight, "
    "Tensor lora_b, Tensor target, Tensor? bias, Tensor logprobs, Tensor max, Tensor logsum, "
    "float temperature, float? softcap, int ignore_index, int workspace_bytes, bool need_hidden, "
    "bool need_weight, bool need_bias) "
    "-> (Tensor dhidden, Tensor dlow, Tensor dweight, Tensor dlora_b, Tensor dbias)"
)


@torch.library.impl(LIB, "lora_logprobs_forward", "CompositeExplicitAutograd")
def _forward(
    hidden: Tensor, low: Tensor, weight: Tensor, lora_b: Tensor, target: Tensor,
    bias: Tensor | None, temperature: float, softcap: float | None, ignore_index: int,
    workspace_bytes: int, need_entropy: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_target_values(target, weight.shape[0], ignore_index)
    return eager.forward(
        hidden, low, weight, lora_b, target, bias, temperature, softcap, ignore_index,
        workspace_bytes, need_entropy,
    )  # fmt: skip


@torch.library.register_fake("bvpo::lora_logprobs_forward", lib=LIB)
def _forward_fake(
    hidden, low, weight, lora_b, target, bias, temperature, softcap, ignore_index, workspace_bytes,
    need_entropy,
):  # fmt: skip
    acc, tokens = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    rows = [hidden.new_empty(tokens, dtype=acc) for _ in range(3)]
    return (*rows, hidden.new_empty(tokens, dtype=acc) if need_entropy else hidden.new_empty(0))


@torch.library.impl(LIB, "lora_logprobs_backward", "CompositeExplicitAutograd")
def _backward(*args: Any) -> tuple[Tensor, ...]:
    return eager.backward(*args)


@torch.library.register_fake("bvpo::lora_logprobs_backward", lib=LIB)
def _backward_fake(
    dlogprobs, hidden, low, weight, lora_b, target, bias, logprobs, max, logsum, temperature,
    softcap, ignore_index, workspace_bytes, need_hidden, need_weight, need_bias,
):  # fmt: skip
    empty = hidden.new_empty(0)
    return (
        torch.empty_like(hidden) if need_hidden else empty,
        torch.empty_like(low) if need_hidden else empty,
        torch.empty_like(weight) if need_weight else empty,
        torch.empty_like(lora_b),
        torch.empty_like(bias) if need_bias and bias is not None else empty,
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[6:10]
    ctx.save_for_backward(*inputs[:6], *output[:3])


@once
def _autograd(ctx: Any, dlogprobs: Tensor, *_: Tensor) -> tuple:
    need = ctx.needs_input_grad
    need_hidden = need[0] or need[1]
    hidden, low, weight, lora_b, target, bias, *kept = ctx.saved_tensors
    grads = torch.ops.bvpo.lora_logprobs_backward(
        dlogprobs, hidden, low, weight, lora_b, target, bias, *kept, *ctx.options,
        need_hidden, need[2], need[5],
    )  # fmt: skip
    dhidden, dlow, dweight, dlora_b, dbias = (
        grad if needed else None
        for grad, needed in zip(grads, (need[0], need[1], need[2], need[3], need[5]), strict=True)
    )
    return dhidden, dlow, dweight, dlora_b, None, dbias, *[None] * 5


torch.library.register_autograd(
    "bvpo::lora_logprobs_forward", _autograd, setup_context=_setup, lib=LIB
)


@overload
def lora_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, low: Tensor, lora_b: Tensor, *,
    bias: Tensor | None = ..., temperature: float = ..., softcap: float | None = ...,
    ignore_index: int = ..., workspace_bytes: int | None = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def lora_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, low: Tensor, lora_b: Tensor, *,
    bias: Tensor | None = ..., temperature: float = ..., softcap: float | None = ...,
    ignore_index: int = ..., workspace_bytes: int | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def lora_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    low: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    workspace_bytes: int | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_logprobs` with logits [h, x] [W, B]^T + b; x = s h A^T makes it LoRA's head.

        low = scale * (hidden @ lora_a.T)          # [T, R], plain torch: its gradient reaches A, h
        logp = lora_logprobs(hidden, weight, target, low, lora_b)

    Args:
        hidden, weight, target, bias, temperature, softcap, ignore_index, workspace_bytes,
            return_entropy: of `linear_logprobs`.
        low: [T, R], dtype and device of `hidden`: x.
        lora_b: [V, R], any float dtype: B, trained in that dtype.

    Returns:
        As `linear_logprobs`. W may be frozen (6 TVD in all, its gradient is not formed) or trained
        (8 TVD); neither s B A nor a copy of W is formed. Tiles of plain torch on every device.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

    Source: Hu et al., arXiv 2106.09685 (LoRA); DESIGN.md, "LM-head schedules".
    """
    device = hidden.device.type
    hidden, weight, low = dense._autocast(device, hidden, weight, low)  # type: ignore[assignment]
    default = (
        dense.DEFAULT_CUDA_WORKSPACE_BYTES if device == "cuda" else dense.DEFAULT_WORKSPACE_BYTES
    )
    workspace = default if workspace_bytes is None else workspace_bytes
    dense._validate(hidden, weight, target, bias, temperature, softcap, 0.0, workspace)
    check_reverse_mode("lora_logprobs", hidden, weight, bias, low, lora_b)
    ranks = low.shape[-1] if low.ndim == 2 else -1
    for name, tensor, rows in (("low", low, hidden.shape[0]), ("lora_b", lora_b, weight.shape[0])):
        if tensor.ndim != 2 or tuple(tensor.shape) != (rows, ranks):
            raise ValueError(f"{name}: expected shape [{rows}, R], got {tuple(tensor.shape)}")
    if low.dtype != hidden.dtype:
        raise TypeError(f"low: expected the dtype of hidden, {hidden.dtype}, got {low.dtype}")
    logprobs, _, _, entropy = torch.ops.bvpo.lora_logprobs_forward(
        hidden, low, weight, lora_b.to(hidden.dtype), target.to(torch.int64), bias, temperature,
        softcap, ignore_index, workspace, return_entropy,
    )  # fmt: skip
    return (logprobs, entropy.detach()) if return_entropy else logprobs
