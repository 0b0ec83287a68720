"""a* and its parts: against oracles on raw gradients, and against populations that are known.

Simulations draw Gaussian gradients of 24 parameters, the traces' and the empties' correlated within
a prompt and over prompts; "within 4 standard errors" is of the simulation.
"""

import dataclasses
import math

import pytest
import torch
from mixing_cases import (
    KINDS,
    empirical_argmin,
    many_stats,
    population,
    squared_error,
    stats,
    two,
    with_optimum,
    without_rows,
)

from bvpo_kernels.mixing import (
    Moments,
    StepStats,
    alpha_star,
    mixing_weights,
    mse_matrix,
    unbiased,
    within_unit,
)
from bvpo_kernels.mixing.moments import moment_values
from bvpo_kernels.mixing.optimum import t_quantile
from bvpo_kernels.oracles import mixing as oracle

THREE = ("trace", "empty", "marginal")


def gradients(units=5, kinds=3, dim=7):
    return torch.randn(units, kinds, dim).double() + torch.randn(kinds, dim).double()


def test_moments_against_definitions():
    g = gradients()
    moments = unbiased(stats(g, THREE))
    for u, first in enumerate(THREE):
        for v, second in enumerate(THREE):
            expected = oracle.covariance(g, u, v)
            assert moments.covariance(first, second) == pytest.approx(expected, rel=1e-10)
            expected = oracle.mean_product(g, u, v)
            assert moments.mean_product(first, second) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("units", [4, 16])
def test_moments_are_unbiased(units):
    p, reps = population(), 20_000
    values = []
    for g in p.draw(reps, units).split(2_000):
        sums = g.sum(1)
        total = torch.einsum("rbkd,rbld->rkl", g, g)
        values.append(moment_values(total, sums @ sums.mT, units))
    values_RXKK = torch.cat(values)
    truth = p.moments(units).values_XKK[:2]
    error = (values_RXKK.mean(0) - truth).abs()
    assert (error <= 4 * values_RXKK.std(0) / reps**0.5).all()
    # and the simulation is sharp enough to notice a divisor B in the place of B - 1
    assert (values_RXKK.std(0) / reps**0.5)[0, 0, 0] < 0.1 * truth[0, 0, 0] / units


@pytest.mark.parametrize("reference", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [None, 2, 64.0])
def test_alpha_star_against_the_parabola(reference, batch_size):
    g = gradients(units=6)
    star = alpha_star(stats(g, THREE), batch_size, reference=THREE[reference])
    size = batch_size or 6
    numerator, denominator = oracle.quadratic(g, 0, 1, reference, size)
    assert star.numerator == pytest.approx(numerator, rel=1e-9)
    assert star.denominator == pytest.approx(denominator, rel=1e-9)
    assert star.raw == pytest.approx(numerator / denominator, rel=1e-9)
    assert star.alpha == min(1, max(0, star.raw))
    assert star.se == pytest.approx(oracle.jackknife_error(g, 0, 1, reference, size), rel=1e-8)
    for a in (0.0, 0.3, 1.0):
        expected = oracle.mixture_error(g, (a, 1 - a, 0), reference, size)
        actual = star.mse[0] + star.mse[1] * a + star.mse[2] * a * a
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_reference_trace_is_james_stein():
    """1 - q / (B |d_bar|^2), q = tr S_td, on the vectors."""
    g = gradients(kinds=2)
    t, d = g[:, 0], g[:, 0] - g[:, 1]
    q = ((t * d).sum() - t.sum(0) @ d.sum(0) / 5) / 4
    star = alpha_star(stats(g))
    assert star.raw == pytest.approx(1 - q.item() / (5 * d.mean(0).square().sum().item()))
    assert star.q == pytest.approx(q.item())
    assert star.denominator == pytest.approx(d.mean(0).square().sum().item())


