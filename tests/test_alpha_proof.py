"""a* on a real model whose traces can be enumerated, so that the true gradient is known exactly.

`alpha_proof_cases` has the model and its population of units. The gradient of every unit that can
occur is found once, by autograd through the model's own logits; the truth, the gradient of the DPO
loss on log pi(y | x) = logsumexp_r log pi(r, y | x), by autograd through that sum. From them
follows MSE(a) exactly. On the other side stands the package: packed batches through FusedHeadLM,
linear_logprobs, bvpo_loss and GradStats, then AlphaEstimator.

A step through the package takes some 40 ms, so it runs dozens of them, and each must agree with the
table of gradients to 1e-9. Where thousands of batches are needed, they are drawn from the table.
"""

import copy
from dataclasses import dataclass

import alpha_proof_cases as cases
import grad_stats_cases
import mixing_cases
import pytest
import torch

from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.mixing import (
    MARGINAL,
    AlphaEstimator,
    StepStats,
    alpha_star,
    mixing_weights,
)
from bvpo_kernels.types import EMPTY, TRACE
from train.model.head import FusedHeadLM

BATCH = 8
DRIFTED_BATCH = 32
GRID = [k / 10 for k in range(11)]


@dataclass(frozen=True)
class World:
    """A policy, the reference model that wrote the samples, and the population that they make."""

    policy: FusedHeadLM
    reference: FusedHeadLM
    population: cases.Population

    def batches(self, count: int, batch_size: int = BATCH) -> torch.Tensor:
        """[S, B, K, D] of independent batches."""
        return self.population.gradients()[self.population.draw(count, batch_size)]


@pytest.fixture(scope="module", autouse=True)
def _fp64():
    """transformers' RMSNorm computes in fp32 otherwise, and 1e-9 would be out of reach."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        grad_stats_cases.exact_norms(patch)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(_fp64):
    """Before training: policy = reference = generator."""
    policy = FusedHeadLM(cases.model())
    return World(policy, policy, cases.population(policy.model, policy.model))


@pytest.fixture(scope="module")
def drifted(start):
    """After five DPO steps; the samples are still those of the reference model."""
    policy = copy.deepcopy(start.policy)
    torch.manual_seed(1)
    cases.train(policy, start.reference, start.population.draw(5, BATCH), lr=0.01)
    population = cases.population(policy.model, start.reference.model)
    return World(policy, start.reference, population)


@pytest.fixture(scope="module")
def many(start):
    """2000 batches from the table: [S, B, K, D]."""
    torch.manual_seed(0)
    return start.batches(2000)


@pytest.fixture(scope="module")
def fitted(many):
    """The estimator after all of them, the traces' mean taken for the truth."""
    return averaged(many)


def argmin(error) -> float:
    """Of a parabola, from three of its points."""
    zero, half, one = error(0.0), error(0.5), error(1.0)
    return (3 * zero - 4 * half + one) / (4 * (zero - 2 * half + one))


def optimum(population: cases.Population, batch_size: int) -> float:
    return argmin(lambda a: population.error(a, batch_size))


def estimator(reference: str = TRACE, confidence: float = 0.999) -> AlphaEstimator:
    """The plain mean over steps. A test that looks at one interval must not fail one time in 20."""
    return AlphaEstimator(
        reference=reference, ema_halflife=float("inf"), warmup=0, confidence=confidence
    )


def averaged(gradients_SBKD: torch.Tensor, reference: str = TRACE, **options) -> AlphaEstimator:
    """An estimator after as many steps as there are batches, ten or more: no rows are needed."""
    made = estimator(reference, **options)
    for step in mixing_cases.many_stats(gradients_SBKD, cases.KINDS, with_rows=False):
        made.update(step)
    return made


def squared_errors(gradients_SBKD: torch.Tensor, population: cases.Population, a: float):
    """|a t_bar + (1 - a) e_bar - mu_m|^2 of each batch, the truth that of the population."""
    cell_C = population.probability_CRR.sum((1, 2))
    weights = torch.tensor([a, 1 - a, 0.0], dtype=torch.float64)
    return mixing_cases.squared_error(gradients_SBKD, weights, cell_C @ population.marginal_CD)


