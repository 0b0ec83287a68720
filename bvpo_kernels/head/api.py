"""`linear_logprobs`: checks what is asked for, chooses a backend, and takes one of four paths."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from bvpo_kernels import backends, ops, scope
from bvpo_kernels.call import Call, Inputs
from bvpo_kernels.head import certificate
from bvpo_kernels.head.cost import default_workspace
from bvpo_kernels.ops.derivatives import check_reverse_mode
from bvpo_kernels.oracles import logprobs as oracle
from bvpo_kernels.oracles import tail as sparse_oracle
from bvpo_kernels.types import IGNORE_INDEX

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class HeadOptions(TypedDict, total=False):
    """Keyword arguments of `linear_logprobs` but `return_entropy`."""

    bias: Tensor | None
    lora: tuple[Tensor, Tensor] | None
    temperature: float
    softcap: float | None
    ignore_index: int
    tail_tolerance: float
    workspace_bytes: int | None
    max_scored: int | None
    impl: str


def _check_tensors(inputs: Inputs) -> None:
    hidden = inputs.hidden_TD
    names = (("hidden", hidden), ("weight", inputs.weight_VD), ("bias", inputs.bias_V),
             ("lora[0]", inputs.low_TR), ("lora[1]", inputs.lora_b_VR))  # fmt: skip
    for name, tensor in names:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOAT_DTYPES:
            raise TypeError(f"{name}: expected bf16, fp16, fp32 or fp64, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device}, got {tensor.device}")


def _check_shapes(inputs: Inputs) -> None:
    hidden, weight, target, bias, low, lora_b = inputs
    if hidden.ndim != 2 or hidden.shape[1] == 0:
        raise ValueError(f"hidden: expected shape [T, D], D >= 1, got {tuple(hidden.shape)}")
    num_tokens, dim = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != dim or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape [V, {dim}], got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected the dtype of hidden, {hidden.dtype}, got {weight.dtype}")
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target: expected an int64 or int32 Tensor, got {got}")
    if target.shape != (num_tokens,):
        raise ValueError(f"target: expected shape [{num_tokens}], got {tuple(target.shape)}")
    if target.device != hidden.device:
        raise ValueError(f"target: expected device {hidden.device}, got {target.device}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {tuple(bias.shape)}")
    if low is None or lora_b is None:
        return
    rank = low.shape[-1] if low.ndim == 2 else -1
    for name, tensor, rows in (("lora[0]", low, num_tokens), ("lora[1]", lora_b, weight.shape[0])):
        if tensor.ndim != 2 or tuple(tensor.shape) != (rows, rank):
            raise ValueError(f"{name}: expected shape [{rows}, R], got {tuple(tensor.shape)}")
    if low.dtype != hidden.dtype:
        raise TypeError(f"lora[0]: expected the dtype of hidden, {hidden.dtype}, got {low.dtype}")


def _check_options(call: Call) -> None:
    temperature, softcap = call.temperature, call.softcap
    if not temperature > 0 or temperature == float("inf"):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
    if softcap is not None and (not softcap > 0 or softcap == float("inf")):
        raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap}")
    if not 0 <= call.tail_tolerance < 1:
        raise ValueError(f"tail_tolerance: expected a number in [0, 1), got {call.tail_tolerance}")
    if call.workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes: expected a number > 0, got {call.workspace_bytes}")
    if call.max_scored is not None and call.max_scored < 0:
        raise ValueError(f"max_scored: expected None or a number >= 0, got {call.max_scored}")


def _unsupported(name: str, inputs: Inputs, sparse: bool, sharded: bool) -> str:
    """Why a backend that is installed cannot serve these inputs; '' when it can."""
    device, dtype = inputs.hidden_TD.device.type, inputs.hidden_TD.dtype
    if name == "cuda":
        return "it has no LM head, pair_reduce alone"
    if name == "reference" and sharded:
        return "it needs the whole vocabulary on one rank, got a sharded weight"
    if name == "cpp" and device != "cpu":
        return f"it serves CPU tensors, got {device}"
    if name == "cpp" and inputs.lora_b_VR is not None:
        return "it has no LoRA on the LM head"
    if name == "triton" and device != "cuda" and not backends.INTERPRETED:
        return f"it serves CUDA tensors, got {device}"
    if name in ("cpp", "triton") and dtype == torch.float64:
        return "it serves bf16, fp16 and fp32, got torch.float64"
    return ""


def _autocast(inputs: Inputs) -> Inputs:
    """What torch does to a linear layer under autocast; fp64 stays as it is there too."""
    device = inputs.hidden_TD.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Any) -> Any:
        return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

    return inputs._replace(
        hidden_TD=cast(inputs.hidden_TD),
        weight_VD=cast(inputs.weight_VD),
        low_TR=cast(inputs.low_TR),
    )


def _naive(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """The oracle, which is differentiable as often as one likes where it is exact."""
    hidden, weight, target, bias, low, lora_b = inputs
    if low is not None and lora_b is not None:
        hidden, weight = torch.cat([hidden, low], 1), torch.cat([weight, lora_b], 1)
    head: dict[str, Any] = {
        "bias_V": bias,
        "temperature": call.temperature,
        "softcap": call.softcap,
        "ignore_index": call.ignore_index,
    }
    if call.tail_tolerance == 0:
        return oracle.linear_logprobs(hidden, weight, target, **head)
    logprobs, tail, count = sparse_oracle.linear_logprobs(
        hidden, weight, target, call.tail_tolerance, **head
    )
    certificate.record(logprobs, inputs, call, tail, count)
    with torch.no_grad():
        entropy = oracle.linear_logprobs(hidden, weight, target, **head)[1]
    return logprobs, entropy


def _logprobs(inputs: Inputs, call: Call, owner: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """The path that serves the call: measured, over a sharded vocabulary, naive, or fused."""
    hidden, weight, _, bias, _, lora_b = inputs
    sharded, grad = getattr(weight, "placements", None) is not None, torch.is_grad_enabled()
    weight_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    measured = None
    if scope.active is not None and grad and weight_grad and lora_b is None:
        if sharded:
            raise ValueError("weight: gradient statistics need the whole vocabulary on one rank")
        exact = call._replace(tail_tolerance=0.0)
        measured = scope.active.head_logprobs(inputs, exact, owner)
    if measured is not None:
        return measured
    if sharded:
        from bvpo_kernels.head import sharded as vocab_parallel

        return vocab_parallel.linear_logprobs(inputs, call)
    if call.impl == "reference":
        return _naive(inputs, call)
    sparse = call.tail_tolerance > 0
    unit = grad and hidden.requires_grad and not weight_grad and lora_b is None and not sparse
    logprobs, *kept, entropy, _ = ops.linear_logprobs_forward(*inputs, *call, unit)
    if sparse:
        tail, offsets = kept[2], kept[3]
        count = offsets[-1] if offsets.numel() else offsets.new_zeros(())
        certificate.record(logprobs, inputs, call, tail, count)
    return logprobs, entropy


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_entropy: Literal[False] = ...,
    **options: Unpack[HeadOptions],
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[HeadOptions],
) -> tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    tail_tolerance: float = 0.0,
    workspace_bytes: int | None = None,
    max_scored: int | None = None,
    return_entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """logp_t = z_{t,y} - log sum_v exp z_{t,v},  z = softcap tanh((h W^T + b)/softcap)/temperature.

    Args:
        hidden: [T, D], bf16, fp16, fp32 or fp64. T = 0 is allowed.
        weight: [V, D], dtype and device of `hidden`. Any V and D. A DTensor with Shard(0) is a
            vocabulary spread over ranks that all hold the same `hidden` and `target`: every rank
            gets the same result, and its own rows of dW (`bvpo_kernels/head/sharded.py`).
        target: [T], int64 or int32, in [0, V), or `ignore_index` for a row that is not scored.
        bias: [V] or None, any float dtype.
        lora: (x, B) of logits [h, x] [W, B]^T + b: with x = s h A^T, [T, R], plain torch, through
            which A and h get their gradients, LoRA's head. x has the dtype of `hidden`, B, [V, R],
            any. Neither s B A nor a copy of W is formed. Not on `cpp`; its backward is exact.
        temperature: divides the logits, after the softcap.
        softcap: c of z -> c tanh(z / c) (Gemma), or None.
        ignore_index: target of rows that are not scored: result 0, no gradient, and on CPU no work
            (on a GPU: see `max_scored`).
        tail_tolerance: probability per token that the backward may leave out, relative to the
            largest upstream gradient; 0 is exact. The error is bounded (`tail_certificates`).
            While gradient statistics are collected the backward is exact.
        workspace_bytes: bound on temporary memory, default 128 MiB, on a GPU 1 GiB; never
            depends on T.
        max_scored: how many rows are scored at most, where the host knows it (`PackedBatch` does):
            `triton` then multiplies this many rows and not T, without asking the device.
        return_entropy: also return the entropy of each row, in nats, [T]. Not differentiable.
        impl: "auto", or "reference", "eager", "cpp", ... (`python -m bvpo_kernels` lists them).

    Returns:
        logprobs [T] in nats, fp32 (fp64 for fp64 inputs); with `return_entropy` the tuple
        (logprobs, entropy). Sums run in that dtype; dW and dH are rounded once, at the end.

    The schedule follows from what needs a gradient (T V D multiply-adds, two FLOPs each):
    nothing: 2 TVD; hidden only: 4 TVD, the unit gradient W_y - sum_v p_v W_v being formed in the
    forward and scaled in the backward; weight or bias: 8 TVD, the tile of logits being recomputed.
    With tail_tolerance > 0: 2 TVD, and 6 (4 for hidden only) for the share of tokens whose
    softmax has no short list of entries; the lists take at most another `workspace_bytes`
    (`eager` has none and stays exact). LoRA with a frozen weight: 6 TVD.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
        NotImplementedError: for second derivatives and forward mode (not with impl="reference").

    Source: DESIGN.md, "LM-head schedules"; online softmax: Milakov and Gimelshein,
    arXiv 1805.02867; recomputation in the backward: Wijmans et al., arXiv 2411.09009; LoRA: Hu et
    al., arXiv 2106.09685.
    """
    inputs = Inputs(hidden, weight, target, bias, *(lora or (None, None)))
    call = Call(
        temperature, softcap, ignore_index, workspace_for(hidden, workspace_bytes), max_scored,
        tail_tolerance, return_entropy, impl,
    )  # fmt: skip
    inputs, call, _ = prepare(inputs, call)
    logprobs, entropy = _logprobs(inputs, call, (weight, bias))
    return (logprobs, entropy.detach()) if return_entropy else logprobs


def workspace_for(hidden: Any, workspace_bytes: int | None) -> int:
    """The bound of a call: as given, or the device's default."""
    if workspace_bytes is not None:
        return workspace_bytes
    return default_workspace(hidden.device.type if isinstance(hidden, Tensor) else "cpu")


