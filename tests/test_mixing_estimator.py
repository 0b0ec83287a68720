"""a* over steps: what is averaged, when it takes effect, what its error bar covers, its state."""

import json
import math

import pytest
import torch
from mixing_cases import KINDS, many_stats, population, stats, with_optimum, without_rows

from bvpo_kernels.mixing import AlphaEstimator, StepStats, alpha_star, unbiased
from bvpo_kernels.oracles import mixing as oracle


def two_numbers(t, e):
    """Statistics of two units with one parameter."""
    return stats(torch.tensor([t, e]).double().T[:, :, None])


def estimator(**options):
    return AlphaEstimator(**{"warmup": 0, "ema_halflife": math.inf} | options)


def test_numerator_and_denominator_are_averaged_not_clipped_ratios():
    """Step 1: t = d = 4, 4, so |d_bar|^2 = 16 and q = 0. Step 2: t = 4, -2 and d = 3, -1, so
    q = 12 + 2 - (2)(2) / 2 = 12, |d_bar|^2 = 1 and a = 1 - 12 / 2."""
    steps = [two_numbers((4, 4), (0, 0)), two_numbers((4, -2), (1, -1))]
    assert [alpha_star(step).raw for step in steps] == [1, pytest.approx(-5)]
    alpha = estimator(clip=(0.02, 0.98))
    for step in steps:
        alpha.update(step)
    # (16 + 1 - 6) / (16 + 1); the mean of the clipped ratios would be 1 / 2
    assert alpha.estimate().raw == pytest.approx(11 / 17)
    for _ in range(400):
        for step in steps:
            alpha.update(step)
    assert alpha.value() == pytest.approx(11 / 17, abs=0.01)


def test_halflife():
    """One step two halflives old counts a quarter."""
    alpha = estimator(ema_halflife=1.0)
    for step in (two_numbers((4, 4), (0, 0)), *[two_numbers((1, 1), (0, 0))] * 2):
        alpha.update(step)
    # |d_bar|^2: 16, 1, 1 with weights 1/4, 1/2, 1
    assert alpha.estimate().denominator == pytest.approx((4 + 0.5 + 1) / 1.75)
    assert alpha.effective_steps == pytest.approx(1.75**2 / (1 + 1 / 4 + 1 / 16))


def test_clip_comes_last():
    """Steps that are all the same have no error."""
    for step, raw, weight in (
        (two_numbers((4, 4), (0, 0)), 1, 0.7),
        (two_numbers((4, -2), (1, -1)), -5, 0.1),
    ):
        alpha = estimator(clip=(0.1, 0.7))
        for _ in range(5):
            alpha.update(step)
        assert alpha.estimate().raw == pytest.approx(raw)
        assert alpha.estimate().credibility == 1
        assert alpha.value() == weight


def test_warm_up():
    alpha = estimator(warmup=6, initial=0.4)
    for left in range(6, 0, -1):
        assert alpha.value() == 0.4
        alpha.update(two_numbers((4, 4), (0, 0)))
        assert alpha.log().get("alpha_warmup_left", 0) == left - 1
        assert alpha.log()["alpha_next"] == (0.4 if left > 1 else 0.98)
    assert alpha.value() == 0.98
    alpha.value()
    assert alpha.value() == 0.98  # asking changes nothing


def test_lagged():
    """The weight of a step is known before it, and only `update` changes it."""
    p = population()
    one, other = estimator(), estimator()
    for step in many_stats(p.draw(5, 4)):
        one.update(step)
        other.update(step)
    before = one.value()
    assert before == other.value()
    first, second = many_stats(p.draw(2, 4))
    one.update(first)
    other.update(second)
    assert one.value() != other.value()
    assert before not in (one.value(), other.value())


def test_no_reading_before_the_first_step():
    alpha = AlphaEstimator()
    assert alpha.value() == 0.5
    assert alpha.log() == {"units_skipped": 0, "stats_skipped": 0}
    with pytest.raises(ValueError, match="expected at least one update before, got 0"):
        alpha.moments()


def test_identical_kinds_give_the_initial_weight():
    alpha = estimator(initial=1.0)  # also where it lies outside of the clip
    for _ in range(12):
        alpha.update(stats(torch.randn(4, 1, 5).double().expand(4, 2, 5)))
    assert alpha.value() == 1
    log = alpha.log()
    assert all(math.isfinite(value) for value in log.values())
    assert "alpha_se" not in log
    assert (log["alpha_lo"], log["alpha_hi"]) == (0, 1)


@pytest.mark.parametrize("batch_size", [None, 3, 100])
def test_matches_the_truth(batch_size):
    p = with_optimum(0.52, 8, bias=0.3)
    alpha = estimator()
    for step in many_stats(p.draw(2000, 8)):
        alpha.update(step)
    star, truth = alpha.estimate(batch_size), alpha_star(p.moments(8), batch_size)
    assert abs(star.raw - truth.raw) < 4 * star.se
    assert 0 < star.se < 0.02
    if batch_size is None:
        assert truth.raw == pytest.approx(0.52)
        assert alpha.value() == star.weight
        assert abs(star.weight - star.raw) < 1e-4


