"""The collection of gradient statistics that is running, if any.

A global of the process, not a context variable: with activation checkpointing layers run again in
autograd's threads, which see no context of the thread that called `backward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from bvpo_kernels.call import Call, Inputs


class HeadStatistics(Protocol):
    """What `linear_logprobs`, `bvpo_loss` and instrumented layers ask of the collection."""

    collection: Any

    def head_logprobs(
        self, inputs: Inputs, call: Call, owner: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor] | None: ...

    def report_loss(
        self, by_unit: Mapping[str, Tensor], by_pair: Mapping[str, Tensor], exact: bool
    ) -> None: ...


active: HeadStatistics | None = None
