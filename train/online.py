"""Reference scores from a model that is at hand: a frozen copy, or the policy without adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bvpo_kernels.losses import LOSSES
from bvpo_kernels.packing import segment_sum
from train.config import RunConfig
from train.model.adapters import adapters_off
from train.model.head import FusedHeadLM
from train.runtime.parallel import reshard
from train.steps import MicroBatch


class OnlineReference:
    """log pi_ref(y|x) of the segments of a step's own packs, under no_grad.

    Rows of half precision round the same way as the policy's, so that the first loss is log 2
    exactly. It costs a forward per step, and per evaluation, and stores nothing.

    Args:
        model: what scores; its weights, inside `state`, are those of the start.
        state: the context in which it is the reference.
    """

    def __init__(
        self,
        model: FusedHeadLM,
        state: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.state = model, state
        self._scores: list[tuple[MicroBatch, Tensor]] = []

    @torch.no_grad()
    def prepare(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Score what `of` will be asked for; all ranks call, with equally many micro-batches."""
        self._scores = []
        with self.state():
            for micro in micro_batches:
                batch = micro.batch.to(self.model.device)
                self._scores.append((micro, segment_sum(self.model(batch), batch.cu_seqlens)))
        reshard(self.model)

    def of(self, micro: MicroBatch) -> Tensor:
        """Scores [S] of a micro-batch of the last `prepare`."""
        return next(scores_S for known, scores_S in self._scores if known is micro)


def scores_steps(cfg: RunConfig) -> bool:
    """Whether a step scores its own packs under the reference."""
    return cfg.reference != "cache" and LOSSES[cfg.loss.name].reference


def needs_copy(cfg: RunConfig) -> bool:
    """Whether the run holds a second model."""
    return cfg.reference == "frozen_copy" and scores_steps(cfg)


def online_reference(
    cfg: RunConfig, policy: FusedHeadLM, frozen: FusedHeadLM | None
) -> OnlineReference:
    """What `reference: frozen_copy` or `adapter_off` means.

    Args:
        frozen: a second model with the weights that the policy starts from, sharded like it.
    """
    if cfg.reference == "adapter_off":
        return OnlineReference(policy, lambda: adapters_off(policy.model))
    if frozen is None:
        raise ValueError("frozen: expected a model for reference 'frozen_copy', got None")
    return OnlineReference(frozen.requires_grad_(False))