def test_error_of_few_steps_is_the_jackknife():
    """Pooled: the variances of the steps' residuals add, over the squared sum of denominators."""
    g = torch.randn(3, 5, 2, 6).double() + torch.tensor([[2.0], [0.5]]).double()
    alpha = estimator()
    for one in g:
        alpha.update(stats(one))
    star = alpha.estimate()
    numerators, denominators = zip(*(oracle.quadratic(one, 0, 1, 0, 5) for one in g), strict=True)
    assert star.raw == pytest.approx(sum(numerators) / sum(denominators))
    variance = 0.0
    for one in g:
        residuals = []
        for i in range(5):
            n, d = oracle.quadratic(torch.cat([one[:i], one[i + 1 :]]), 0, 1, 0, 5)
            residuals.append(n - star.raw * d)
        variance += 4 * torch.tensor(residuals, dtype=torch.float64).var(correction=0).item()
    assert star.se == pytest.approx(variance**0.5 / sum(denominators), rel=1e-9)


def test_error_of_many_steps_is_their_spread():
    p, decay = population(), 2 ** (-1 / 8)
    steps = many_stats(p.draw(30, 6))
    with_rows, without = estimator(ema_halflife=8), estimator(ema_halflife=8)
    for step in steps:
        with_rows.update(step)
        without.update(without_rows(step))
    star = without.estimate()
    weights = [decay ** (29 - s) for s in range(30)]
    each = [alpha_star(step) for step in steps]
    mean = sum(w * s.denominator for w, s in zip(weights, each, strict=True)) / sum(weights)
    residuals = [s.numerator - star.raw * s.denominator for s in each]
    assert sum(w * r for w, r in zip(weights, residuals, strict=True)) == pytest.approx(0, abs=1e-9)
    squares = sum((w * r) ** 2 for w, r in zip(weights, residuals, strict=True))
    n = sum(weights) ** 2 / sum(w * w for w in weights)
    expected = (squares / (1 - 1 / n)) ** 0.5 / sum(weights) / mean
    assert star.se == pytest.approx(expected, rel=1e-9)
    assert with_rows.estimate() == star


@pytest.mark.slow
@pytest.mark.parametrize(("bias", "halflife"), [(1.0, math.inf), (0.2, math.inf), (0.2, 8.0)])
def test_interval_covers(bias, halflife):
    """24 steps of B = 8: in any regime of noise, with equal and with decaying weights.

    From four steps on the rows are not used (`test_error_of_many_steps_is_their_spread`).
    """
    p, reps, steps = population(bias=bias), 1200, 24
    truth = alpha_star(p.moments(8)).raw
    covered = 0
    all_stats = iter(many_stats(p.draw(reps * steps, 8), with_rows=False))
    for _ in range(reps):
        alpha = estimator(ema_halflife=halflife)
        for _ in range(steps):
            alpha.update(next(all_stats))
        star = alpha.estimate()
        covered += star.low <= truth <= star.high
    assert 0.93 <= covered / reps <= 0.97


@pytest.mark.parametrize(
    ("bias", "units", "steps", "low", "high"),
    [
        (1.0, 16, 3, 0.93, 0.975),
        (0.2, 4, 3, 0.965, 1.0),
        (1.0, 8, 4, 0.93, 0.97),
        (0.2, 2, 4, 0.92, 0.96),
    ],
)
def test_interval_of_few_pooled_steps(bias, units, steps, low, high):
    """Jackknife of 3 steps: fair where bias rules, wide where noise does. Spread of 4: fair."""
    p, reps = population(bias=bias), 1000
    truth = alpha_star(p.moments(units)).raw
    covered = 0
    all_stats = iter(many_stats(p.draw(reps * steps, units)))
    for _ in range(reps):
        alpha = estimator()
        for _ in range(steps):
            alpha.update(next(all_stats))
        star = alpha.estimate()
        covered += star.low <= truth <= star.high
    assert low <= covered / reps <= high


@pytest.mark.parametrize("cut", [0, 3, 15])
def test_state_round_trip_is_bitwise(cut):
    steps = [
        StepStats.from_dict(step.to_dict() | {"ess_B": torch.rand(6).double() + 2})
        for step in many_stats(population().draw(20, 6))
    ]
    whole = AlphaEstimator(warmup=2, ema_halflife=5)
    for step in steps[:cut]:
        whole.update(step)
    resumed = AlphaEstimator(warmup=2, ema_halflife=5)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    for step in steps[cut:]:
        assert resumed.value() == whole.value()
        assert resumed.log() == whole.log()
        whole.update(step)
        resumed.update(step.to_dict())
    assert resumed.log() == whole.log()
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.value() != whole.initial


