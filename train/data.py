"""Which units a step trains on, and the packs they make: a function of (seed, epoch, step) only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.packing import PackPlan, pack, plan_packs
from bvpo_kernels.types import KINDS, PackedBatch, Unit
from train.config import RunConfig, TrainConfig
from train.marginal import check_traces, without_extra
from train.pairs import load_pairs, split_holdout


@dataclass(frozen=True)
class MicroBatch:
    """One pack and the units in it, in the pack's order."""

    units: tuple[Unit, ...]
    batch: PackedBatch


@dataclass(frozen=True)
class Step:
    """The micro-batches of one optimizer step.

    pair_counts: pairs per kind in the whole step, the divisor of every micro-batch's sums.
    fill: share of the token budget that holds tokens, over all micro-batches.
    """

    epoch: float
    micro_batches: tuple[MicroBatch, ...]
    pair_counts: dict[str, int]
    fill: float

    @property
    def units(self) -> list[Unit]:
        return [unit for micro in self.micro_batches for unit in micro.units]

    @property
    def num_tokens(self) -> int:
        return sum(micro.batch.num_tokens for micro in self.micro_batches)


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


def make_step(units: Sequence[Unit], token_budget: int, epoch: float = 0.0) -> Step:
    """Distribute units over packs of at most `token_budget` tokens; a unit is never split.

    Raises:
        ValueError: naming a unit that is longer than the budget.
    """
    plan = _plan(units, token_budget)
    chosen = [tuple(units[index] for index in indices) for indices in plan.bins]
    kinds = kinds_of(units)
    micro_batches = tuple(MicroBatch(group, pack(group, kinds=kinds)) for group in chosen)
    return Step(epoch, micro_batches, count_pairs(units), plan.fill)


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

    Each epoch is a new order; units that do not fill a last step sit that epoch out, so that every
    step has `units_per_step` units. `max_steps`, where given, replaces `epochs`.

    Raises:
        ValueError: for fewer units than one step needs, or a unit longer than the packs' budget.
    """

    def __init__(self, units: Sequence[Unit], cfg: TrainConfig, seed: int) -> None:
        if cfg.units_per_step < 1 or len(units) < cfg.units_per_step:
            raise ValueError(
                f"train.units_per_step: expected 1 to {len(units)}, the number of training units, "
                f"got {cfg.units_per_step}"
            )
        self.units, self.seed = tuple(units), seed
        self.units_per_step, self.token_budget = cfg.units_per_step, cfg.tokens_per_micro_batch
        self.steps_per_epoch = len(units) // cfg.units_per_step
        self.num_steps = cfg.max_steps or math.ceil(cfg.epochs * self.steps_per_epoch)
        _plan(units, self.token_budget)  # a unit that is too long is an error now, not at its step

    def __getitem__(self, step: int) -> Step:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.units, self.seed, epoch)
        start = index * self.units_per_step
        chosen = order[start : start + self.units_per_step]
        return make_step(chosen, self.token_budget, epoch + index / self.steps_per_epoch)

    def first_epoch(self) -> list[Step]:
        """All units, in the packs of epoch 0: its steps, then the units that it leaves out."""
        steps = [self[step] for step in range(self.steps_per_epoch)]
        order = epoch_order(self.units, self.seed, 0)
        rest = order[self.steps_per_epoch * self.units_per_step :]
        return [*steps, make_step(rest, self.token_budget)] if rest else steps


def load_units(cfg: RunConfig) -> tuple[list[Unit], list[Unit]]:
    """Training and held-out units of the configured pairs, disjoint."""
    units = load_pairs(cfg.train.pairs).units
    training, held_out = split_holdout(units, cfg.train.holdout, cfg.seed)
    return check_traces(training, cfg), [without_extra(unit) for unit in held_out]
