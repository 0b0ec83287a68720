"""Which units a step gets."""

import random

import pytest
import torch
from tiny_runs import make_units

from train.config import TrainConfig
from train.steps import StepPlan, count_pairs, epoch_order


def ids(units):
    return [unit.unit_id for unit in units]


def plan_of(units, seed=0, **options):
    cfg = TrainConfig(**{"units_per_step": 3, "tokens_per_micro_batch": 120, **options})
    return StepPlan(units, cfg, seed)


def test_an_epoch_uses_each_unit_once_and_leaves_out_the_rest():
    plan = plan_of(make_units(11), epochs=2)
    assert plan.num_steps == 6
    epochs = [[ids(plan[3 * epoch + step].units) for step in range(3)] for epoch in range(2)]
    for steps in epochs:
        assert [len(step) for step in steps] == [3, 3, 3]
        assert len({name for step in steps for name in step}) == 9
    assert sorted(epochs[0]) != sorted(epochs[1])
    first = [name for micro in plan.first_packs() for name in micro.batch.unit_ids]
    assert sorted(first) == sorted(ids(make_units(11)))
    assert sorted(ids(plan.units_used)) == sorted(first)


@pytest.mark.parametrize(("steps", "count"), [(1, 3), (2, 6), (3, 9), (4, 11)])
def test_units_that_the_run_never_reaches_are_not_scored(steps, count):
    plan = plan_of(make_units(11), max_steps=steps)
    used = {name for step in range(steps) for name in ids(plan[step].units)}
    assert len(plan.units_used) == count
    assert used <= set(ids(plan.units_used))
    assert [u for m in plan.first_packs() for u in m.batch.unit_ids] != []
    assert {u for m in plan.first_packs() for u in m.batch.unit_ids} == set(ids(plan.units_used))


def test_order_depends_on_seed_epoch_and_ids_only():
    units = make_units(20)
    torch.manual_seed(3)
    random.seed(3)
    expected = ids(epoch_order(units, 0, 0))
    torch.manual_seed(4)
    random.seed(4)
    assert ids(epoch_order(units[::-1], 0, 0)) == expected
    assert ids(epoch_order(units, 1, 0)) != expected
    assert ids(epoch_order(units, 0, 1)) != expected
    # Written down, so that a change of the order between versions is seen.
    assert expected[:4] == ["unit-13", "unit-17", "unit-0", "unit-3"]


def test_a_step_does_not_depend_on_the_steps_before_it():
    plan = plan_of(make_units(11), max_steps=50)
    late = ids(plan[37].units)
    for step in range(37):
        plan[step]
    assert ids(plan[37].units) == late
    assert plan.num_steps == 50


def test_micro_batches_keep_the_budget_and_the_pairs():
    plan = plan_of(make_units(12), units_per_step=6)
    step = plan[0]
    assert len(step.micro_batches) > 1
    assert all(micro.batch.num_tokens <= 120 for micro in step.micro_batches)
    assert all(ids(micro.units) == list(micro.batch.unit_ids) for micro in step.micro_batches)
    assert step.pair_counts == {"trace": 6, "empty": 6}
    assert step.fill == pytest.approx(step.num_tokens / (120 * len(step.micro_batches)))


def test_kinds_without_pairs_are_counted():
    assert count_pairs(make_units(2, kinds=("empty",))) == {"trace": 0, "empty": 2}


def test_a_long_unit_is_refused_at_once_by_name():
    units = make_units(11)
    longest = max(units, key=lambda unit: unit.num_tokens)
    expected = f"micro_batch: expected at least {longest.num_tokens}, .*'{longest.unit_id}'"
    with pytest.raises(ValueError, match=expected):
        plan_of(units, tokens_per_micro_batch=longest.num_tokens - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, r"train\.max_steps: expected at least 1, got 0"),
        ({"max_steps": -3}, r"train\.max_steps: expected at least 1, got -3"),
        ({"epochs": 0.0}, r"train\.epochs: expected a finite number > 0, got 0"),
        ({"epochs": float("inf")}, r"train\.epochs: expected .*, got inf"),
        ({"epochs": float("nan")}, r"train\.epochs: expected .*, got nan"),
    ],
)
def test_a_run_of_no_steps_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_of(make_units(11), **options)


@pytest.mark.parametrize("wanted", [0, 12])
def test_impossible_steps_are_refused(wanted):
    with pytest.raises(ValueError, match=rf"units_per_step: expected 1 to 11, .* got {wanted}"):
        plan_of(make_units(11), units_per_step=wanted)
