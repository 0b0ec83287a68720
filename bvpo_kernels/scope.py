"""The collection of gradient statistics that is running, if any.

A global of the process, not a context variable: with activation checkpointing layers run again in
autograd's threads, which see no context of the thread that called `backward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class HeadStatistics(Protocol):
    """What `linear_logprobs`, `bvpo_loss` and instrumented layers ask of the collection."""

    collection: Any

    def head_logprobs(
        self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
        owner: tuple[Any, Any], options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor] | None: ...  # fmt: skip

    def report_loss(
        self, by_unit: Mapping[str, Tensor], by_pair: Mapping[str, Tensor], exact: bool
    ) -> None: ...


active: HeadStatistics | None = None
