"""Statistics of a step whose head runs in one pass: those of the recomputing schedule."""

import pytest
import torch
from grad_stats_cases import exact_norms, model, units
from test_logprobs import IMPLS

from bvpo_kernels import GradStats, linear_bvpo_loss, pack
from bvpo_kernels.backends import one_pass as one_pass_module
from bvpo_kernels.integrations.transformers import backbone

EXACT = {"rtol": 1e-10, "atol": 1e-14}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    exact_norms(monkeypatch)


def measure(lm, batches, *, impl="eager", one_pass=True, upstream=1.0, **options):
    """Statistics of a step over some micro-batches, and the gradients that it leaves."""
    stats = GradStats(lm, **options)
    lm.zero_grad()
    counts = {kind: sum(len(b.unit_ids) for b in batches) for kind in batches[0].kinds}
    head = lm.get_output_embeddings()
    for batch in batches:
        with stats.collect(batch) as scale:
            hidden = backbone(lm)(
                input_ids=batch.tokens_T[None],
                position_ids=batch.position_ids_T[None],
                use_cache=False,
            ).last_hidden_state[0]
            acc = torch.promote_types(hidden.dtype, torch.float32)
            result = linear_bvpo_loss(
                hidden,
                head.weight,
                batch,
                torch.full((batch.num_segments,), -30.0, dtype=acc),
                0.3,
                beta=0.3,
                pair_counts=counts,
                unit_counts=counts,
                impl=impl,
                bias=head.bias,
                one_pass=one_pass,
            )
            if upstream != 1:
                scale.scale({kind: upstream * float(v) for kind, v in result.kind_scale.items()})
            (result.loss * upstream).backward()
        assert result.one_pass == one_pass
    return stats.result(), {name: p.grad for name, p in lm.named_parameters()}


def same(found, expected, **tolerance):
    for name in ("gram_BKK", "sums_KK", "rows_BKK"):
        one, other = (getattr(stats, name) for stats in (found, expected))
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"cross": "exact"}, {"mode": "sketch"}, {"mode": "norm"}, {"sketch_size": 4}],
    ids=["exact", "sums", "sketch", "norm", "narrow"],
)
def test_as_of_the_recomputing_schedule(options, tied):
    lm = model(tied=tied)
    batches = [pack(units(2)), pack(units(5, seed=7)[2:])]
    found, gradients = measure(lm, batches, **options)
    expected, by_tiles = measure(lm, batches, one_pass=False, **options)
    same(found, expected, **EXACT)
    for name, gradient in by_tiles.items():
        torch.testing.assert_close(gradients[name], gradient, **EXACT)


@pytest.mark.parametrize("impl", IMPLS)
def test_backends(impl):
    lm = model(dtype=torch.float32)
    found, _ = measure(lm, [pack(units(2))], impl=impl)
    exact, _ = measure(lm.double(), [pack(units(2))], one_pass=False)
    same(found, exact, rtol=1e-4, atol=1e-6)


def test_a_factor_of_the_loss_is_divided_out():
    lm = model()
    found, _ = measure(lm, [pack(units(2))], upstream=3.0)
    expected, _ = measure(lm, [pack(units(2))], one_pass=False)
    same(found, expected, **EXACT)


def test_pairs_as_replicates():
    """Two pairs of a group are measured apart `within`; else their sum, which takes tiles again."""
    lm, batch = model(), pack(units(2, traces=2))
    with pytest.raises(ValueError, match=r"one_pass: .* groups with several pairs"):
        measure(lm, [batch])
    for within, one_pass in ((True, True), (False, None)):
        found, _ = _within(lm, batch, one_pass, within=within)
        expected, _ = _within(lm, batch, False, within=within)
        same(found, expected, **EXACT)


def _within(lm, batch, one_pass, **options):
    stats = GradStats(lm, **options)
    head = lm.get_output_embeddings()
    lm.zero_grad()
    with stats.collect(batch):
        hidden = backbone(lm)(
            input_ids=batch.tokens_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
        ).last_hidden_state[0]
        ref = torch.full((batch.num_segments,), -30.0, dtype=torch.float64)
        result = linear_bvpo_loss(hidden, head.weight, batch, ref, 0.3, one_pass=one_pass)
        result.loss.backward()
    return stats.result(), result.one_pass


def test_too_many_groups_for_the_default_take_tiles_again():
    lm, batch = model(), pack(units(5))
    assert not _within(lm, batch, None)[1]
    assert _within(lm, pack(units(4)), None)[1]
    assert one_pass_module.fits_default(2, 2**40)
    assert not one_pass_module.fits_default(4, 2**33)
