"""The loop with extra traces that measure a* against the marginal gradient."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import make_cfg, make_trainer, make_units, read_lines

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.mixing.traces import importance_weights
from bvpo_kernels.packing import pack
from bvpo_kernels.types import EMPTY, KINDS, TRACE, TokenPair
from train.config import AlphaConfig, EstimateConfig
from train.trace_sum import check_traces, marginal_loss, without_extra

TRACES = 3


def traced_units(count, traces=TRACES):
    """Each unit with further traces, its own pair's among them."""
    units = make_units(count)
    extra = make_units(count * traces, seed=9)
    return [
        replace(
            unit,
            pairs={
                **unit.pairs,
                MARGINAL: (
                    unit.pairs[TRACE][0],
                    *(extra[n * traces + k].pairs[TRACE][0] for k in range(traces - 1)),
                ),
            },
        )
        for n, unit in enumerate(units)
    ]


def estimated(tmp_path, **options):
    cfg = make_cfg(tmp_path, max_steps=3, units_per_step=4, tokens_per_micro_batch=700)
    settings = {"warmup": 1, "reference": MARGINAL, "mode": "exact", **options}
    cfg.alpha = AlphaConfig(estimate=EstimateConfig(**settings))
    return cfg


def test_loss_and_gradient():
    """Value at log mean exp of the ratios; gradient through the jackknifed weights."""
    pair = TokenPair((1,), (2, 3), (4,))
    units = [
        replace(unit, pairs={MARGINAL: (pair,) * n})
        for unit, n in zip(make_units(2), (3, 5), strict=True)
    ]
    batch = pack(units, kinds=(MARGINAL,))
    torch.manual_seed(0)
    scores_S = torch.randn(16, dtype=torch.float64, requires_grad=True)
    reference_S = torch.randn(16, dtype=torch.float64)
    result = marginal_loss(scores_S, reference_S, batch, "dpo", {"beta": 0.7})
    result.total.backward()
    ratio = (scores_S - reference_S).detach().view(-1, 2)
    value, gradient = 0.0, torch.zeros(8, 2, dtype=torch.float64)
    for unit, rows in enumerate((slice(0, 3), slice(3, 8))):
        sides = ratio[rows].T
        margin = 0.7 * (sides.logsumexp(1) - math.log(sides.shape[1])).diff().neg()
        value -= torch.nn.functional.logsigmoid(margin).item()
        weights = importance_weights(sides, torch.zeros_like(sides))
        slope = -0.7 * torch.sigmoid(-margin)
        gradient[rows] = (slope * weights.jackknife * torch.tensor([[1.0], [-1.0]])).T
        assert result.ess[f"unit-{unit}"] == pytest.approx(weights.ess.min().item())
    assert result.total.item() == pytest.approx(value)
    torch.testing.assert_close(scores_S.grad.view(-1, 2), gradient)


def test_statistics_of_the_marginal_kind(tmp_path):
    """At the first step the weights are equal: the gradient is that of the mean score."""
    trainer = make_trainer(estimated(tmp_path), traced_units(4))
    seen = {}
    trainer.alpha.update = lambda stats: seen.update(stats=stats)
    unit, micro = trainer.plan[0].units[0], trainer.plan[0].micro_batches[0]
    scores_S = trainer.objective.scores(micro)
    index = micro.batch.unit_ids.index(unit.unit_id)
    kind_P, unit_P = micro.batch.pair_kind_P, micro.batch.group_unit_G[micro.batch.pair_group_P]
    mine_P = (kind_P == micro.batch.kinds.index(MARGINAL)) & (unit_P == index)
    margin = scores_S.view(-1, 2)[mine_P].mean(0)
    loss = -0.5 * trainer.cfg.loss.beta * (margin[0] - margin[1])
    gradients = torch.autograd.grad(loss, list(trainer.policy.parameters()))
    norm_sq = sum(g.double().square().sum() for g in gradients).item()
    trainer.train_step(0)
    stats = seen["stats"]
    assert stats.kinds == (*KINDS, MARGINAL)
    place = [name for m in trainer.plan[0].micro_batches for name in m.batch.unit_ids]
    measured = stats.gram_BKK[place.index(unit.unit_id), 2, 2].item()
    assert measured == pytest.approx(norm_sq, rel=1e-4)
    assert stats.ess_B.tolist() == pytest.approx([TRACES] * 4)


def test_run_measures_and_does_not_train_on_it(tmp_path):
    results = []
    for name, options in (("marginal", {}), ("trace", {"reference": TRACE})):
        cfg = estimated(tmp_path / name, warmup=9, **options)
        units = check_traces(traced_units(8), cfg)
        trainer = make_trainer(cfg, units, [without_extra(u) for u in make_units(2, seed=3)])
        trainer.run()
        lines = [line for line in read_lines(tmp_path / name) if line["event"] == "train"]
        results.append(
            ({k: v.detach().clone() for k, v in trainer.policy.named_parameters()}, lines)
        )
    (ours, lines), (plain, others) = results
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert line["ess"] > 2
        assert "bias_t_sq" in line
        assert not any(key.startswith("marginal/") for key in line)


def test_batch_target_counts_the_traces_own_noise(tmp_path):
    cfg = estimated(tmp_path, reference=TRACE, target="batch")
    extra = make_units(8, seed=5)
    units = [
        replace(u, pairs={**u.pairs, TRACE: (*u.pairs[TRACE], *v.pairs[TRACE])})
        for u, v in zip(make_units(8), extra, strict=True)
    ]
    trainer = make_trainer(cfg, check_traces(units, cfg))
    seen = {}
    update = trainer.alpha.update
    trainer.alpha.update = lambda stats: (seen.update(stats=stats), update(stats))
    trainer.train_step(0)
    within = seen["stats"].within_BKK
    assert (within[:, 0, 0] > 0).all()
    assert within[:, 1].eq(0).all()
    assert "alpha_star" in trainer.alpha.log()


@pytest.mark.parametrize(
    ("options", "loss", "units", "match"),
    [
        ({}, "dpo", make_units(2), "at least 2 pairs of kind 'marginal'.*2 of 2.*unit-0"),
        ({}, "dpo", traced_units(2, 1), "kind 'marginal'"),
        ({}, "ipo", traced_units(2), "loss.name.*'ipo'"),
        ({"cross": "exact"}, "dpo", traced_units(2), "cross 'sketch'"),
        ({"target": "batch"}, "dpo", traced_units(2), "target 'population'"),
        ({"reference": TRACE, "target": "batch"}, "dpo", make_units(2), "kind 'trace'"),
        ({"reference": TRACE, "target": "batch", "mode": "norm"}, "dpo", make_units(2), "'exact'"),
    ],
)
def test_refusals(tmp_path, options, loss, units, match):
    cfg = estimated(tmp_path, **options)
    cfg.loss.name = loss
    with pytest.raises(ValueError, match=match):
        check_traces(units, cfg)


def test_extra_traces_are_dropped_where_they_are_not_asked_for(tmp_path):
    cfg = estimated(tmp_path, reference=TRACE)
    assert all(set(unit.pairs) == {TRACE, EMPTY} for unit in check_traces(traced_units(2), cfg))
