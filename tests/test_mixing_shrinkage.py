"""The weight while a* is only estimated: against a posterior integrated by brute force; what is not
determined is not used; more data move the weight to a*."""

import dataclasses
import math

import pytest
import torch
from mixing_cases import KINDS, many_stats, population, stats, with_optimum

from bvpo_kernels.mixing import AlphaEstimator, Moments, StepStats, alpha_star, unbiased
from bvpo_kernels.mixing.shrinkage import credibility
from bvpo_kernels.oracles import mixing as oracle


def residual_variance(gradients_BKD, a):
    """Leave-one-unit-out jackknife of numerator - a denominator, from definitions."""
    units = len(gradients_BKD)
    values = []
    for i in range(units):
        rest = torch.cat([gradients_BKD[:i], gradients_BKD[i + 1 :]])
        numerator, denominator = oracle.quadratic(rest, 0, 1, 0, units)
        values.append(numerator - a * denominator)
    return (units - 1) * torch.tensor(values).double().var(correction=0).item()


@pytest.mark.parametrize("initial", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_least_expected_error_of_the_posterior(initial, seed):
    """The minimum over a grid of E[D (a - a*)^2 | data], a* on a grid, prior times likelihood."""
    generator = torch.Generator().manual_seed(seed)
    g_BKD = torch.randn(7, 2, 9, generator=generator).double()
    g_BKD[:, 0] += 0.7
    star = alpha_star(stats(g_BKD), fallback=initial, confidence=0.5)
    assert star.determined
    numerator, denominator = oracle.quadratic(g_BKD, 0, 1, 0, 7)
    variance = residual_variance(g_BKD, initial) * 6 / 4  # of Student's t with six degrees
    truth = torch.linspace(-4, 5, 3_001, dtype=torch.float64)
    residual = numerator - initial * denominator
    log_posterior = (
        -0.5 * (truth - initial) ** 2 * 12
        - 0.5 * (residual - (truth - initial) * denominator) ** 2 / variance
    )
    weight = (log_posterior - log_posterior.max()).exp()
    choices = torch.linspace(0, 1, 2001, dtype=torch.float64)
    expected = (weight * (choices[:, None] - truth).square()).sum(1)
    assert star.weight == pytest.approx(choices[expected.argmin()].item(), abs=3e-4)
    assert 0.02 < star.credibility < 0.98
    assert min(initial, star.raw) < star.weight < max(initial, star.raw)


def test_credibility_at_its_ends():
    assert credibility(2.0, 0.0, 5.0) == 1
    assert credibility(2.0, 1e30, 5.0) < 1e-20
    assert credibility(2.0, 0.1, 2.0) == 0  # Student's t has no variance
    assert credibility(2.0, 0.1, 2.5) < credibility(2.0, 0.1, 9.0) < credibility(2.0, 0.1, 1e9)
    # scaling all gradients by c multiplies D by c^2 and the variance by c^4
    assert credibility(8.0, 1.6, 9.0) == pytest.approx(credibility(2.0, 0.1, 9.0))


def undetermined_steps(kinds=KINDS, units=4, steps=3, **fields):
    """Noise alone: of the steps that the seeds give, those whose interval is all of [0, 1]."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        g = torch.randn(steps, units, len(kinds), 3, generator=generator, dtype=torch.float64)
        drawn = many_stats(g, kinds)
        yield [StepStats.from_dict(step.to_dict() | fields) for step in drawn]


@pytest.mark.parametrize(
    ("kinds", "options", "units"),
    [
        (KINDS, {}, 4),
        (KINDS, {}, 2),
        (KINDS, {"initial": 0.9}, 4),
        (KINDS, {"initial": 1.0}, 3),
        (KINDS, {"target": "batch"}, 4),
        ((*KINDS, "marginal"), {"reference": "marginal"}, 4),
    ],
)
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_what_is_not_determined_is_not_used(kinds, options, units, steps):
    within = 2.5 * torch.eye(len(kinds)).double().expand(units, -1, -1).contiguous()
    fields = {"within_BKK": within} if options.get("target") == "batch" else {}
    found = 0
    for drawn in undetermined_steps(kinds, units, steps, **fields):
        alpha = AlphaEstimator(warmup=0, **options)
        for step in drawn:
            alpha.update(step)
        if found == 5:
            break
        star, log, initial = alpha.estimate(), alpha.log(), options.get("initial", 0.5)
        whole = (star.low, star.high) == (0, 1)
        assert star.determined == (not whole)
        assert log["alpha_determined"] == star.determined
        assert log["alpha_next"] == alpha.value()
        if whole:
            found += 1
            assert alpha.value() == star.weight == initial
            assert star.credibility == log["alpha_credibility"] == 0
            assert star.data_needed >= 1
        elif star.credibility:  # the weight may be that of the clip
            assert alpha.value() != initial
    assert found >= 2


def test_without_an_error_nothing_moves():
    """Two steps of two units: no jackknife, and too few steps for their spread."""
    alpha = AlphaEstimator(warmup=0)
    steps = many_stats(with_optimum(0.9, 2).draw(40, 2))
    for number, step in enumerate(steps, 1):
        alpha.update(step)
        if number <= 3:
            assert alpha.value() == 0.5
            assert "alpha_units_needed" not in alpha.log()
            assert alpha.log()["alpha_units"] == pytest.approx(2 * alpha.effective_steps)
    assert alpha.estimate().determined
    assert alpha.value() > 0.6


@pytest.mark.parametrize("optimum", [0.1, 0.9])
def test_more_data_move_the_weight_to_the_optimum(optimum):
    """On the average over repetitions the weight goes from initial to a*, never beyond."""
    p, reps, marks = with_optimum(optimum, 8, bias=0.3, shared=0.0), 30, (4, 16, 64)
    means = dict.fromkeys(marks, 0.0)
    shares = dict.fromkeys(marks, 0.0)
    for g in p.draw(reps, max(marks), 8):
        alpha = AlphaEstimator(warmup=0, ema_halflife=math.inf)
        for number, step in enumerate(many_stats(g, with_rows=False), 1):
            alpha.update(step)
            if number in marks:
                means[number] += alpha.value() / reps
                shares[number] += alpha.estimate().credibility / reps
    distance = [abs(means[n] - optimum) for n in marks]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 0.02
    assert [*shares.values()] == sorted(shares.values())
    assert shares[64] > 0.95


def test_data_that_are_needed():
    """With as many times the data the error is what determines a*, at this estimate."""
    found = 0
    for drawn in undetermined_steps(steps=1, units=6):
        moments = unbiased(drawn[0])
        star = alpha_star(moments)
        if star.determined or not 1 < star.data_needed < 100:
            continue
        found += 1
        for factor, determined in ((1.01, True), (0.99, False)):
            less = moments.covariance_FF / (factor * star.data_needed)
            sharper = dataclasses.replace(moments, covariance_FF=less)
            assert alpha_star(sharper).determined == determined
            assert alpha_star(sharper).raw == star.raw
    assert found >= 3


@pytest.mark.parametrize("halflife", [2.0, math.inf])
def test_units_that_are_needed_are_said_unless_the_averages_forget_them(halflife):
    """A halflife of two steps holds 5.8 effective ones, however many come."""
    limit, told, not_told = 4 * 5.83, 0, 0
    for drawn in undetermined_steps(steps=4):
        alpha = AlphaEstimator(warmup=0, ema_halflife=halflife)
        for step in drawn:
            alpha.update(step)
        log, star = alpha.log(), alpha.estimate()
        if star.determined:
            assert "alpha_units_needed" not in log
            continue
        needed = (star.data_needed - 1) * log["alpha_units"]
        if math.isinf(halflife) or log["alpha_units"] + needed < limit:
            told += 1
            assert log["alpha_units_needed"] == pytest.approx(needed)
        else:
            not_told += 1
            assert "alpha_units_needed" not in log
    assert told > 0
    assert (not_told > 0) == (halflife == 2.0)


def test_safer_than_the_estimate_itself():
    """a* = 1/2 is the initial weight: all that an estimate can do is harm. Rank 3, two units."""
    p = population(dim=6, bias=0.3)
    p = dataclasses.replace(p, means_KD=with_optimum(0.5, 2, dim=6, bias=0.3).means_KD)
    truth = alpha_star(p.moments(2))
    assert truth.raw == pytest.approx(0.5)
    excess = {"used": 0.0, "clipped": 0.0}
    for g in p.draw(100, 6, 2):
        alpha = AlphaEstimator(warmup=0)
        for step in many_stats(g):
            alpha.update(step)
        for name, a in (("used", alpha.value()), ("clipped", alpha.estimate().alpha)):
            excess[name] += truth.denominator * (a - 0.5) ** 2 / 100
    best = truth.mse[0] + truth.mse[1] / 2 + truth.mse[2] / 4
    assert excess["used"] / best < 0.06
    assert excess["clipped"] > 2 * excess["used"]


def test_a_state_of_before_goes_on():
    """The averages are what they were: no number of the rule is among them."""
    keys = {
        "version",
        "kinds",
        "sums",
        "weights",
        "jackknife",
        "steps",
        "num_units",
        "units_skipped",
        "steps_skipped",
        "ess",
    }
    alpha = AlphaEstimator(warmup=0)
    for step in many_stats(population().draw(12, 6)):
        alpha.update(step)
    state = alpha.state_dict()
    assert set(state) == keys
    assert state["version"] == 1
    again = AlphaEstimator(warmup=0)
    again.load_state_dict(state)
    assert again.value() == alpha.value()


def test_other_batch_sizes_have_their_own_weight():
    p = population(bias=0.25)
    alpha = AlphaEstimator(warmup=0, ema_halflife=math.inf)
    for step in many_stats(p.draw(200, 6)):
        alpha.update(step)
    own, large = alpha.estimate(), alpha.estimate(96)
    assert own.weight != large.weight
    truth = alpha_star(p.moments(96))
    assert large.weight == pytest.approx(truth.raw, abs=0.1)
    known = alpha.moments()
    sure = Moments(known.kinds, known.values_XKK, known.num_units, 0 * known.covariance_FF, 50.0)
    assert alpha_star(sure, 96).weight == pytest.approx(alpha_star(sure, 96).alpha)
