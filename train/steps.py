"""Which units a step trains on, and the packs they make: a function of (seed, epoch, step) only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.packing import PackPlan, pack, plan_packs
from bvpo_kernels.types import IGNORE_INDEX, KINDS, PackedBatch, TokenPair, Unit
from train.config import TrainConfig


@dataclass(frozen=True)
class MicroBatch:
    """One pack and the units in it, in the pack's order.

    A rank that was dealt fewer packs than another calls the model on fillers, packs without units
    of which nothing is scored: each call is a collective of all ranks.

    measured: whether it may enter the gradient statistics, for which a unit needs every kind; the
    same on every rank at each place of a step.
    """

    units: tuple[Unit, ...]
    batch: PackedBatch
    measured: bool = True

    @property
    def is_filler(self) -> bool:
        return not self.units


@dataclass(frozen=True)
class Step:
    """One optimizer step, and this rank's part of it.

    units, pair_counts, num_tokens: of the whole step, all ranks; pair_counts, pairs per kind, is
    the divisor of every micro-batch's sums. micro_batches: this rank's, fillers last, equally many
    on every rank. fill: share of the token budget that holds tokens, over all packs of the step.
    """

    epoch: float
    units: tuple[Unit, ...]
    micro_batches: tuple[MicroBatch, ...]
    pair_counts: dict[str, int]
    num_tokens: int
    fill: float

    @property
    def kinds(self) -> tuple[str, ...]:
        return kinds_of(self.units)

    @property
    def unit_counts(self) -> dict[str, int]:
        """Units that have a kind, per kind."""
        return {k: sum(bool(unit.pairs.get(k)) for unit in self.units) for k in self.kinds}

    @property
    def num_lacking(self) -> int:
        """Units that lack a kind."""
        return sum(map(lacks_a_kind, self.units))


def count_pairs(units: Sequence[Unit]) -> dict[str, int]:
    """Pairs per kind, of every kind."""
    kinds = kinds_of(units)
    return {kind: sum(len(unit.pairs.get(kind, ())) for unit in units) for kind in kinds}


def kinds_of(units: Sequence[Unit]) -> tuple[str, ...]:
    """The trained kinds, and "marginal" where a unit has it."""
    extra = any(MARGINAL in unit.pairs for unit in units)
    return (*KINDS, MARGINAL) if extra else KINDS


def lacks_a_kind(unit: Unit) -> bool:
    """Whether a unit has no pair of one of the trained kinds; `rank` writes such by default."""
    return not all(unit.pairs.get(kind) for kind in KINDS)


def _plan(units: Sequence[Unit], token_budget: int) -> PackPlan:
    lengths = [unit.num_tokens for unit in units]
    return plan_packs(lengths, token_budget, names=[unit.unit_id for unit in units])


def check_budget(
    units: Sequence[Unit], token_budget: int, lines: Mapping[str, str] | None = None
) -> None:
    """Refuse a unit that no pack can hold.

    Args:
        lines: unit id -> "file:line".

    Raises:
        ValueError: naming the option, the longest unit and its tokens.
    """
    longest = max(units, key=lambda unit: unit.num_tokens)
    if longest.num_tokens > token_budget:
        where = f" ({lines[longest.unit_id]})" if lines else ""
        raise ValueError(
            f"train.tokens_per_micro_batch: expected at least {longest.num_tokens}, the tokens of "
            f"unit {longest.unit_id!r}{where} (a unit is never split), got {token_budget}"
        )


def deal(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of packs for each rank: the largest first, to and fro over the ranks.

    Ranks work on packs of similar size at the same time, and their numbers of packs differ by one
    at most.
    """
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for place, index in enumerate(order):
        turn, rank = divmod(place, num_ranks)
        dealt[rank if turn % 2 == 0 else num_ranks - 1 - rank].append(index)
    return dealt


def filler(kinds: Sequence[str], measured: bool = True) -> MicroBatch:
    """The smallest pack that runs through the model with every kind in it, nothing scored."""
    pair = TokenPair([0], [0], [0])
    batch = pack([Unit("filler", dict.fromkeys(kinds, (pair,)))], kinds=kinds)
    nothing_T = torch.full_like(batch.target_T, IGNORE_INDEX)
    return MicroBatch((), replace(batch, target_T=nothing_T), measured)


