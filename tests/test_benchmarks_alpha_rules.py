"""The simulation behind the rule of the weight: it sees what `AlphaEstimator` sees, and its
published tables are those of the results."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from mixing_cases import many_stats

from benchmarks import alpha_rules, records
from bvpo_kernels.mixing import AlphaEstimator

ROOT = Path(__file__).parent.parent
TRUTHS = {truth.name: truth for truth in alpha_rules.TRUTHS}


@pytest.mark.parametrize("units", [2, 5])
def test_weights_are_those_of_the_estimator(units):
    """Before, at and after the steps at which the error bar changes; determined and not."""
    marks, repetitions = (1, 2, 4, 12), 6
    truth = TRUTHS["a* = 0.25"]
    seed = torch.Generator().manual_seed(3)
    known = dict(alpha_rules.simulate(truth, units, marks, repetitions, seed))
    seed = torch.Generator().manual_seed(3)
    drawn = [truth.draw(repetitions, units, step / 12, seed) for step in range(12)]
    moved = 0
    for repetition in range(repetitions):
        estimator = AlphaEstimator(warmup=0)
        for step, stats in enumerate(many_stats(torch.stack(drawn)[:, repetition]), 1):
            estimator.update(stats)
            if step in marks:
                at = known[step]
                weight = alpha_rules.weight(alpha_rules.USED, at)[repetition].item()
                assert estimator.value() == pytest.approx(weight, rel=1e-9)
                assert estimator.estimate().raw == pytest.approx(at.raw_R[repetition].item())
                moved += weight != 0.5
    assert 0 < moved < len(marks) * repetitions


@pytest.mark.parametrize("name", ["a* = 0.08", "a* = 0.5, empties as noisy", "a* from .8 to .2"])
def test_truths_have_the_optimum_that_they_say(name):
    """The curve's minimum, and the curve against the squared errors of drawn batches."""
    truth, units, reps = TRUTHS[name], 4, 20_000
    last = truth.optimum if truth.last is None else truth.last
    for progress, optimum in ((0.0, truth.optimum), (1.0, last)):
        c0, c1, c2 = truth.curve(units, progress)
        assert c1 / c2 == pytest.approx(optimum, abs=1e-12)
        means = truth.draw(reps, units, progress, torch.Generator().manual_seed(0)).mean(1)
        mean_D = torch.zeros(truth.rank).double()
        mean_D[0] = truth.delta_sq(units, progress) ** 0.5
        for a in (0.0, 0.4, 1.0):
            errors = (a * means[:, 0] + (1 - a) * means[:, 1] - mean_D).square().sum(-1)
            expected = c0 - 2 * c1 * a + c2 * a**2
            assert abs(errors.mean().item() - expected) < 4 * errors.std().item() / reps**0.5


@pytest.fixture(scope="module")
def table():
    return pd.read_csv(records.RESULTS / alpha_rules.FILE)


def test_the_rule_is_safe_and_finds_the_optimum(table):
    """Never much worse than the initial weight; a few percent above a* when there are data."""
    used, plain = (table[table["rule"] == rule] for rule in (alpha_rules.USED, "a* itself"))
    assert used["worst_against_initial"].max() < 1.08
    assert plain["worst_against_initial"].max() > 1.3
    late = used[used["steps"] >= 32]
    assert late["median"].max() < 1.01
    assert late["p95"].max() < 1.15
    assert set(table["units"]) == set(alpha_rules.UNITS)
    assert set(table["steps"]) == set(alpha_rules.STEPS)


def test_the_same_numbers_every_time():
    """Also those of the summary, whose means are over truths as well."""
    truths = alpha_rules.TRUTHS[:2]
    frame, again = (alpha_rules.measure(3, truths, sizes=(2,)) for _ in range(2))
    assert frame.equals(again)
    table = alpha_rules.summarise(frame)
    assert len(table) == len(alpha_rules.RULES) * len(alpha_rules.STEPS)
    last = table[table["steps"] == 100].set_index("rule")
    initial = last.loc["initial"]
    assert initial["worst_against_initial"] == 1
    expected = []
    for truth in truths:
        c0, c1, c2 = truth.curve(2, 1.0)
        half, least = (c0 - 2 * c1 * a + c2 * a**2 for a in (0.5, truth.optimum))
        expected.append(half / least)
    assert initial["mean"] == pytest.approx(sum(expected) / 2)
    assert last.loc[alpha_rules.USED, "mean"] < initial["mean"]


def test_the_published_tables_are_of_the_results(table):
    page = (ROOT / "bvpo_kernels" / "mixing" / "README.md").read_text()
    assert alpha_rules.rules_table(table) in page
    for rule in ("a* itself", alpha_rules.USED):
        assert alpha_rules.steps_table(table, rule) in page