def test_state_is_checked():
    state = AlphaEstimator().state_dict()
    with pytest.raises(ValueError, match="state: expected version 1 with keys"):
        AlphaEstimator().load_state_dict(state | {"version": 2})
    with pytest.raises(ValueError, match="state: expected version 1 with keys"):
        AlphaEstimator().load_state_dict({})


def test_log_describes_the_average():
    p = population(bias=0.3)
    alpha = estimator()
    for step in many_stats(p.draw(40, 6)):
        alpha.update(
            StepStats.from_dict(step.to_dict() | {"ess_B": torch.full((6,), 3.5).double()})
        )
    log, star = alpha.log(), alpha.estimate()
    assert all(isinstance(value, float) for value in log.values())
    assert log["alpha_raw"] == star.raw
    assert log["alpha_lo"] <= log["alpha_star"] <= log["alpha_hi"]
    assert log["alpha_hi"] - log["alpha_lo"] == pytest.approx(
        2 * 2.0227 * log["alpha_se"], rel=1e-3
    )
    assert log["ess"] == 3.5
    assert log["q"] == pytest.approx(log["trS_t"] - log["trS_te"])
    tr_d = log["trS_t"] + log["trS_e"] - 2 * log["trS_te"]
    assert log["kappa"] == pytest.approx(log["q"] / tr_d)
    assert log["B_mix"] == pytest.approx(tr_d / log["delta_sq"])
    assert -log["mse_1"] / (2 * log["mse_2"]) == pytest.approx(log["alpha_raw"])
    assert log["numerator"] / log["denominator"] == pytest.approx(log["alpha_raw"])
    # MSE(1) of the trace, unbiased here, is its variance
    assert log["mse_0"] + log["mse_1"] + log["mse_2"] == pytest.approx(log["trS_t"] / 6)
    alpha.update(stats(torch.randn(6, 2, 24).double()))
    assert "ess" not in alpha.log()


def test_steps_emptied_by_the_gate_are_counted():
    step = stats(torch.randn(5, 2, 3).double())
    alpha = estimator()
    alpha.update(step)
    before = alpha.log()
    gate = torch.tensor([1.0, 1.5, 3.0, 1.0, 1.2]).double()
    alpha.update(stats(torch.randn(5, 2, 3).double(), ess_B=gate))
    assert alpha.log() == before | {"units_skipped": 4, "stats_skipped": 1}
    with pytest.raises(ValueError, match="stats: expected at least 2 units, got 1"):
        alpha.update(stats(torch.randn(1, 2, 3).double()))


def test_kinds_must_stay():
    alpha = estimator()
    alpha.update(stats(torch.randn(4, 2, 3).double()))
    with pytest.raises(ValueError, match="stats: expected kinds"):
        alpha.update(stats(torch.randn(4, 2, 3).double(), ("empty", "trace")))
    with_within = stats(torch.randn(4, 2, 3).double(), within_BKK=torch.ones(4, 2, 2).double())
    with pytest.raises(ValueError, match="and the same fields"):
        alpha.update(with_within)


def test_marginal_reference_and_target_batch():
    p = population((*KINDS, "marginal"), bias=0.4)
    alpha = estimator(reference="marginal", target="batch")
    within = p.within_KK.expand(6, 3, 3).contiguous()
    for step in many_stats(p.draw(800, 6), p.kinds):
        alpha.update(StepStats.from_dict(step.to_dict() | {"within_BKK": within}))
    log, star = alpha.log(), alpha.estimate()
    truth = alpha_star(p.moments(6), reference="marginal", target="batch")
    bias_KD = p.means_KD - p.means_KD[2]
    assert log["bias_t_sq"] == pytest.approx(bias_KD[0].square().sum().item(), rel=0.2)
    assert log["bias_e_sq"] == pytest.approx(bias_KD[1].square().sum().item(), rel=0.2)
    assert abs(star.raw - truth.raw) < 4 * star.se
    assert star.raw != alpha_star(alpha.moments()).raw
    with pytest.raises(ValueError, match="reference: expected one of the kinds"):
        estimator(reference="marginal").update(stats(torch.randn(4, 2, 3).double()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_halflife": 0}, "ema_halflife: expected a number > 0, got 0"),
        ({"clip": (0.9, 0.1)}, "clip: expected 0 <= low <= high <= 1"),
        ({"warmup": -1}, "warmup: expected an int >= 0, got -1"),
        ({"initial": 1.5}, r"initial: expected a number in \[0, 1\], got 1.5"),
        ({"target": "both"}, "target: expected 'population' or 'batch', got 'both'"),
        ({"confidence": 95}, r"confidence: expected a number in \(0, 1\), got 95"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        AlphaEstimator(**options)


def test_moments_of_one_step_are_its_own():
    step = stats(torch.randn(5, 2, 4).double())
    alpha = estimator()
    alpha.update(step)
    averaged, own = alpha.moments(), unbiased(step)
    assert torch.equal(averaged.values_XKK, own.values_XKK)
    assert torch.equal(averaged.covariance_FF, own.covariance_FF)
    assert averaged.freedom == own.freedom