def test_argmin_of_the_empirical_error():
    """a* = .52 by construction; averaged statistics, and the brute-force curve, find it."""
    p, units = with_optimum(0.52, 8), 8
    g = p.draw(20_000, units)
    truth = p.means_KD[0]
    assert alpha_star(p.moments(units)).raw == pytest.approx(0.52)
    assert empirical_argmin(g, truth) == pytest.approx(0.52, abs=0.01)
    sums = g.sum(1)
    total = torch.einsum("rbkd,rbld->rkl", g, g)
    values_RXKK = moment_values(total, sums @ sums.mT, units)
    averaged = Moments(KINDS, values_RXKK.mean(0), units)
    assert alpha_star(averaged).raw == pytest.approx(0.52, abs=0.01)
    alone = torch.tensor([alpha_star(s).raw for s in many_stats(g[:1000])])
    low, high = alone.quantile(0.05), alone.quantile(0.95)
    assert low < 0.4  # one batch of 8 says little
    assert high > 0.6
    error = [squared_error(g, two(a), truth).mean() for a in (0.0, 0.52, 1.0)]
    assert error[1] < 0.8 * min(error[0], error[2])


@pytest.mark.parametrize("batch_size", [2, 24, 96])
def test_prediction_for_other_batch_sizes(batch_size):
    """Statistics measured at B = 6 predict the brute-force argmin at B'."""
    p = population(bias=0.25)
    g = p.draw(20_000, 6)
    sums = g.sum(1)
    total = torch.einsum("rbkd,rbld->rkl", g, g)
    measured = Moments(KINDS, moment_values(total, sums @ sums.mT, 6).mean(0), 6)
    predicted = alpha_star(measured, batch_size)
    actual = empirical_argmin(p.draw(240_000 // batch_size, batch_size), p.means_KD[0])
    assert predicted.raw == pytest.approx(actual, abs=0.02)
    assert abs(alpha_star(measured).raw - actual) > 0.1  # that of B = 6 would not do
    by_kappa = 1 - predicted.kappa / (1 + batch_size / predicted.batch_mix)
    assert predicted.raw == pytest.approx(by_kappa)


@pytest.mark.parametrize("reference", THREE)
def test_target_batch(reference):
    """Against the mean over the batch's prompts of E[r | prompt], by simulation."""
    p, units, reps = population(THREE, bias=0.3), 4, 20_000
    prompts = p.prompts(reps, units)
    g = p.sample(prompts)
    truth = prompts[:, :, THREE.index(reference)].mean(1)
    moments = p.moments(units)
    matrix = mse_matrix(moments, reference=reference, target="batch")
    weights = torch.tensor([[1, 0, 0], [0, 1, 0], [0.3, 0.5, 0.2]]).double()
    for w in weights:
        error = squared_error(g, w, truth)
        expected = (w @ matrix @ w).item()
        assert abs(error.mean().item() - expected) <= 4 * error.std().item() / reps**0.5
    star = alpha_star(moments, reference=reference, target="batch")
    assert star.raw == pytest.approx(empirical_argmin(g, truth), abs=0.01)
    b_t = p.means_KD[0] - p.means_KD[THREE.index(reference)]
    bias = (b_t @ (p.means_KD[0] - p.means_KD[1])).item()
    assert star.raw == pytest.approx(1 - (bias + star.q / units) / star.denominator)
    if reference == "trace":  # q is the noise of the trace alone
        assert star.raw - alpha_star(moments).raw > 0.1
        within = p.within_KK
        assert star.q == pytest.approx((within[0, 0] - within[0, 1]).item())


def test_target_batch_from_replicates():
    """within_BKK of two draws per prompt leads to the a* of the known covariances."""
    p, units = population(bias=0.3), 3000
    prompts = p.prompts(units)
    g = torch.stack([p.sample(prompts), p.sample(prompts)], dim=1)  # [B, R, K, D]
    products = torch.einsum("brkd,bsld->bklrs", g, g)
    step = many_stats(g[None, :, 0])[0]
    step = dataclasses.replace(step, within_BKK=within_unit(products))
    for target in ("population", "batch"):
        star, truth = (alpha_star(m, 4, target=target) for m in (step, p.moments(units)))
        assert abs(star.raw - truth.raw) < 4 * star.se
        assert 0 < star.se < 0.02


def test_identities():
    g = gradients(units=6)
    star = alpha_star(stats(g, THREE), reference="marginal")
    permuted = alpha_star(stats(g[torch.randperm(6)], THREE), reference="marginal")
    scaled = alpha_star(stats(7.3 * g, THREE), reference="marginal")
    swapped = alpha_star(stats(g[:, [1, 0, 2]], THREE), reference="marginal")
    relabelled = alpha_star(
        stats(g[:, [2, 0, 1]], ("marginal", "trace", "empty")), reference="marginal"
    )
    for name in ("raw", "se", "low", "high", "kappa", "batch_mix", "alpha"):
        for other in (permuted, scaled, relabelled):
            assert getattr(other, name) == pytest.approx(getattr(star, name), rel=1e-9)
    for name in ("q", "delta_sq", "tr_trace", "tr_empty", "tr_cross", "numerator", "denominator"):
        assert getattr(scaled, name) == pytest.approx(7.3**2 * getattr(star, name), rel=1e-9)
    assert swapped.raw == pytest.approx(1 - star.raw)
    assert swapped.alpha == pytest.approx(1 - star.alpha)
    assert swapped.se == pytest.approx(star.se)
    assert (swapped.low, swapped.high) == pytest.approx((1 - star.high, 1 - star.low))


@pytest.mark.parametrize("reference", THREE)
def test_no_worse_than_either_kind(reference):
    for seed in range(20):
        moments = population(THREE, seed=seed, bias=0.4).moments(4)
        star = alpha_star(moments, reference=reference)
        error = star.mse[0] + star.mse[1] * star.alpha + star.mse[2] * star.alpha**2
        assert error <= min(star.mse[0], sum(star.mse)) + 1e-12
        pair = mixing_weights(moments, reference=reference)
        assert pair.weights["trace"] == pytest.approx(star.alpha, abs=1e-9)
        assert pair.mse == pytest.approx(error)
        assert list(pair.weights) == ["trace", "empty"]


@pytest.mark.parametrize(
    ("bias", "units", "low", "high"),
    # bias 1: tr S_d / B is small against |Delta|^2, so the linear part rules. bias .2: it is not,
    # and the jackknife may be wide but not narrow.
    [(1.0, 16, 0.93, 0.97), (0.2, 8, 0.94, 0.99)],
)
def test_jackknife_covers_for_a_single_batch(bias, units, low, high):
    p = population(bias=bias)
    truth = alpha_star(p.moments(units)).raw
    stars = [alpha_star(s) for s in many_stats(p.draw(3000, units))]
    covered = sum(star.low <= truth <= star.high for star in stars) / len(stars)
    assert low <= covered <= high


def test_without_rows_the_error_of_one_step_is_unknown():
    step = stats(gradients(kinds=2))
    star = alpha_star(without_rows(step))
    assert star.raw == alpha_star(step).raw
    assert (star.se, star.low, star.high) == (math.inf, 0, 1)
    two_units = alpha_star(stats(gradients(units=2, kinds=2)))
    assert (two_units.se, two_units.low, two_units.high) == (math.inf, 0, 1)


@pytest.mark.parametrize("freedom", [2, 3, 5.5, 10, 40, 1000])
@pytest.mark.parametrize("probability", [0.9, 0.975])
def test_t_quantile(freedom, probability):
    actual = oracle.t_distribution(t_quantile(probability, freedom), freedom)
    assert actual == pytest.approx(probability, abs=4e-4)


def test_identical_kinds_leave_the_weight_undetermined():
    g = gradients(kinds=1)
    star = alpha_star(stats(g.expand(5, 2, 7)), fallback=0.3)
    assert not star.determined
    assert (star.alpha, star.raw, star.low, star.high) == (0.3, 0.3, 0, 1)
    rounded = [g * (1 + 1e-15 * torch.rand_like(g)) for _ in range(20)]
    near = [alpha_star(stats(torch.cat([g, other], dim=1))) for other in rounded]
    assert any(star.denominator > 0 for star in near)
    assert not any(star.determined for star in near)
    zero = alpha_star(stats(torch.zeros(4, 2, 3).double()))
    assert not zero.determined
    assert not any(math.isnan(v) for v in dataclasses.astuple(zero)[:-1])


def test_noise_that_hides_the_difference():
    """|Delta|^2 is estimated negative: fine at B = 4, without a minimum at B' = 10^6."""
    d = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).double()
    g = torch.stack([d + 0.1, torch.zeros(4, 1).double()], dim=1)
    near = alpha_star(stats(g))
    assert near.raw == pytest.approx(1 - (4 / 3) / (4 * 0.1**2))
    far = alpha_star(stats(g), 1_000_000)
    assert far.delta_sq < 0
    assert far.batch_mix == math.inf
    assert not far.determined
    assert far.alpha == 0.5


def test_units_with_few_effective_traces_are_left_out():
    g = gradients(units=6, kinds=2)
    ess = torch.tensor([4.0, 1.9, 2.0, 3.0, 1.0, 8.0]).double()
    gated, by_hand = stats(g, ess_B=ess), stats(g[[0, 2, 3, 5]])
    assert (gated.num_units, gated.skipped) == (4, 2)
    assert gated.ess_B.tolist() == [4, 2, 3, 8]
    # The oracle's products of four units and of six are sums in different orders on some CPUs.
    expected = dataclasses.asdict(alpha_star(by_hand))
    got = dataclasses.asdict(alpha_star(gated))
    assert got.pop("mse") == pytest.approx(expected.pop("mse"), rel=1e-12)
    assert got == pytest.approx(expected, rel=1e-12)


def test_dict_round_trip():
    step = stats(gradients(kinds=2), ess_B=torch.full((5,), 3.0).double())
    again = StepStats.from_dict(step.to_dict())
    assert vars(again) == vars(step)
    assert "within_BKK" not in step.to_dict()


def fields(**changes):
    step = stats(gradients(kinds=2), ess_B=torch.full((5,), 3.0).double())
    return step.to_dict() | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gram_BKK": torch.ones(5, 2, 2)}, TypeError, "gram_BKK: expected a float64 Tensor"),
        (
            {"gram_BKK": torch.ones(5, 2).double()},
            ValueError,
            r"gram_BKK.*\[B, 2, 2\], got \[5, 2\]",
        ),
        ({"sums_KK": torch.ones(3, 3).double()}, ValueError, r"sums_KK: expected shape \[2, 2\]"),
        ({"rows_BKK": torch.ones(4, 2, 2).double()}, ValueError, "rows_BKK: expected shape"),
        ({"gram_BKK": -torch.ones(5, 2, 2).double()}, ValueError, "squared norms >= 0"),
        ({"sums_KK": torch.full((2, 2), math.nan).double()}, ValueError, "finite values, got nan"),
        ({"ess_B": torch.ones(5).double()}, ValueError, r"ess_B: expected at least 2\.0"),
        ({"kinds": ("trace", "trace")}, ValueError, "kinds: expected distinct names"),
        ({"skipped": -1}, ValueError, "skipped: expected an int >= 0, got -1"),
        ({"more": 1}, ValueError, "state: expected the fields of StepStats"),
    ],
)
def test_statistics_are_checked(changes, error, message):
    with pytest.raises(error, match=message):
        StepStats.from_dict(fields(**changes))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "batch"}, ValueError, "target: expected 'population' for stats without"),
        (
            {"target": "prompt"},
            ValueError,
            "target: expected 'population' or 'batch', got 'prompt'",
        ),
        ({"reference": "marginal"}, ValueError, "reference: expected one of the kinds"),
        ({"batch_size": 0}, ValueError, "batch_size: expected a finite number > 0, got 0"),
        ({"batch_size": "8"}, TypeError, "batch_size: expected a number or None, got str"),
        ({"confidence": 1.0}, ValueError, r"confidence: expected a number in \(0, 1\), got 1"),
        ({"fallback": 2}, ValueError, r"fallback: expected a number in \[0, 1\], got 2"),
    ],
)
def test_questions_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        alpha_star(stats(gradients(kinds=2)), **arguments)


def test_one_unit_has_no_variance():
    with pytest.raises(ValueError, match="stats: expected at least 2 units, got 1"):
        unbiased(stats(gradients(units=1, kinds=2)))
    with pytest.raises(TypeError, match="moments: expected Moments or StepStats, got dict"):
        alpha_star({})
