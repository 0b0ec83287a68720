"""Several traces per unit: noise within units, and units that too few traces speak for."""

import grad_stats_cases as cases
import pytest
import torch

from bvpo_kernels import Unit, pack
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.mixing import alpha_star
from bvpo_kernels.types import EMPTY, TRACE
from train.model.head import FusedHeadLM


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    cases.exact_norms(monkeypatch)


def test_within_units():
    """Against a loop over single pairs; the products of units are those of groups."""
    policy, units = FusedHeadLM(cases.model(tied=True)), cases.units(2, traces=3)
    pairs = [
        Unit(f"{unit.unit_id}, {n}", {TRACE: [pair], EMPTY: unit.pairs[EMPTY]})
        for unit in units
        for n, pair in enumerate(unit.pairs[TRACE])
    ]
    single = cases.oracle_gram(policy, pairs)[:, :, 0, 0].view(2, 3, 2, 3)
    for split in ([units], [units[:1], units[1:]]):
        stats = cases.measure(policy, split, within=True, sketch_size=cases.VOCAB)
        cases.assert_matches(stats, cases.oracle_gram(policy, units), 1e-10)
        for unit in range(2):
            gram_RR = single[unit, :, unit]
            expected = 3 / 2 * (gram_RR.trace() - gram_RR.sum() / 3)
            assert stats.within_BKK[unit, 0, 0].item() == pytest.approx(expected.item(), rel=1e-9)
        assert stats.within_BKK[:, 1].eq(0).all()
        assert stats.within_BKK[:, 0, 1].eq(0).all()
        # The traces' noise alone counts against them, so their weight is larger.
        batch, population = (alpha_star(stats, target=t).raw for t in ("batch", "population"))
        assert batch != population


def test_units_of_few_effective_traces_are_left_out():
    policy, units = FusedHeadLM(cases.model()), cases.units(4)
    ess = {"u0": 3.0, "u1": 1.9, "u2": 2.0, "u3": 5.0}
    gram = cases.oracle_gram(policy, [units[n] for n in (0, 2, 3)])
    for split in ([units], [units[:1], units[1:2], units[2:]]):
        stats = GradStats(policy, sketch_size=cases.VOCAB)
        for part in split:
            batch = pack(part)
            with stats.collect(batch, cases.SCALE):
                cases.dpo(policy, batch).backward()
        result = stats.result(ess=ess)
        cases.assert_matches(result, gram, 1e-10)
        assert (result.skipped, result.ess_B.tolist()) == (1, [3.0, 2.0, 5.0])


def test_refusals():
    policy, units = FusedHeadLM(cases.model()), cases.units(2)
    with pytest.raises(ValueError, match="within: expected False in mode 'norm'"):
        GradStats(policy, "norm", within=True)
    for cross, ess, error in (
        ("sketch", {"u0": 3.0}, ValueError),
        ("exact", {"u0": 3.0, "u1": 1.0}, RuntimeError),
    ):
        stats = GradStats(policy, cross=cross)
        for unit in units:
            batch = pack([unit])
            with stats.collect(batch, cases.SCALE):
                cases.dpo(policy, batch).backward()
        with pytest.raises(error, match=r"u1|cross='sketch'"):
            stats.result(ess=ess)
    assert torch.isfinite(cases.measure(policy, [units]).gram_BKK).all()