def make_step(
    units: Sequence[Unit],
    token_budget: int,
    epoch: float = 0.0,
    rank: int = 0,
    num_ranks: int = 1,
    *,
    measured: bool = False,
) -> Step:
    """Distribute units over packs of at most `token_budget` tokens; a unit is never split.

    The packs do not depend on the number of ranks that they are dealt to.

    Args:
        measured: keep units that lack a kind in packs of their own, after the others.

    Raises:
        ValueError: naming a unit that is longer than the budget.
    """
    kinds = kinds_of(units)
    parts = {True: list(units)}
    if measured:
        lacking = [unit for unit in units if lacks_a_kind(unit)]
        parts = {True: [unit for unit in units if not lacks_a_kind(unit)], False: lacking}
    own: list[MicroBatch] = []
    num_packs = 0
    for complete, members in parts.items():
        bins = _plan(members, token_budget).bins
        dealt = deal([sum(members[i].num_tokens for i in indices) for indices in bins], num_ranks)
        for number in dealt[rank]:
            group = tuple(members[index] for index in bins[number])
            own.append(MicroBatch(group, pack(group, kinds=kinds), complete))
        own += [filler(kinds, complete)] * (max(map(len, dealt)) - len(dealt[rank]))
        num_packs += len(bins)
    tokens = sum(unit.num_tokens for unit in units)
    fill = tokens / (num_packs * token_budget) if num_packs else 1.0
    return Step(epoch, tuple(units), tuple(own), count_pairs(units), tokens, fill)


def epoch_order(units: Sequence[Unit], seed: int, epoch: int) -> list[Unit]:
    """Units sorted by a hash of (seed, epoch, unit id).

    No generator is involved: the order is the same whatever ran before, whatever the versions of
    the libraries, and whatever the order of the file.
    """

    def digest(unit: Unit) -> bytes:
        return hashlib.sha256(f"{seed}\0{epoch}\0{unit.unit_id}".encode()).digest()

    return sorted(units, key=digest)


def _num_steps(cfg: TrainConfig, steps_per_epoch: int) -> int:
    if cfg.max_steps is not None:
        if cfg.max_steps < 1:
            raise ValueError(f"train.max_steps: expected at least 1, got {cfg.max_steps}")
        return cfg.max_steps
    if not 0 < cfg.epochs < math.inf:
        raise ValueError(f"train.epochs: expected a finite number > 0, got {cfg.epochs}")
    return math.ceil(cfg.epochs * steps_per_epoch)


class StepPlan:
    """Step number -> `Step`, for the whole run.

    Each epoch is a new order, the same for any number of ranks; units that do not fill a last step
    sit that epoch out, so that every step has `units_per_step` units. `max_steps`, where given,
    replaces `epochs`.

    Raises:
        ValueError: for fewer units than one step needs, a unit longer than the packs' budget, or a
            run of no steps.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        cfg: TrainConfig,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        *,
        measured: bool = False,
    ) -> None:
        if cfg.units_per_step < 1 or len(units) < cfg.units_per_step:
            raise ValueError(
                f"train.units_per_step: expected 1 to {len(units)}, the number of training units, "
                f"got {cfg.units_per_step}"
            )
        self.units, self.seed = tuple(units), seed
        self.rank, self.num_ranks, self.measured = rank, num_ranks, measured
        self.units_per_step, self.token_budget = cfg.units_per_step, cfg.tokens_per_micro_batch
        self.steps_per_epoch = len(units) // cfg.units_per_step
        self.num_steps = _num_steps(cfg, self.steps_per_epoch)
        check_budget(units, self.token_budget)  # an error now, not at the unit's step

    def __getitem__(self, step: int) -> Step:
        epoch, index = divmod(step, self.steps_per_epoch)
        return self.step_of(self._chosen(epoch)[index], epoch + index / self.steps_per_epoch)

    def _chosen(self, epoch: int) -> list[list[Unit]]:
        """The units of each step of an epoch."""
        order, size = epoch_order(self.units, self.seed, epoch), self.units_per_step
        return [order[n * size : (n + 1) * size] for n in range(self.steps_per_epoch)]

    def complete_units(self) -> Iterator[int]:
        """Units with every kind in each step of the run, in order."""
        for epoch in range(math.ceil(self.num_steps / self.steps_per_epoch)):
            steps = self._chosen(epoch)[: self.num_steps - epoch * self.steps_per_epoch]
            yield from (sum(not lacks_a_kind(unit) for unit in step) for step in steps)

    def step_of(self, units: Sequence[Unit], epoch: float = 0.0) -> Step:
        """This rank's part of a step on any units."""
        return make_step(
            units, self.token_budget, epoch, self.rank, self.num_ranks, measured=self.measured
        )

    @property
    def units_used(self) -> list[Unit]:
        """The units that the run can reach, each once, in the order of epoch 0."""
        order = epoch_order(self.units, self.seed, 0)
        if self.num_steps > self.steps_per_epoch:
            return order  # what epoch 0 leaves out may come in a later one
        return order[: self.num_steps * self.units_per_step]

    def first_packs(self) -> list[MicroBatch]:
        """This rank's packs of every unit that the run can reach: epoch 0, then what it omits."""
        steps = [self[step] for step in range(min(self.num_steps, self.steps_per_epoch))]
        rest = self.units_used[len(steps) * self.units_per_step :]
        if rest:
            steps.append(self.step_of(rest))
        return [micro for step in steps for micro in step.micro_batches]
