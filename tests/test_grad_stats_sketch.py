"""Sketched products: unbiased, calibrated, drawn anew each step and alike everywhere."""

import grad_stats_cases as cases
import pytest
import torch
from torch import Tensor

from bvpo_kernels.backends.eager import grad_stats as eager
from bvpo_kernels.call import Call, Inputs
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.types import Unit
from train.model.head import FusedHeadLM


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    cases.exact_norms(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draws(stats: GradStats, policy: FusedHeadLM, split: list[list[Unit]], count: int) -> Tensor:
    """[count, ...]: gram, sums and rows of as many steps in a row."""
    results = [cases.run_step(stats, policy, split) for _ in range(count)]
    return torch.stack(
        [
            torch.cat([r.gram_BKK.flatten(), r.sums_KK.flatten(), r.rows_BKK.flatten()])
            for r in results
        ]
    )


def expected(gram_BBKK: Tensor) -> Tensor:
    own_BKK = gram_BBKK.diagonal().permute(2, 0, 1)
    sums = gram_BBKK.sum((0, 1))
    return torch.cat([own_BKK.flatten(), sums.flatten(), gram_BBKK.sum(1).flatten()])


@pytest.mark.parametrize("tied", [False, True])
def test_unbiased(tied):
    """Within 4 standard errors of the exact products over 40 steps, each with its own signs."""
    policy, units = FusedHeadLM(cases.model(tied=tied)), cases.units()
    values = draws(GradStats(policy, "sketch", sketch_size=16), policy, [units[:2], units[2:]], 40)
    exact = expected(cases.oracle_gram(policy, units))
    error = values.std(0) / len(values) ** 0.5
    assert (error > 0).all()
    assert ((values.mean(0) - exact).abs() <= 4 * error).all()
    # About |G| |H| / k each: the variance falls, and the sketch is not the matrix in disguise.
    assert 1e-3 < (values.std(0)[0] / exact[0]) < 0.5


def test_whole_matrix_when_k_is_large():
    """Sides of at most k are kept whole: then every product is exact, across micro-batches too."""
    policy, units = FusedHeadLM(cases.model(tied=True)), cases.units(4)
    gram = cases.oracle_gram(policy, units)
    for mode in ("sketch", "exact"):
        stats = cases.measure(policy, [units[:1], units[1:]], mode=mode, sketch_size=cases.VOCAB)
        cases.assert_matches(stats, gram, 1e-10)


def test_self_terms_stay_exact():
    policy, units = FusedHeadLM(cases.model(tied=True)), cases.units(4)
    gram = cases.oracle_gram(policy, units)
    stats = cases.measure(policy, [units[:2], units[2:]], sketch_size=8)
    own_BKK = gram.diagonal().permute(2, 0, 1)
    torch.testing.assert_close(stats.gram_BKK, own_BKK, rtol=1e-9, atol=1e-9)
    error = (stats.sums_KK - gram.sum((0, 1))).abs() / gram.sum((0, 1)).diagonal().max()
    assert 0 < error.max() < 0.3


def test_calibration_removes_the_common_error():
    """Units of equal gradients: the sketch errs by one factor, which the self terms reveal."""
    policy, (unit, *_) = FusedHeadLM(cases.model()), cases.units()
    units = [Unit(f"copy {n}", unit.pairs) for n in range(4)]
    stats = cases.measure(policy, [[u] for u in units], sketch_size=4)
    d = torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(
        d @ stats.sums_KK @ d, 16 * (d @ stats.gram_BKK[0] @ d), rtol=1e-10, atol=0
    )
    raw = cases.measure(policy, [[u] for u in units], mode="sketch", sketch_size=4)
    assert abs(raw.sums_KK / (16 * stats.gram_BKK[0]) - 1).max() > 1e-3


def test_signs_are_drawn_anew_and_alike():
    policy, units = FusedHeadLM(cases.model()), cases.units()
    state = torch.get_rng_state()
    first, again = (GradStats(policy, "sketch", sketch_size=8) for _ in range(2))
    one, two = (cases.run_step(first, policy, [units]) for _ in range(2))
    assert not torch.equal(one.gram_BKK, two.gram_BKK)
    assert torch.equal(cases.run_step(again, policy, [units]).gram_BKK, one.gram_BKK)
    other = cases.measure(policy, [units], mode="sketch", sketch_size=8, seed=1)
    assert not torch.equal(other.gram_BKK, one.gram_BKK)
    assert torch.equal(torch.get_rng_state(), state)


def test_signs():
    """Independent of layer and side, E[s s^T] = I, the identity where nothing is to be gained."""
    like, seed = torch.zeros(()), torch.tensor(5)
    matrices = [eager.signs(200, 8, seed, layer, side, like) for layer in (0, 1) for side in (0, 1)]
    for index, matrix in enumerate(matrices):
        assert matrix.abs().unique().numel() == 1
        torch.testing.assert_close((matrix**2).sum(1), torch.ones(200))
        for other in matrices[:index]:
            assert abs((matrix * other).sum()) < 4 * 200**0.5 * 8**0.5 / 8
    assert torch.equal(eager.signs(8, 8, seed, 0, 0, like), torch.eye(8))


def _plan(ranges: Tensor, exact: bool, sketch: int, num_kinds: int) -> tuple:
    scored = ranges.diff(dim=1)[:, 0]
    return ranges, torch.tensor([0, 1, 0]), torch.tensor(3), scored, 2, exact, sketch, num_kinds, 1


@pytest.mark.parametrize("kept", [(0, 0), (5, 0), (0, 2)])
@pytest.mark.parametrize(("exact", "impl"), [(False, "cpp"), (True, "cpp"), (True, "eager")])
def test_opcheck(exact, impl, kept):
    """Schemas and fakes of the operators, in bf16 for the dtypes of what is kept."""
    exact = exact or kept[1] > 0
    torch.manual_seed(0)
    ranges = torch.tensor([[0, 3], [3, 4], [4, 9]])
    plan = _plan(ranges, exact, *kept)
    dy, x = torch.randn(9, 6).bfloat16(), torch.randn(9, 7).bfloat16()
    rows = torch.tensor([0, 2, 5]) if exact else None
    checks = ("test_schema", "test_faketensor")
    op = torch.ops.bvpo
    for options in ((), (torch.rand(3), True, "eager")):
        call = (torch.randn(3, 4, 5), torch.zeros(4, 5), *options)
        torch.library.opcheck(op.pair_reduce.default, call, test_utils=checks)
    for arguments in (
        (op.grouped_linear_backward, dy, x, True, True, rows),
        (op.grouped_linear_backward, dy, x, False, True, None),
        (op.grouped_embedding_backward, dy, torch.tensor([0, 2, 5] * 3), rows, None, 8, 2),
        (op.grouped_norm_statistics, dy, dy, 1e-6, True, True, exact),
    ):
        torch.library.opcheck(arguments[0].default, (*arguments[1:], *plan), test_utils=checks)
    hidden, weight, target = dy, torch.randn(11, 6).bfloat16(), torch.arange(9)
    target[4] = -100
    inputs = Inputs(hidden, weight, target, weight[:, 0].clone())
    options = Call(workspace_bytes=1000)
    *kept, _, _ = op.linear_logprobs_forward(*inputs, *options, False)
    need = (True, True, True)
    call = (torch.randn(9), *inputs, *kept, *options._replace(impl=impl), *need, rows)
    torch.library.opcheck(op.linear_logprobs_statistics.default, (*call, *plan), test_utils=checks)
