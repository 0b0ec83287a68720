"""The collection of gradient statistics that is running, if any.

A global of the process, not a context variable: with activation checkpointing layers run again in
autograd's threads, which see no context of the thread that called `backward`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class HeadStatistics(Protocol):
    """What `linear_logprobs` and instrumented layers ask of the running collection."""

    collection: Any

    def head_logprobs(
        self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
        owner: tuple[Any, Any], options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor] | None: ...  # fmt: skip


active: HeadStatistics | None = None
