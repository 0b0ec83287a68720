"""Units that lack a kind, in a run with a measured weight: trained on, counted, not measured."""

import json
import math

import pytest
import torch
from test_alpha import unit_gradients
from tiny_runs import lacking, make_cfg, make_trainer, make_units, read_lines

from bvpo_kernels import bvpo_loss, pack
from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.types import Unit
from train.config import AlphaConfig, EstimateConfig
from train.steps import lacks_a_kind, make_step
from train.trace_sum import check_traces
from train.trainer import first_loss


def estimated(tmp_path, **options):
    cfg = make_cfg(tmp_path, max_steps=4, units_per_step=4)
    cfg.alpha = AlphaConfig(estimate=EstimateConfig(**{"warmup": 2, **options}))
    return cfg


def some_lacking(count, every=3, kind="empty"):
    units = make_units(count)
    return [lacking(unit, kind) if n % every == 0 else unit for n, unit in enumerate(units)]


def names(units):
    return [unit.unit_id for unit in units]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("budget", [70, 4000])
def test_every_rank_has_the_same_places(ranks, budget):
    """Each call of the model and each collection is a collective of all ranks."""
    units = some_lacking(10)
    steps = [make_step(units, budget, 0.0, rank, ranks, measured=True) for rank in range(ranks)]
    for places in zip(*(step.micro_batches for step in steps), strict=True):
        assert len({micro.measured for micro in places}) == 1
        assert not all(micro.is_filler for micro in places)
    micros = [micro for step in steps for micro in step.micro_batches]
    assert sorted(n for m in micros for n in names(m.units)) == sorted(names(units))
    for micro in micros:
        assert all(lacks_a_kind(unit) is not micro.measured for unit in micro.units)
    alone = make_step(units, budget, measured=True)
    assert {tuple(names(m.units)) for m in micros} - {()} == {
        tuple(names(m.units)) for m in alone.micro_batches
    }
    assert alone.fill == alone.num_tokens / budget / len(alone.micro_batches)
    together = make_step(units, budget)
    assert all(micro.measured for micro in together.micro_batches)
    assert len(together.micro_batches) <= len(alone.micro_batches)


@pytest.mark.parametrize("cross", ["sketch", "exact"])
@pytest.mark.parametrize("kind", ["trace", "empty"])
def test_statistics_are_those_of_the_complete_units(tmp_path, cross, kind):
    """Their own gradients, although the loss of a kind is divided by fewer pairs than units."""
    cfg = estimated(tmp_path, cross=cross)
    trainer = make_trainer(cfg, some_lacking(8, 3, kind))
    number = next(n for n in range(4) if trainer.plan[n].num_lacking == 1)
    step, seen = trainer.plan[number], {}
    units = [unit for m in step.micro_batches if m.measured for unit in m.units]
    assert len(units) == 3
    grads = unit_gradients(trainer, units, step)
    trainer.alpha.update = lambda stats: seen.update(stats=stats)
    trainer.train_step(number)
    stats = seen["stats"]
    assert (stats.num_units, stats.skipped) == (3, 1)
    gram = torch.einsum("bkp,blp->bkl", grads, grads)
    scale = gram.diagonal(dim1=1, dim2=2).sqrt()
    assert ((stats.gram_BKK - gram).abs() <= 1e-4 * scale[:, :, None] * scale[:, None, :]).all()
    if cross == "exact":
        sums = grads.sum(0)
        torch.testing.assert_close(stats.sums_KK, sums @ sums.T, rtol=1e-4, atol=1e-6)


