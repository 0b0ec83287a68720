"""The convex problem of several estimators: against a grid, the KKT conditions and a*."""

import math

import pytest
import torch
from mixing_cases import population, stats

from bvpo_kernels.mixing import minimise_on_simplex, mixing_weights, mse_matrix, unbiased
from bvpo_kernels.oracles.mixing import simplex_grid


def random_matrix(n, seed, rank=None, indefinite=False):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, rank or n, generator=g).double()
    matrix = root @ root.T
    return matrix - 0.6 * matrix.trace() / n * torch.eye(n) if indefinite else matrix


@pytest.mark.parametrize("indefinite", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_against_a_grid(n, indefinite):
    grid = torch.tensor(list(simplex_grid(n, 40 if n < 4 else 24))).double()
    faces = set()
    for seed in range(20):
        matrix = random_matrix(n, seed, indefinite=indefinite)
        weights = minimise_on_simplex(matrix)
        assert weights.sum().item() == pytest.approx(1)
        assert (weights >= 0).all()
        value = (weights @ matrix @ weights).item()
        on_grid = torch.einsum("pi,ij,pj->p", grid, matrix, grid).min().item()
        assert value <= on_grid + 1e-12
        assert on_grid - value < 0.02 * matrix.abs().max().item()
        faces.add(int((weights > 0).sum()))
    assert n < 3 or len(faces) > 1  # minima inside and on the boundary


@pytest.mark.parametrize("rank", [2, 8])
def test_karush_kuhn_tucker(rank):
    """grad_k >= lambda, with equality where w_k > 0: necessary and, for a convex M, sufficient."""
    for seed in range(4):
        matrix = random_matrix(8, seed, rank)
        weights = minimise_on_simplex(matrix)
        gradient = 2 * matrix @ weights
        multiplier = 2 * weights @ matrix @ weights
        tolerance = 1e-9 * matrix.abs().max()
        assert (gradient >= multiplier - tolerance).all()
        assert ((gradient - multiplier)[weights > 1e-9].abs() <= tolerance).all()


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_scale_and_order_do_not_matter(scale):
    matrix, order = random_matrix(4, 7), torch.tensor([2, 0, 3, 1])
    weights = minimise_on_simplex(matrix)
    torch.testing.assert_close(minimise_on_simplex(scale * matrix), weights)
    torch.testing.assert_close(minimise_on_simplex(matrix[order][:, order]), weights[order])


def test_identical_estimators_share():
    matrix = torch.tensor([[2.0, 2, 0.5], [2, 2, 0.5], [0.5, 0.5, 3]]).double()
    weights = minimise_on_simplex(matrix)
    a = (3 - 0.5) / (2 - 1 + 3)
    assert weights.tolist() == [pytest.approx(a / 2), pytest.approx(a / 2), pytest.approx(1 - a)]
    assert minimise_on_simplex(torch.zeros(4, 4).double()).tolist() == [pytest.approx(0.25)] * 4


def test_a_third_estimator_helps():
    """A shortened trace between the two: better than the best pair, and worth what it promises."""
    p = population(("trace", "short", "empty"), seed=3, bias=0.4)
    moments = p.moments(4)
    three = mixing_weights(moments)
    pair = mixing_weights(moments, estimators=("trace", "empty"))
    assert three.mse < 0.98 * pair.mse
    assert min(three.weights.values()) > 0
    assert pair.mse < min(pair.kind_mse.values())
    weights = torch.tensor(list(three.weights.values())).double()
    error = torch.einsum("k,rkd->rd", weights, p.draw(20_000, 4).mean(1)) - p.means_KD[0]
    squares = error.square().sum(1)
    assert abs(squares.mean().item() - three.mse) < 4 * squares.std().item() / math.sqrt(20_000)
    assert three.kind_mse["short"] == pytest.approx(mse_matrix(moments)[1, 1].item())
    assert mixing_weights(moments, 10_000).weights["trace"] > 0.95 > three.weights["trace"]


def test_convex_on_the_simplex_at_the_measured_batch_size():
    """x^T M x = |sum_k x_k k_bar|^2 for sum x = 0, whatever the reference."""
    g = torch.randn(5, 3, 4).double()
    for reference in ("a", "b", "c"):
        matrix = mse_matrix(stats_moments(g), reference=reference)
        x = torch.tensor([1.0, -3.0, 2.0]).double()
        expected = torch.einsum("k,kd->d", x, g.mean(0)).square().sum()
        torch.testing.assert_close(x @ matrix @ x, expected)


def stats_moments(gradients_BKD):
    return unbiased(stats(gradients_BKD, ("a", "b", "c")))


def test_arguments_are_checked():
    step = stats(torch.randn(4, 2, 3).double())
    with pytest.raises(ValueError, match="estimators: expected one of the kinds"):
        mixing_weights(step, estimators=("trace", "short"))
    with pytest.raises(ValueError, match="estimators: expected 1 to 8 distinct kinds"):
        mixing_weights(step, estimators=("trace", "trace"))
    with pytest.raises(ValueError, match=r"matrix: expected shape \[n, n\], got \[2, 3\]"):
        minimise_on_simplex(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="matrix: expected 1 to 8 estimators, got 9"):
        minimise_on_simplex(torch.eye(9))
    with pytest.raises(ValueError, match="matrix: expected finite values"):
        minimise_on_simplex(torch.full((2, 2), math.nan))
