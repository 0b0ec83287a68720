"""The loop with a measured mixing weight."""

from itertools import pairwise

import pytest
import torch
from tiny_runs import make_cfg, make_trainer, make_units, read_lines, tiny_model
from transformers import Qwen3Config

from bvpo_kernels.mixing import AlphaEstimator, StepStats, alpha_star, unbiased
from train.alpha import FixedAlpha, build_alpha, build_stats, describe
from train.config import AlphaConfig, EstimateConfig
from train.runtime import report


def estimated(tmp_path, **options):
    cfg = make_cfg(tmp_path, max_steps=5, units_per_step=4)
    cfg.alpha = AlphaConfig(estimate=EstimateConfig(**{"warmup": 2, **options}))
    return cfg


def unit_gradients(trainer, units, step):
    """Gradient of each unit's own loss per kind, [B, 2, parameters], fp64, one backward each."""
    policy = trainer.policy
    rows = []
    for unit in units:
        pair = []
        for kind in ("trace", "empty"):
            micro = next(m for m in step.micro_batches if unit.unit_id in m.batch.unit_ids)
            single = trainer.objective.scores(micro)
            index = micro.batch.kinds.index(kind)
            mine = (micro.batch.pair_kind_P == index) & (
                micro.batch.group_unit_G[micro.batch.pair_group_P]
                == micro.batch.unit_ids.index(unit.unit_id)
            )
            reference = trainer.objective.reference.scores(micro.units)
            margin = (single - reference).view(-1, 2) @ torch.tensor([1.0, -1.0])
            loss = -torch.nn.functional.logsigmoid(trainer.cfg.loss.beta * margin[mine]).sum()
            grads = torch.autograd.grad(loss, list(policy.parameters()))
            pair.append(torch.cat([g.flatten().double() for g in grads]))
        rows.append(torch.stack(pair))
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [160, 4000], ids=["several micro-batches", "one"])
def test_statistics_of_a_step_are_those_of_single_units(tmp_path, tokens):
    """Scales, alpha and accumulation undone: the Gram matrix of the per-unit gradients."""
    cfg = estimated(tmp_path, cross="exact")
    cfg.train.tokens_per_micro_batch = tokens
    trainer = make_trainer(cfg, make_units(4))
    step = trainer.plan[0]
    assert (len(step.micro_batches) > 1) == (tokens == 160)
    units = [unit for micro in step.micro_batches for unit in micro.units]
    grads = unit_gradients(trainer, units, step)
    seen = {}
    trainer.alpha.update = lambda stats: seen.update(stats=stats)
    trainer.train_step(0)
    stats = seen["stats"]
    gram = torch.einsum("bkp,blp->bkl", grads, grads)
    scale = gram.diagonal(dim1=1, dim2=2).sqrt()
    close = 1e-4 * scale[:, :, None] * scale[:, None, :]
    assert ((stats.gram_BKK - gram).abs() <= close).all()
    sums = grads.sum(0)
    torch.testing.assert_close(stats.sums_KK, sums @ sums.T, rtol=1e-4, atol=1e-6)
    assert alpha_star(unbiased(stats)).raw == pytest.approx(
        alpha_star_by_hand(grads[:, 0], grads[:, 1]), rel=1e-3
    )


def alpha_star_by_hand(t, e):
    """1 - q / (B |d|^2) from raw gradients (reference = trace)."""
    d = t - e
    size = len(t)
    q = ((t * d).sum() - t.sum(0) @ d.sum(0) / size) / (size - 1)
    return float(1 - q / (size * d.mean(0).square().sum()))