def assert_measured(stats: StepStats, gradients_BKD: torch.Tensor) -> None:
    """To 1e-9 of the norms: within units, of the sums, and of units with sums."""
    kinds = len(stats.kinds)
    expected = mixing_cases.stats(gradients_BKD[:, :kinds], stats.kinds)
    for name in ("gram_BKK", "sums_KK", "rows_BKK"):
        got, wanted = getattr(stats, name), getattr(expected, name)
        assert (got - wanted).abs().max() <= 1e-9 * wanted.abs().max(), name


def test_mean_trace_gradient_is_the_marginal_gradient(start):
    """Fisher: E over r | x, y of grad log pi(r, y | x) = grad log pi(y | x), hence b_t = 0."""
    population = start.population
    cell_C = population.probability_CRR.sum((1, 2))
    posterior_CRR = population.probability_CRR / cell_C[:, None, None]
    mean_CD = torch.einsum("crs,crsd->cd", posterior_CRR, population.trace_CRRD)
    size = population.marginal_CD.norm(dim=1)
    assert (mean_CD - population.marginal_CD).norm(dim=1).max() <= 1e-12 * size.max()
    moments = population.moments(BATCH)
    assert abs(moments.distance_sq(TRACE, MARGINAL)) <= 1e-12
    assert moments.distance_sq(EMPTY, MARGINAL) > 1
    # Traces from elsewhere than the posterior are biased: the identity is no accident.
    uniform_CD = population.trace_CRRD.mean((1, 2))
    assert (uniform_CD - population.marginal_CD).norm(dim=1).min() > 0.1 * size.mean()


@pytest.mark.parametrize("world", ["start", "drifted"])
def test_package_measures_the_enumerated_gradients(world, request):
    """All three kinds, the marginal with a loss that sums over all traces in the pack."""
    world = request.getfixturevalue(world)
    stats = GradStats(world.policy, cross="none")
    for _ in range(3):
        index_B = world.population.draw(4)
        step = cases.measure_marginal(stats, world.policy, world.reference, index_B)
        assert step.kinds == cases.KINDS
        assert_measured(step, world.population.gradients()[index_B])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_step_moves_along_the_mixture_of_means(start, alpha):
    """What reaches the optimizer is a t_bar + (1 - a) e_bar, means over the units."""
    index_B = start.population.draw(BATCH)
    step_N = cases.step_gradient(start.policy, start.reference, index_B, alpha)
    means_KD = start.population.gradients()[index_B].mean(0)
    expected = alpha * means_KD[0] + (1 - alpha) * means_KD[1]
    assert (step_N @ start.population.rotation_ND - expected).norm() <= 1e-9 * expected.norm()
    assert step_N.norm() == pytest.approx(expected.norm().item(), rel=1e-9)


def test_estimate_from_measured_steps(start):
    """The package from end to end: 64 steps, lagged weight and all, find the argmin."""
    stats, alpha = GradStats(start.policy, cross="none"), estimator()
    gradients = start.population.gradients()
    for _ in range(64):
        index_B = start.population.draw(BATCH)
        step = cases.measure(stats, start.policy, start.reference, index_B, alpha.value())
        assert_measured(step, gradients[index_B])
        alpha.update(step)
    exact, star = optimum(start.population, BATCH), alpha.estimate()
    assert star.low <= exact <= star.high
    assert star.se < 0.05


def test_estimate_lands_at_the_argmin(start, many, fitted):
    """With thousands of batches: the estimate, the exact argmin, and that of the empirical curve.

    Nothing of one is used for another: inner products over units; sums over all traces; squared
    distances to the truth of the gradients of simulated batches.
    """
    star = fitted.estimate()
    exact = optimum(start.population, BATCH)
    cell_C = start.population.probability_CRR.sum((1, 2))
    truth_D = cell_C @ start.population.marginal_CD
    empirical = mixing_cases.empirical_argmin(many, truth_D)
    assert 0.2 < exact < 0.8
    assert star.low <= exact <= star.high
    assert star.raw == pytest.approx(exact, abs=0.03)
    assert empirical == pytest.approx(exact, abs=0.03)
    assert star.se < 0.01


