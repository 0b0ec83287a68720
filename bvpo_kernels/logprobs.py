"""Log-probabilities of target tokens under a linear LM head, without [tokens, vocab] logits."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from bvpo_kernels import backends, ops, scope  # noqa: F401  (ops registers the operators)
from bvpo_kernels.derivatives import check_reverse_mode
from bvpo_kernels.reference import logprobs as reference_logprobs
from bvpo_kernels.tail import logprobs as tail_logprobs
from bvpo_kernels.types import IGNORE_INDEX

DEFAULT_WORKSPACE_BYTES = 128 * 2**20
# Room for dH in fp32 up to 32 768 tokens of D = 4096: below that the backward costs 10 TVD.
DEFAULT_CUDA_WORKSPACE_BYTES = 2**30
_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _validate(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float,
    softcap: float | None, tail_tolerance: float, workspace_bytes: int,
) -> None:  # fmt: skip
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOAT_DTYPES:
            raise TypeError(f"{name}: expected bf16, fp16, fp32 or fp64, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device}, got {tensor.device}")
    _validate_shapes(hidden, weight, target, bias)
    if not temperature > 0 or temperature == float("inf"):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
    if softcap is not None and (not softcap > 0 or softcap == float("inf")):
        raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap}")
    if not 0 <= tail_tolerance < 1:
        raise ValueError(f"tail_tolerance: expected a number in [0, 1), got {tail_tolerance}")
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes: expected a number > 0, got {workspace_bytes}")


def _validate_shapes(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
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


def _unsupported(name: str, device: str, dtype: torch.dtype, sparse: bool, sharded: bool) -> str:
    """Why a backend that is installed cannot serve these inputs; '' when it can."""
    if sparse and name == "cuda":
        return "it has no sparse backward (tail_tolerance > 0)"
    if sparse and name == "eager" and device != "cpu":
        return f"its sparse backward serves CPU tensors, got {device}"
    if name == "reference" and sharded:
        return "it needs the whole vocabulary on one rank, got a sharded weight"
    if name == "cpp" and device != "cpu":
        return f"it serves CPU tensors, got {device}"
    if name == "cpp" and dtype == torch.float64:
        return "it serves bf16, fp16 and fp32, got torch.float64"
    if name == "triton" and backends.INTERPRETED:
        return "" if dtype != torch.float64 else "it serves bf16, fp16 and fp32, got torch.float64"
    if name in ("triton", "cuda") and device != "cuda":
        return f"it serves CUDA tensors, got {device}"
    if name in ("triton", "cuda") and dtype == torch.float64:
        return "it serves bf16, fp16 and fp32, got torch.float64"
    return ""


def _autocast(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """What torch does to a linear layer under autocast; fp64 stays as it is there too."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., ignore_index: int = ...,
    tail_tolerance: float = ..., workspace_bytes: int | None = ..., max_scored: int | None = ...,
    return_entropy: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., ignore_index: int = ...,
    tail_tolerance: float = ..., workspace_bytes: int | None = ..., max_scored: int | None = ...,
    return_entropy: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
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
            gets the same result, and its own rows of dW (`bvpo_kernels/vocab_parallel.py`).
        target: [T], int64 or int32, in [0, V), or `ignore_index` for a row that is not scored.
        bias: [V] or None, any float dtype.
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
            `triton` and `cuda` then multiply this many rows and not T, without asking the device.
        return_entropy: also return the entropy of each row, in nats, [T]. Not differentiable.
        impl: "auto", or "reference", "eager", "cpp", ... (`python -m bvpo_kernels` lists them).

    Returns:
        logprobs [T] in nats, fp32 (fp64 for fp64 inputs); with `return_entropy` the tuple
        (logprobs, entropy). Sums run in that dtype; dW and dH are rounded once, at the end.

    The schedule follows from what needs a gradient (T V D multiply-adds, two FLOPs each):
    nothing: 2 TVD; hidden only: 4 TVD, the unit gradient W_y - sum_v p_v W_v being formed in the
    forward and scaled in the backward; weight or bias: 8 TVD, the tile of logits being recomputed.
    With tail_tolerance > 0: 2 TVD, and 6 (4 for hidden only) for the share of tokens whose
    softmax has no short list of entries; the lists take at most another `workspace_bytes`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
        NotImplementedError: for second derivatives and forward mode (not with impl="reference").

    Source: DESIGN.md, "LM-head schedules"; online softmax: Milakov and Gimelshein,
    arXiv 1805.02867; recomputation in the backward: Wijmans et al., arXiv 2411.09009.
    """
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    default = DEFAULT_CUDA_WORKSPACE_BYTES if device == "cuda" else DEFAULT_WORKSPACE_BYTES
    workspace = default if workspace_bytes is None else workspace_bytes
    owner = (weight, bias)
    sharded = False
    if getattr(weight, "placements", None) is not None:  # a DTensor, whose module is slow to import
        from bvpo_kernels import vocab_parallel

        sharded = not vocab_parallel.is_replicated(weight)
        if not sharded:
            hidden, weight, target, bias = vocab_parallel.unwrap(hidden, weight, target, bias)
    hidden, weight = _autocast(device, hidden, weight)  # type: ignore[assignment]
    _validate(hidden, weight, target, bias, temperature, softcap, tail_tolerance, workspace)
    if max_scored is not None and max_scored < 0:
        raise ValueError(f"max_scored: expected None or a number >= 0, got {max_scored}")
    dtype, grad = hidden.dtype, torch.is_grad_enabled()
    weight_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    sparse = tail_tolerance > 0 and grad and (hidden.requires_grad or weight_grad)
    if sparse and sharded:
        raise ValueError(f"tail_tolerance: expected 0 for a sharded weight, got {tail_tolerance}")
    chosen = backends.choose(impl, lambda name: _unsupported(name, device, dtype, sparse, sharded))
    if chosen != "reference" or sparse:
        check_reverse_mode("linear_logprobs", hidden, weight, bias)
    target = target.to(torch.int64)
    options = (temperature, softcap, ignore_index, workspace, return_entropy, chosen)
    if scope.active is not None and grad and weight_grad:
        if sharded:
            raise ValueError("weight: gradient statistics need the whole vocabulary on one rank")
        measured = scope.active.head_logprobs(hidden, weight, target, bias, owner, options)
        if measured is not None:
            return (measured[0], measured[1].detach()) if return_entropy else measured[0]
    if sparse:
        sparse_options = tail_logprobs.Options(
            temperature, softcap, ignore_index, workspace, tail_tolerance
        )
        logprobs, entropy = tail_logprobs.linear_logprobs(
            hidden, weight, target, bias, sparse_options, return_entropy, chosen
        )
        return (logprobs, entropy.detach()) if return_entropy else logprobs
    if sharded:
        logprobs, entropy = vocab_parallel.linear_logprobs(
            hidden, weight, target, bias, vocab_parallel.Options(*options)
        )
        return (logprobs, entropy) if return_entropy else logprobs
    if chosen == "reference":
        logprobs, entropy = reference_logprobs.linear_logprobs(
            hidden, weight, target, bias_V=bias, temperature=temperature, softcap=softcap,
            ignore_index=ignore_index,
        )  # fmt: skip
        return (logprobs, entropy.detach()) if return_entropy else logprobs
    unit_grad = grad and hidden.requires_grad and not weight_grad
    logprobs, _, _, entropy, _ = torch.ops.bvpo.linear_logprobs_forward(
        hidden, weight, target, bias, temperature, softcap, ignore_index, workspace,
        return_entropy, unit_grad, chosen, max_scored,
    )  # fmt: skip
    return (logprobs, entropy.detach()) if return_entropy else logprobs