@pytest.mark.parametrize("mode", ["exact", "sketch", "norm"])
def test_run_measures_and_uses_the_weight(tmp_path, mode, capsys):
    cfg = estimated(tmp_path, mode=mode)
    trainer = make_trainer(cfg, make_units(12), make_units(2, seed=3))
    trainer.run()
    lines = [line for line in read_lines(tmp_path) if line["event"] == "train"]
    assert [line["alpha"] for line in lines[:2]] == [0.5, 0.5]
    # The weight of a step is what the step before had estimated.
    for before, line in pairwise(lines[1:]):
        assert line["alpha"] == before["alpha_next"]
    determined = [line for line in lines[1:] if line["alpha_determined"]]
    for line in determined:
        weight = 0.5 + line["alpha_credibility"] * (line["alpha_raw"] - 0.5)
        assert line["alpha_next"] == pytest.approx(min(max(weight, 0.02), 0.98))
    for line in lines[1:]:
        whole = (line["alpha_lo"], line["alpha_hi"]) == (0, 1)
        assert line["alpha_determined"] == (not whole)
        assert not whole or line["alpha_next"] == 0.5
    for line in lines:
        assert line["trS_t"] > 0
        assert line["alpha_lo"] <= line["alpha_star"] <= line["alpha_hi"]
    assert (tmp_path / "report.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    last = lines[-1]
    star = (
        f"a* = {last['alpha_star']:.3f},"
        if last["alpha_determined"]
        else "a* is not determined by these steps:"
    )
    interval = f"95 % interval [{last['alpha_lo']:.3f}, {last['alpha_hi']:.3f}]"
    assert f"{star} {interval}, for batches of 4 units\n" in printed
    assert (
        f"weight {'is' if last['alpha_determined'] else 'stays at'} {last['alpha_next']:.3f}"
        in printed
    )
    coverage = trainer.stats.coverage
    assert (coverage.share == 1.0) == (mode != "norm")
    assert f"mode {mode!r}" in printed
    assert f"over {coverage.covered} of {coverage.trained} trained parameters" in printed
    assert (", a proxy" in printed) == (mode == "norm")


def test_summary_compares_the_errors():
    """MSE(a) = 1 - a + a^2 is 3/4 at 1/2 and 1 at both ends; a negative estimate says nothing."""
    log = {
        "alpha_star": 0.5,
        "trS_t": 1.0,
        "trS_e": 1.0,
        "trS_te": 0.0,
        "delta_sq": 0.1,
        "mse_0": 1.0,
        "mse_1": -1.0,
        "mse_2": 1.0,
    }
    text = report.alpha_summary(log, 8)
    assert "error of the gradient at a*: 0.750 x a = 0, 1.000 x a = 1/2, 0.750 x a = 1\n" in text
    assert "error of" not in report.alpha_summary({**log, "mse_0": 0.2}, 8)
    assert report.alpha_summary({}, 8) == ""


def noisy_log(steps, seed=0, units=2, **options):
    """Steps of units whose traces have nothing but noise, as much of it as the empties."""
    generator = torch.Generator().manual_seed(seed)
    alpha = AlphaEstimator(**{"warmup": 0} | options)
    for _ in range(steps):
        g_BKD = torch.randn(units, 2, 3, generator=generator, dtype=torch.float64)
        gram = torch.einsum("ikd,jld->ijkl", g_BKD, g_BKD)
        alpha.update(StepStats.from_unit_gram(("trace", "empty"), gram))
    return alpha.log()


def test_summary_says_what_is_not_determined():
    log = noisy_log(4)
    assert (log["alpha_lo"], log["alpha_hi"]) == (0, 1)
    text = report.alpha_summary(log, 2)
    assert text.startswith(
        "a* is not determined by these steps: 95 % interval [0.000, 1.000], for batches of 2 units"
        "\n  the weight stays at 0.500 after 8 units; about "
    )
    assert f"about {log['alpha_units_needed']:.0f} more units are needed\n" in text
    assert "a* =" not in text
    assert "error of the gradient" not in text
    few = report.alpha_summary(noisy_log(2), 2)
    assert "0.500 after 4 units; no error is known yet: it takes four steps" in few
    log.pop("alpha_units_needed")
    assert "more are needed than ema_halflife holds" in report.alpha_summary(log, 2)


def test_summary_says_where_the_weight_is():
    log = noisy_log(400, units=4, ema_halflife=100.0)
    assert log["alpha_determined"] == 1
    share = f"{100 * log['alpha_credibility']:.0f} %"
    text = report.alpha_summary(log, 4)
    assert f"  the next weight is {log['alpha_next']:.3f}: the data count for {share}\n" in text
    warm = report.alpha_summary(noisy_log(400, units=4, ema_halflife=100.0, warmup=403), 4)
    assert "  the weight stays at 0.500 for 3 more steps of warm-up\n" in warm


def test_summary_has_words_for_what_is_below_zero():
    """|Delta|^2 is estimated without bias, so it may be negative; B_mix is infinite then."""
    log = next(log for log in (noisy_log(20, seed=n) for n in range(9)) if log["delta_sq"] < 0)
    assert "B_mix" not in log
    text = report.alpha_summary(log, 2)
    assert "B_mix = not known: noise hides the mean difference\n" in text
    assert "|mean difference|^2 not above 0 within its noise\n" in text
    for word in ("inf", "nan"):
        assert word not in text.split("kappa =")[1]
    shown = report.alpha_summary({**log, "delta_sq": 0.25, "B_mix": 8.0}, 2)
    assert "B_mix = 8.0 units\n" in shown
    assert "|mean difference|^2 0.25\n" in shown


def test_measuring_does_not_change_the_training(tmp_path):
    """During warm-up a = 0.5: gradients, hence weights, are those of a fixed 0.5."""
    results = []
    for name, alpha in {
        "fixed": AlphaConfig(fixed=0.5),
        "measured": AlphaConfig(estimate=EstimateConfig(warmup=99)),
    }.items():
        cfg = make_cfg(tmp_path / name)
        cfg.alpha = alpha
        trainer = make_trainer(cfg, make_units(8))
        for step in range(2):
            trainer.train_step(step)
        results.append({k: v.detach().clone() for k, v in trainer.policy.named_parameters()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_weights_that_cannot_be_measured():
    """The advice of the refusal can be followed, and the summary says what it left out."""
    model = tiny_model(Qwen3Config)
    model.gain = torch.nn.Parameter(torch.ones(5))
    head = model.get_output_embeddings()
    with pytest.raises(ValueError, match=r"cannot measure \['gain'\].*alpha.estimate.strict"):
        build_stats(AlphaConfig(estimate=EstimateConfig()), model, head, 0)
    stats = build_stats(AlphaConfig(estimate=EstimateConfig(strict=False)), model, head, 0)
    trained = sum(p.numel() for p in model.parameters())
    assert f"over {trained - 5} of {trained} trained parameters" in describe(stats)


def test_sources():
    assert isinstance(build_alpha(AlphaConfig(fixed=0.3)), FixedAlpha)
    with pytest.raises(ValueError, match=r"alpha.fixed: .*got 1.5"):
        build_alpha(AlphaConfig(fixed=1.5))
    assert [build_alpha(AlphaConfig(fixed=a)).value() for a in (0.0, 1.0)] == [0.0, 1.0]
    for options in ({"clip": (0.0, 0.9)}, {"clip": (0.1, 1.0)}, {"initial": 1.0}):
        with pytest.raises(ValueError, match=f"alpha.estimate.{next(iter(options))}: expected"):
            build_alpha(AlphaConfig(estimate=EstimateConfig(**options)))
