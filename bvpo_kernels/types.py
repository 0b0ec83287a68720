"""The data that passes between stages: token pairs, units, the packed batch, the loss.

Shape suffixes, used everywhere: T tokens, S segments, P pairs, G groups, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
TRACE = "trace"
EMPTY = "empty"
KINDS: tuple[str, ...] = (TRACE, EMPTY)


@dataclass(frozen=True)
class TokenPair:
    """One prompt with a preferred and a dispreferred response, as token ids.

    The prompt is what is conditioned on and never scored: for the empty kind it ends with the
    empty-trace literal. The responses are the ids as generated, end-of-sequence id included.
    """

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that the pair occupies in a pack: the prompt is repeated for each response."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Unit:
    """One prompt's material in a step: kind -> its pairs (more than one when K > 1 traces).

    Units are statistically independent of each other; what is inside one is not.
    """

    unit_id: str
    pairs: Mapping[str, Sequence[TokenPair]]

    @property
    def num_tokens(self) -> int:
        return sum(pair.num_tokens for pairs in self.pairs.values() for pair in pairs)


@dataclass(frozen=True)
class PackedBatch:
    """Units as one row of tokens without padding; `cu_seqlens` as in flash-attention.

    Order: unit, then kind (the order of `kinds`), then pair, then chosen before rejected. Hence
    pair p is segments 2p (chosen) and 2p+1 (rejected), and a group, (unit, kind), is a contiguous
    token range. `target_T[i]` is the token to predict at position i, `tokens_T[i + 1]`, where that
    token belongs to the response of the same segment, and `IGNORE_INDEX` elsewhere.
    """

    tokens_T: Tensor  # int64
    position_ids_T: Tensor  # int64, restarts at 0 in each segment
    target_T: Tensor  # int64
    cu_seqlens: Tensor  # int32 [S + 1]
    scored_lengths_S: Tensor  # int64, scored tokens of each segment
    pair_group_P: Tensor  # int64, index of the group that a pair belongs to
    group_ranges_G2: Tensor  # int64, token range [start, end) of each group
    group_unit_G: Tensor  # int64, index into unit_ids
    group_kind_G: Tensor  # int64, index into kinds
    unit_ids: tuple[str, ...]
    kinds: tuple[str, ...] = KINDS
    max_seqlen: int = 0
    num_scored: int | None = None  # rows of `target_T` that are scored, where the host knows it
    # The same batch in the host's memory, for one that was moved from there; see `on_host`.
    host: PackedBatch | None = field(default=None, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.numel()

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_pairs(self) -> int:
        return self.pair_group_P.numel()

    @property
    def pair_kind_P(self) -> Tensor:
        """Kind index of each pair, int64 [P]."""
        return self.group_kind_G[self.pair_group_P]

    @property
    def on_host(self) -> PackedBatch | None:
        """The batch where the host reads it without waiting for a device; None: nowhere."""
        return self if self.tokens_T.device.type == "cpu" else self.host

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        there = moved["tokens_T"].device.type == "cpu"
        return replace(self, **moved, host=None if there else self.on_host)


class BVPOLoss(NamedTuple):
    """L_c = sum_kind w_kind L_kind and what it is made of.

    `loss` carries the gradient; `kind_losses` are the per-kind losses (mean over the pairs of that
    kind in the whole step, so micro-batches sum), `metrics` are detached scalars under TRL's names
    with the kind in front (`trace/rewards/margins`). kind_scale: factor of a unit's gradient of a
    kind in that of `loss`, the kind's weight over the units of the step that have it, detached
    0-dim fp64: with several pairs the unit's gradient is the mean of theirs. scores_S: what the
    losses were made of. one_pass: whether `linear_bvpo_loss` formed the head's gradients with the
    scores; then `kind_losses` and `scores_S` are detached.
    """

    loss: Tensor
    kind_losses: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]
    kind_scale: Mapping[str, Tensor]
    scores_S: Tensor
    one_pass: bool = False

    @property
    def trace_loss(self) -> Tensor:
        return self.kind_losses[TRACE]

    @property
    def empty_loss(self) -> Tensor:
        return self.kind_losses[EMPTY]