@pytest.mark.parametrize(("world", "reference"), [("start", TRACE), ("drifted", MARGINAL)])
def test_interval_covers_the_argmin(world, reference, request):
    """300 intervals of 95 %, 24 steps each: the standard error of the coverage is .013."""
    world = request.getfixturevalue(world)
    exact, covered = optimum(world.population, BATCH), 0
    for _ in range(300):
        star = averaged(world.batches(24), reference, confidence=0.95).estimate()
        covered += star.low <= exact <= star.high
    assert 0.91 <= covered / 300 <= 0.99


def test_error_curve(start, many, fitted):
    """MSE(a): exact, of simulated batches, and as the package reports it."""
    constant, slope, curvature = fitted.estimate().mse
    for a in GRID:
        exact = start.population.error(a, BATCH)
        errors_S = squared_errors(many, start.population, a)
        standard_error = errors_S.std() / len(errors_S) ** 0.5
        assert abs(errors_S.mean() - exact) < 4 * standard_error
        assert constant + slope * a + curvature * a**2 == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("world", ["start", "drifted"])
def test_optimal_mixture_beats_both_kinds(world, request):
    """The paper's claim, strict because a* lies inside: exactly, and of simulated batches."""
    world = request.getfixturevalue(world)
    best = optimum(world.population, BATCH)
    assert 0 < best < 1
    exact = {a: world.population.error(a, BATCH) for a in (0.0, best, 1.0)}
    assert exact[best] < 0.99 * min(exact[0.0], exact[1.0])
    for nearby in (best - 0.02, best + 0.02):
        assert world.population.error(nearby, BATCH) > exact[best]
    # Batches are shared, so differences are far better known than the errors themselves.
    batches = world.batches(2000)
    errors = {a: squared_errors(batches, world.population, a) for a in exact}
    for a in (0.0, 1.0):
        gain_S = errors[a] - errors[best]
        assert gain_S.mean() > 2 * gain_S.std() / len(gain_S) ** 0.5


def test_variance_given_the_data(start):
    """Var(g_c | data) = a^2 Var(g_t | data) and E[g_c | data] = a g_m + (1 - a) g_e.

    The left sides from the gradients that the optimizer would get, one backward for each choice of
    both traces of one pair; the right sides from the table.
    """
    population, cell, traces, alpha = start.population, 4, len(cases.TRACES), 0.3
    index_U = torch.arange(cell * traces**2, (cell + 1) * traces**2)
    weight_U = population.probability_CRR[cell].flatten()
    weight_U = weight_U / weight_U.sum()
    mixed_UN = torch.stack(
        [cases.step_gradient(start.policy, start.reference, one[None], alpha) for one in index_U]
    )
    mean_N = weight_U @ mixed_UN
    variance = weight_U @ (mixed_UN - mean_N).square().sum(1)
    trace_UD = population.trace_CRRD[cell].flatten(0, 1)
    of_trace = weight_U @ (trace_UD - weight_U @ trace_UD).square().sum(1)
    assert variance.item() == pytest.approx(alpha**2 * of_trace.item(), rel=1e-9)
    expected_D = alpha * population.marginal_CD[cell] + (1 - alpha) * population.empty_CD[cell]
    assert (mean_N @ population.rotation_ND - expected_D).norm() <= 1e-9 * expected_D.norm()


