"""`linear_logprobs` with a gradient and tail_tolerance > 0."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bvpo_kernels.reference import logprobs as reference_exact
from bvpo_kernels.reference import tail as reference
from bvpo_kernels.tail import certificate
from bvpo_kernels.tail import ops as _  # noqa: F401  (registers the operators)


class Options(NamedTuple):
    """Arguments of `linear_logprobs` of the same names."""

    temperature: float
    softcap: float | None
    ignore_index: int
    workspace_bytes: int
    tail_tolerance: float


def linear_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: Options,
    need_entropy: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities whose backward is sparse, and the entropy (empty unless needed)."""
    scored = target != options.ignore_index
    if impl == "reference":
        head: dict[str, Any] = {
            "bias_V": bias,
            "temperature": options.temperature,
            "softcap": options.softcap,
            "ignore_index": options.ignore_index,
        }
        logprobs, tail, count = reference.linear_logprobs(
            hidden, weight, target, options.tail_tolerance, **head
        )
        with torch.no_grad():
            entropy = reference_exact.linear_logprobs(hidden, weight, target, **head)[1]
    else:
        logprobs, _max, _logsum, entropy, tail, offsets, _columns, _entries = (
            torch.ops.bvpo.tail_logprobs_forward(
                hidden, weight, target, bias, *options, need_entropy, impl
            )
        )
        count = offsets[-1]
    certificate.record(
        logprobs, hidden, weight, scored, tail, count, options.temperature, options.tail_tolerance
    )
    return logprobs, entropy
