"""What scales a kind's loss is said once: `bvpo_loss` tells the collection, and a* follows."""

import grad_stats_cases as cases
import pytest
import torch

from bvpo_kernels import TokenPair, Unit, bvpo_loss, pack, segment_sum
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.mixing import alpha_star
from bvpo_kernels.oracles import grad_stats as oracle
from bvpo_kernels.types import EMPTY, TRACE
from train.model.head import FusedHeadLM


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    cases.exact_norms(monkeypatch)


@pytest.fixture
def policy() -> FusedHeadLM:
    return FusedHeadLM(cases.model(tied=True, num_hidden_layers=1))


def loss(policy, batch, alpha, **options):
    scores_S = segment_sum(policy(batch), batch.cu_seqlens)
    return bvpo_loss(scores_S, 0.9 * scores_S.detach(), batch, alpha, beta=0.7, **options)


def ragged_units() -> list[Unit]:
    """One, two and three traces."""
    return [
        Unit(unit.unit_id, {**unit.pairs, TRACE: unit.pairs[TRACE][: n + 1]})
        for n, unit in enumerate(cases.units(3, traces=3))
    ]


def mean_gram(policy, units):
    """[B, B, K, K] of each unit's share of L_k times the number of units: the oracle."""
    kinds = (TRACE, EMPTY)
    pairs = {kind: sum(len(unit.pairs[kind]) for unit in units) for kind in kinds}

    def share(unit: Unit):
        weights = {kind: len(units) * len(unit.pairs.get(kind, ())) / pairs[kind] for kind in kinds}
        return loss(policy, pack([unit], kinds=kinds), weights).loss

    return oracle.unit_gram(oracle.group_gradients(units, kinds, cases.trained(policy), share))


@pytest.mark.parametrize("make", [cases.units, lambda: cases.units(3, traces=2), ragged_units])
@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3), {TRACE: 0.6, EMPTY: 1.4}])
def test_told_by_the_loss(policy, make, alpha):
    """Nothing is said twice: a unit's gradient is its share of L_k, for one micro-batch."""
    units = make()
    batch, stats = pack(units), GradStats(policy)
    with stats.collect(batch):
        loss(policy, batch, alpha).loss.backward()
    cases.assert_matches(stats.result(), mean_gram(policy, units), 1e-6)


@pytest.mark.parametrize("cross", ["exact", "sketch"])
@pytest.mark.parametrize("make", [lambda: cases.units(3, traces=2), ragged_units])
def test_told_over_micro_batches(policy, make, cross):
    units = make()
    counts = {kind: sum(len(unit.pairs[kind]) for unit in units) for kind in (TRACE, EMPTY)}
    stats = GradStats(policy, cross=cross, sketch_size=cases.VOCAB)
    for part in (units[:1], units[1:]):
        batch = pack(part)
        with stats.collect(batch):
            loss(
                policy, batch, 0.3, pair_counts=counts, unit_counts={TRACE: 3, EMPTY: 3}
            ).loss.backward()
    cases.assert_matches(stats.result(), mean_gram(policy, units), 1e-10)


def test_factors_may_change_between_micro_batches(policy):
    """Each micro-batch a mean over its own units, with another weight."""
    units = cases.units(3, traces=2)
    for cross in ("exact", "sketch"):
        stats = GradStats(policy, cross=cross, sketch_size=cases.VOCAB)
        for part, alpha in ((units[:1], 0.3), (units[1:], 0.6)):
            batch = pack(part)
            with stats.collect(batch):
                loss(policy, batch, alpha).loss.backward()
        cases.assert_matches(stats.result(), mean_gram(policy, units), 1e-10)


def test_kind_scale_of_the_loss(policy):
    """Weight over units of the step: given, from the batch, or from its pairs per unit."""
    batch = pack(cases.units(3, traces=2))
    expected = {TRACE: 0.25 / 3, EMPTY: 0.75 / 3}
    for options, factor in (
        ({}, 1.0),
        ({"pair_counts": {TRACE: 24, EMPTY: 12}}, 0.25),
        ({"unit_counts": {TRACE: 6, EMPTY: 6}}, 0.5),
    ):
        found = loss(policy, batch, torch.tensor(0.25), **options).kind_scale
        assert {k: v.item() for k, v in found.items()} == pytest.approx(
            {k: factor * v for k, v in expected.items()}
        )
        assert all(not value.requires_grad for value in found.values())
    with pytest.raises(ValueError, match=r"unit_counts\['trace'\]: .*got 2 for a batch with 3"):
        loss(policy, batch, 0.3, unit_counts={TRACE: 2, EMPTY: 3})
    with pytest.raises(ValueError, match="unit_counts: expected the kinds"):
        loss(policy, batch, 0.3, unit_counts={TRACE: 3})


