"""Several traces per response: weights against enumeration, ANOVA against known variances."""

import itertools
import math

import pytest
import torch
from mixing_cases import population

from bvpo_kernels.mixing import importance_weights, within_unit
from bvpo_kernels.oracles import mixing as oracle

# A space of three traces: proposal q(r | x, y), joint pi(r, y | x) and a gradient of one parameter.
PROPOSAL = torch.tensor([0.5, 0.3, 0.2]).double()
JOINT = torch.tensor([0.05, 0.06, 0.04]).double()
VALUE = torch.tensor([1.0, -2.0, 3.0]).double()


def enumerated(n):
    """All 3^n draws: their probabilities and the weights of `importance_weights`."""
    draws = torch.tensor(list(itertools.product(range(3), repeat=n)))
    weights = importance_weights(JOINT.log()[draws], PROPOSAL.log()[draws])
    return PROPOSAL[draws].prod(1), draws, weights


def test_weights_against_scalar_oracles():
    log_joint, log_proposal = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    values = torch.randn(6).double()
    actual = importance_weights(log_joint - 5000, log_proposal - 4000)  # exp would underflow
    for row in range(4):
        ratios = (log_joint[row] - log_proposal[row]).tolist()
        expected = oracle.self_normalised(ratios, values.tolist())
        assert (actual.weights[row] @ values).item() == pytest.approx(expected)
        expected = oracle.jackknifed(ratios, values.tolist())
        assert (actual.jackknife[row] @ values).item() == pytest.approx(expected)
    torch.testing.assert_close(actual.jackknife.sum(1), torch.ones(4).double())
    torch.testing.assert_close(actual.ess, 1 / actual.weights.square().sum(1))


def test_bias_by_enumeration():
    """E[m] - sum_r pi(r | x, y) f(r) falls as 1 / N, after the jackknife as 1 / N^2."""
    marginal = (JOINT @ VALUE / JOINT.sum()).item()
    plain, corrected = {}, {}
    for n in (4, 8):
        probability, draws, weights = enumerated(n)
        plain[n] = (probability @ (weights.weights * VALUE[draws]).sum(1)).item() - marginal
        corrected[n] = (probability @ (weights.jackknife * VALUE[draws]).sum(1)).item() - marginal
    assert 1.7 < plain[4] / plain[8] < 2.3
    assert 3 < corrected[4] / corrected[8] < 6
    assert abs(corrected[8]) < abs(plain[8]) / 5


def test_equal_weights_when_the_traces_come_from_the_posterior():
    log_joint = torch.randn(3, 4).double()
    weights = importance_weights(log_joint, log_joint - 2)
    torch.testing.assert_close(weights.weights, torch.full((3, 4), 0.25).double())
    torch.testing.assert_close(weights.jackknife, weights.weights)
    assert weights.ess.tolist() == [pytest.approx(4)] * 3


def test_mask_and_gate():
    log_joint = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, -9, -9], [0, 0, 0]]).double()
    mask = torch.tensor([[True] * 3, [True, True, False], [True] * 3, [False] * 3])
    weights = importance_weights(log_joint, torch.zeros_like(log_joint), mask)
    assert weights.usable.tolist() == [True, True, False, False]
    assert weights.ess[:2].tolist() == [pytest.approx(3), pytest.approx(2)]
    assert weights.ess[3] == 0
    assert weights.weights[1].tolist() == [0.5, 0.5, 0]
    assert weights.weights[3].tolist() == [0, 0, 0]
    assert weights.jackknife[1].tolist() == [pytest.approx(0.5), pytest.approx(0.5), 0]
    assert not weights.jackknife.isnan().any()
    alone = importance_weights(torch.zeros(1), torch.ones(1))
    assert (alone.weights.item(), alone.jackknife.item(), alone.usable.item()) == (1, 1, False)


def test_within_prompts():
    """Unbiased within 4 standard errors, of R = 3 draws per prompt."""
    p, units, draws = population(seed=4), 6, 3
    within = []
    for _ in range(600):
        prompts = p.prompts(units)
        g = torch.stack([p.sample(prompts) for _ in range(draws)], dim=1)
        replicates = torch.einsum("brkd,bsld->bklrs", g, g)
        within.append(within_unit(replicates).mean(0))
    values = torch.stack(within)
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - p.within_KK).abs() <= 4 * error).all()
    assert error[0, 0] < 0.05 * p.within_KK[0, 0]


def test_within_by_hand():
    """u = 1, 3 and v = 2, 8: squares 2, 18, product of the deviations (-1)(-3) + (1)(3) = 6."""
    g = torch.tensor([[1.0, 3.0], [2.0, 8.0]]).double()
    products = torch.einsum("kr,ls->klrs", g, g)
    assert within_unit(products).tolist() == [[2, 6], [6, 18]]


def test_arguments_are_checked():
    one = torch.zeros(3)
    with pytest.raises(ValueError, match=r"log_proposal: expected shape \[3\]"):
        importance_weights(one, torch.zeros(2))
    with pytest.raises(ValueError, match="mask: expected bool"):
        importance_weights(one, one, torch.ones(3))
    with pytest.raises(ValueError, match="expected values < inf"):
        importance_weights(torch.tensor([0.0, math.inf, 1]), one)
    with pytest.raises(ValueError, match="expected at least 2 replicates, got 1"):
        within_unit(torch.zeros(2, 2, 1, 1))