def prepare(inputs: Inputs, call: Call) -> tuple[Inputs, Call, bool]:
    """Inputs as the operators take them, the call with its backend chosen; whether W is sharded.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
        NotImplementedError: for forward mode.
    """
    sharded, tail_tolerance = False, call.tail_tolerance
    # A DTensor's module is slow to import.
    if getattr(inputs.weight_VD, "placements", None) is not None:
        from bvpo_kernels.head import sharded as vocab_parallel

        sharded = not vocab_parallel.is_replicated(inputs.weight_VD)
        if not sharded:
            inputs = vocab_parallel.unwrap(inputs)
    if isinstance(inputs.hidden_TD, Tensor):
        inputs = _autocast(inputs)
    _check_tensors(inputs)
    _check_shapes(inputs)
    _check_options(call)
    trained = any(t.requires_grad for t in (*inputs[:2], *inputs[3:]) if t is not None)
    lora = inputs.lora_b_VR is not None
    sparse = tail_tolerance > 0 and torch.is_grad_enabled() and trained and not lora
    if sparse and sharded:
        raise ValueError(f"tail_tolerance: expected 0 for a sharded weight, got {tail_tolerance}")
    chosen = backends.choose(call.impl, lambda name: _unsupported(name, inputs, sparse, sharded))
    if chosen != "reference" or sparse:
        check_reverse_mode("linear_logprobs", *inputs)
    call = call._replace(impl=chosen, tail_tolerance=tail_tolerance if sparse else 0.0)
    inputs = inputs._replace(target_T=inputs.target_T.to(torch.int64))
    if inputs.lora_b_VR is not None:
        inputs = inputs._replace(lora_b_VR=inputs.lora_b_VR.to(inputs.hidden_TD.dtype))
    return inputs, call, sharded