@pytest.mark.parametrize(
    "given",
    [
        {TRACE: 0.3 / 3, EMPTY: 0.7 / 3},
        {TRACE: 0.3 / 30, EMPTY: 0.7 / 30},
        {TRACE: 0.3 / 6, EMPTY: 0.7 / 3},
        {TRACE: torch.tensor(0.1), EMPTY: torch.tensor(0.7 / 3)},
    ],
    ids=["units", "accumulated", "pairs", "tensors"],
)
def test_said_twice_alike(policy, given):
    batch, stats = pack(cases.units(3, traces=2)), GradStats(policy)
    with stats.collect(batch, given):
        loss(policy, batch, 0.3).loss.backward()
    stats.result()


@pytest.mark.parametrize(
    "given",
    [
        {TRACE: 1 / 3, EMPTY: 1 / 3},
        {TRACE: 0.7 / 3, EMPTY: 0.3 / 3},
        {TRACE: 0.31 / 3, EMPTY: 0.69 / 3},
    ],
    ids=["no weights", "swapped", "another alpha"],
)
@pytest.mark.parametrize("cross", ["exact", "sketch"])
def test_said_twice_and_not_alike(policy, given, cross):
    """It gave a* .98 for .485 without a word."""
    batch, stats = pack(cases.units(3, traces=2)), GradStats(policy, cross=cross)
    with (
        pytest.raises(ValueError, match=r"kind_scale: expected factors in the proportion of bvpo"),
        stats.collect(batch, given),
    ):
        loss(policy, batch, 0.3).loss.backward()


def test_alpha_star_does_not_depend_on_the_weight_it_was_measured_at(policy):
    found = []
    for alpha in (0.02, 0.5, 0.9):
        batch, stats = pack(cases.units(6)), GradStats(policy)
        with stats.collect(batch):
            loss(policy, batch, alpha).loss.backward()
        found.append(alpha_star(stats.result()).raw)
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_losses_of_others(policy):
    """Without `bvpo_loss` the factor is 1, or what is given."""
    batch = pack(cases.units(2))
    weight_S = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)

    def run(given):
        stats = GradStats(policy)
        with stats.collect(batch, given):
            (weight_S * segment_sum(policy(batch), batch.cu_seqlens)).sum().backward()
        return stats.result().gram_BKK

    plain, halved = run(None), run({TRACE: 2.0, EMPTY: 2.0})
    torch.testing.assert_close(halved, plain / 4, rtol=1e-12, atol=0)


def test_a_kind_with_a_loss_of_its_own(policy):
    """`bvpo_loss` leaves it out; whoever adds its loss says the factor, before the backward."""
    batch, stats = pack(cases.units(2)), GradStats(policy, cross="exact")
    with stats.collect(batch) as scale:
        result = loss(policy, batch, {TRACE: 0.5, EMPTY: 0.0})
        scale.scale({EMPTY: 0.25 / 2})
        (result.loss + 0.25 * result.kind_losses[EMPTY]).backward()
    cases.assert_matches(stats.result(), mean_gram(policy, cases.units(2)), 1e-10)
    with (
        pytest.raises(ValueError, match=r"kind_scale\['empty'\]: expected a finite number > 0"),
        stats.collect(batch),
    ):
        loss(policy, batch, {TRACE: 0.5, EMPTY: 0.0}).loss.backward()
    with stats.collect(batch) as scale:
        loss(policy, batch, 0.5).loss.backward()
        with pytest.raises(RuntimeError, match="kind_scale: expected before the backward"):
            scale.scale({EMPTY: 0.3})
    stats.reset()
    with pytest.raises(ValueError, match=r"kinds of .* got \['other'\]"), stats.collect(batch) as s:
        s.scale({"other": 1.0})


def test_what_cannot_be_known(policy):
    stats, units = GradStats(policy), ragged_units()
    batch, counts = pack(units[1:]), {TRACE: 6, EMPTY: 3}
    with pytest.raises(ValueError, match=r"unit_counts: bvpo_loss expects"), stats.collect(batch):
        loss(policy, batch, 0.3, pair_counts=counts).loss.backward()
    with pytest.raises(ValueError, match="expected one, for the several"), stats.collect(batch):
        (loss(policy, batch, 0.3).loss + loss(policy, batch, 0.4).loss).backward()
    other = pack([Unit("x", {"both": [TokenPair([1], [2], [3])]})], kinds=("both",))

    def of_another_batch():
        scores_S = segment_sum(policy(batch), batch.cu_seqlens)[:2]
        return bvpo_loss(scores_S, scores_S.detach(), other, {"both": 1.0}).loss

    with pytest.raises(ValueError, match="bvpo_loss of the collected batch"), stats.collect(batch):
        of_another_batch().backward()


def test_losses_that_are_not_differentiated_say_nothing(policy):
    batch, stats = pack(cases.units(3)), GradStats(policy)
    with stats.collect(batch):
        with torch.no_grad():
            loss(policy, batch, 0.9)
        scores_S = segment_sum(policy(batch), batch.cu_seqlens)
        bvpo_loss(scores_S.detach(), scores_S.detach(), batch, 0.9)
        bvpo_loss(scores_S, 0.9 * scores_S.detach(), batch, 0.3, beta=0.7).loss.backward()
    cases.assert_matches(stats.result(), mean_gram(policy, cases.units(3)), 1e-10)
