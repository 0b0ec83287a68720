"""Which units a step trains on, and the packs they make: a function of (seed, epoch, step) only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.packing import PackPlan, pack, plan_packs
from bvpo_kernels.types import IGNORE_INDEX, KINDS, PackedBatch, TokenPair, Unit
from train.config import RunConfig, TrainConfig
from train.marginal import check_traces, without_extra
from train.pairs import load_pairs, split_holdout


@dataclass(frozen=True)
class MicroBatch:
    """One pack and the units in it, in the pack's order.

    A rank that was dealt fewer packs than another calls the model on fillers, packs without units
    of which nothing is scored: each call is a collective of all ranks.
    """

    units: tuple[Unit, ...]
    batch: PackedBatch

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


def count_pairs(units: Sequence[Unit]) -> dict[str, int]:
    """Pairs per kind, of every kind."""
    kinds = kinds_of(units)
    return {kind: sum(len(unit.pairs.get(kind, ())) for unit in units) for kind in kinds}


def kinds_of(units: Sequence[Unit]) -> tuple[str, ...]:
    """The trained kinds, and "marginal" where a unit has it."""
    extra = any(MARGINAL in unit.pairs for unit in units)
    return (*KINDS, MARGINAL) if extra else KINDS


def _plan(units: Sequence[Unit], token_budget: int) -> PackPlan:
    lengths = [unit.num_tokens for unit in units]
    return plan_packs(lengths, token_budget, names=[unit.unit_id for unit in units])


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


def filler(kinds: Sequence[str]) -> MicroBatch:
    """The smallest pack that runs through the model with every kind in it, nothing scored."""
    pair = TokenPair([0], [0], [0])
    batch = pack([Unit("filler", dict.fromkeys(kinds, (pair,)))], kinds=kinds)
    nothing_T = torch.full_like(batch.target_T, IGNORE_INDEX)
    return MicroBatch((), replace(batch, target_T=nothing_T))


def make_step(
    units: Sequence[Unit], token_budget: int, epoch: float = 0.0, rank: int = 0, num_ranks: int = 1
) -> Step:
    """Distribute units over packs of at most `token_budget` tokens; a unit is never split.

    The packs do not depend on the number of ranks that they are dealt to.

    Raises:
        ValueError: naming a unit that is longer than the budget.
    """
    plan = _plan(units, token_budget)
    sizes = [sum(units[index].num_tokens for index in indices) for indices in plan.bins]
    dealt, kinds = deal(sizes, num_ranks), kinds_of(units)
    chosen = [tuple(units[index] for index in plan.bins[number]) for number in dealt[rank]]
    own = [MicroBatch(group, pack(group, kinds=kinds)) for group in chosen]
    own += [filler(kinds)] * (max(map(len, dealt)) - len(own))
    return Step(epoch, tuple(units), tuple(own), count_pairs(units), sum(sizes), plan.fill)


def epoch_order(units: Sequence[Unit], seed: int, epoch: int) -> list[Unit]:
    """Units sorted by a hash of (seed, epoch, unit id).

    No generator is involved: the order is the same whatever ran before, whatever the versions of
    the libraries, and whatever the order of the file.
    """

    def digest(unit: Unit) -> bytes:
        return hashlib.sha256(f"{seed}\0{epoch}\0{unit.unit_id}".encode()).digest()

    return sorted(units, key=digest)


class StepPlan:
    """Step number -> `Step`, for the whole run.

    Each epoch is a new order, the same for any number of ranks; units that do not fill a last step
    sit that epoch out, so that every step has `units_per_step` units. `max_steps`, where given,
    replaces `epochs`.

    Raises:
        ValueError: for fewer units than one step needs, or a unit longer than the packs' budget.
    """

    def __init__(
        self, units: Sequence[Unit], cfg: TrainConfig, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> None:
        if cfg.units_per_step < 1 or len(units) < cfg.units_per_step:
            raise ValueError(
                f"train.units_per_step: expected 1 to {len(units)}, the number of training units, "
                f"got {cfg.units_per_step}"
            )
        self.units, self.seed = tuple(units), seed
        self.rank, self.num_ranks = rank, num_ranks
        self.units_per_step, self.token_budget = cfg.units_per_step, cfg.tokens_per_micro_batch
        self.steps_per_epoch = len(units) // cfg.units_per_step
        self.num_steps = cfg.max_steps or math.ceil(cfg.epochs * self.steps_per_epoch)
        _plan(units, self.token_budget)  # a unit that is too long is an error now, not at its step

    def __getitem__(self, step: int) -> Step:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.units, self.seed, epoch)
        start = index * self.units_per_step
        chosen = order[start : start + self.units_per_step]
        return self.step_of(chosen, epoch + index / self.steps_per_epoch)

    def step_of(self, units: Sequence[Unit], epoch: float = 0.0) -> Step:
        """This rank's part of a step on any units."""
        return make_step(units, self.token_budget, epoch, self.rank, self.num_ranks)

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


def load_units(cfg: RunConfig) -> tuple[list[Unit], list[Unit]]:
    """Training and held-out units of the configured pairs, disjoint."""
    units = load_pairs(cfg.train.pairs).units
    training, held_out = split_holdout(units, cfg.train.holdout, cfg.seed)
    return check_traces(training, cfg), [without_extra(unit) for unit in held_out]
