"""The collection of gradient statistics that is running, if any.

A global of the process, not a context variable: with activation checkpointing layers run again in
autograd's threads, which see no context of the thread that called `backward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from bvpo_kernels.call import Call, Inputs, Need, Pairs
from bvpo_kernels.types import PackedBatch


class HeadStatistics(Protocol):
    """What the LM head's functions, `bvpo_loss` and instrumented layers ask of the collection."""

    collection: Any

    def head_logprobs(
        self, inputs: Inputs, call: Call, owner: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor] | None: ...

    @property
    def keeps_groups_apart(self) -> bool: ...

    def no_pair_loss(self, batch: PackedBatch) -> str: ...

    def head_pair_loss(
        self, inputs: Inputs, call: Call, pairs: Pairs, need: Need, owner: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor] | None: ...

    def report_loss(
        self, by_unit: Mapping[str, Tensor], by_pair: Mapping[str, Tensor], exact: bool
    ) -> None: ...


active: HeadStatistics | None = None