def test_training_is_that_of_an_unmeasured_run(tmp_path):
    weights, lines = [], []
    for name, alpha in {
        "fixed": AlphaConfig(fixed=0.5),
        "measured": AlphaConfig(estimate=EstimateConfig(warmup=9)),
    }.items():
        cfg = make_cfg(tmp_path / name, max_steps=3)
        cfg.alpha = alpha
        trainer = make_trainer(cfg, some_lacking(9))
        lines.append([trainer.train_step(step) for step in range(3)])
        weights.append({k: v.detach() for k, v in trainer.policy.named_parameters()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for fixed, measured in zip(*lines, strict=True):
        for key in ("loss", "grad_norm", "trace/loss", "empty/rewards/margins"):
            assert measured[key] == pytest.approx(fixed[key], rel=1e-4, abs=1e-6)


def test_run_counts_them_in_the_log(tmp_path):
    """Some steps have no complete unit, or one: nothing is measured there, and the run goes on."""
    units = [lacking(u, "trace") if n >= 5 else u for n, u in enumerate(make_units(14))]
    cfg = estimated(tmp_path, warmup=1)
    cfg.train.max_steps, cfg.train.units_per_step = 7, 2
    trainer = make_trainer(cfg, units)
    complete = list(trainer.plan.complete_units())
    assert {0, 1, 2} <= set(complete)
    trainer.run()
    lines = [line for line in read_lines(tmp_path) if line["event"] == "train"]
    assert [line["units_lacking_a_kind"] for line in lines] == [2 - count for count in complete]
    # In all so far, by the estimator: units, and steps with less than two left.
    for number, line in enumerate(lines, 1):
        assert line["units_skipped"] == sum(2 - count for count in complete[:number])
        assert line["stats_skipped"] == sum(count < 2 for count in complete[:number])
    assert lines[-1]["trS_t"] > 0


def test_extra_traces_of_a_unit_that_lacks_a_kind_are_not_read(tmp_path):
    cfg = estimated(tmp_path, reference=MARGINAL)
    extra = make_units(1, seed=4)[0].pairs["trace"] * 2
    units = [Unit(u.unit_id, {**u.pairs, MARGINAL: extra}) for u in make_units(4)]
    units[1] = lacking(units[1], "empty")
    units[2] = lacking(lacking(units[2], "empty"), MARGINAL)  # no reason to refuse the file
    found = check_traces(units, cfg)
    assert [MARGINAL in unit.pairs for unit in found] == [True, False, False, True]
    trainer = make_trainer(cfg, found)
    seen = {}
    trainer.alpha.update = lambda stats: seen.update(stats=stats)
    trainer.train_step(0)
    assert (seen["stats"].num_units, seen["stats"].skipped) == (2, 2)
    with pytest.raises(ValueError, match=r"every measured unit .* in 1 of 2: \['unit-3'\]"):
        check_traces([*found[:3], lacking(units[3], MARGINAL)], cfg)


def test_a_mean_is_divided_by_the_units_that_have_the_kind():
    units = make_units(4)
    batch = pack([lacking(units[0], "empty"), *units[1:]])
    scores_S = torch.zeros(batch.num_segments)
    scale = bvpo_loss(scores_S, scores_S, batch, 0.25).kind_scale
    assert {k: float(v) for k, v in scale.items()} == {"trace": 0.0625, "empty": 0.25}


@pytest.mark.parametrize(
    ("absent", "alpha", "said"),
    [
        (None, 0.3, "first loss 0.6931 (log 2 = 0.6931)"),
        ("empty", 0.3, "first loss 0.2079 (0.3 log 2 = 0.2079; no unit of the step has kind 'empt"),
        ("trace", 0.3, "first loss 0.4852 (0.7 log 2 = 0.4852; no unit of the step has kind 'trac"),
        ("empty", 1.0, "first loss 0.6931 (log 2 = 0.6931)"),
    ],
)
def test_the_first_loss_is_beside_what_it_should_be(tmp_path, capsys, absent, alpha, said):
    units = make_units(4) if absent is None else [lacking(u, absent) for u in make_units(4)]
    cfg = make_cfg(tmp_path, max_steps=1)
    cfg.alpha.fixed = alpha
    make_trainer(cfg, units).run()
    assert said in capsys.readouterr().out


def test_the_first_loss_of_a_step_where_some_lack_a_kind_is_log_2():
    step = make_step(some_lacking(4), 4000)
    assert first_loss(math.log(2), 0.5, step) == "first loss 0.6931 (log 2 = 0.6931)"


def test_the_log_is_json_without_nan(tmp_path):
    """A run whose held-out units all lack a kind."""
    units = some_lacking(6, 1, "empty")
    cfg = make_cfg(tmp_path, max_steps=1)
    make_trainer(cfg, units[:4], units[4:]).run()
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert "empty/loss" not in json.loads(line)