def test_three_estimators(start):
    """Traces, cut traces and none: measured, mixed and stepped along as data, not as code.

    The truth is the best of all mixtures on a grid of the simplex, by the enumerated gradients.
    """
    weights = {TRACE: 0.5, cases.SHORT: 0.2, EMPTY: 0.3}
    trace_UD, empty_UD, _ = start.population.gradients().unbind(1)
    gradients_UKD = torch.stack([trace_UD, start.population.shortened(), empty_UD], 1)
    stats, averages = GradStats(start.policy, cross="none"), estimator()
    for _ in range(64):
        index_B = start.population.draw(BATCH)
        step = cases.measure_mixture(stats, start.policy, start.reference, index_B, weights)
        assert_measured(step, gradients_UKD[index_B])
        averages.update(step)
    step_N = torch.cat([p.grad.flatten() for p in start.policy.parameters()])
    weight_K = torch.tensor([*weights.values()], dtype=torch.float64)
    expected = weight_K @ gradients_UKD[index_B].mean(0)
    assert (step_N @ start.population.rotation_ND - expected).norm() <= 1e-9 * expected.norm()

    exact_KK = start.population.error_matrix(gradients_UKD, BATCH)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    mixtures = torch.cartesian_prod(grid, grid)
    mixtures = torch.cat([mixtures, 1 - mixtures.sum(1, keepdim=True)], 1)
    mixtures = mixtures[mixtures[:, 2] > -1e-9]
    errors = torch.einsum("mk,kl,ml->m", mixtures, exact_KK, mixtures)
    best = mixing_weights(averages.moments())
    found = torch.tensor([best.weights[kind] for kind in weights], dtype=torch.float64)
    assert set(best.weights) == set(weights)
    assert found @ exact_KK @ found <= 1.03 * errors.min()
    assert best.mse == pytest.approx((found @ exact_KK @ found).item(), rel=0.2)
    # A third kind is worth something here, or the test would not see it left out.
    pairs = errors[(mixtures[:, 1].abs() < 1e-9)].min()
    assert errors.min() < 0.98 * pairs


@pytest.mark.parametrize("other", [2, 4, 16, 32])
def test_other_batch_sizes(start, fitted, other):
    """Measured at B, asked at B'."""
    exact = optimum(start.population, other)
    moments = start.population.moments(BATCH)
    assert alpha_star(moments, other).raw == pytest.approx(exact, abs=1e-9)
    star = fitted.estimate(other)
    assert star.low <= exact <= star.high
    assert star.raw == pytest.approx(exact, abs=0.05)
    assert abs(exact - optimum(start.population, BATCH)) > 0.07  # so B' is not B by mistake
    by_kappa = 1 - star.kappa / (1 + other / star.batch_mix)
    assert by_kappa == pytest.approx(star.raw, abs=1e-9)


def test_marginal_reference_agrees_while_the_trace_is_unbiased(start, many, fitted):
    """q = tr S_td of one formula, <mu_m - mu_e, Delta> - tr S_ed / B of the other: the same a*."""
    exact = optimum(start.population, BATCH)
    moments = start.population.moments(BATCH)
    for reference in (TRACE, MARGINAL):
        assert alpha_star(moments, reference=reference).raw == pytest.approx(exact, abs=1e-9)
    star = averaged(many, MARGINAL).estimate()
    assert star.low <= exact <= star.high
    assert star.raw == pytest.approx(fitted.estimate().raw, abs=0.05)


@pytest.mark.parametrize("reference", [TRACE, MARGINAL])
def test_target_batch(start, reference):
    """Against the marginal gradient of the batch's own pairs only the traces' noise counts."""
    exact = argmin(lambda a: start.population.batch_error(a, BATCH))
    star = alpha_star(start.population.moments(BATCH), reference=reference, target="batch")
    assert star.raw == pytest.approx(exact, abs=1e-9)
    assert exact > optimum(start.population, BATCH) + 0.05


def test_after_training_only_the_marginal_reference_finds_the_argmin(drifted):
    """b_t is no longer 0: taking the traces' mean for the truth gives them too much weight."""
    population, batch_size = drifted.population, DRIFTED_BATCH
    bias_sq = population.moments(batch_size).distance_sq(TRACE, MARGINAL)
    exact = optimum(population, batch_size)
    batches = drifted.batches(1500, batch_size)
    informed = averaged(batches, MARGINAL)
    star, wrong = informed.estimate(), averaged(batches, TRACE).estimate()
    assert informed.log()["bias_t_sq"] == pytest.approx(bias_sq, rel=0.15)
    assert star.low <= exact <= star.high
    assert star.raw == pytest.approx(exact, abs=0.03)
    assert wrong.low > exact + 0.1
    assert population.error(wrong.raw, batch_size) > 1.05 * population.error(exact, batch_size)
