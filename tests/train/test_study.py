"""The study: its task, the two ways of measuring gradients against each other, and its report."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_study import make_pairs, tiny_cfg, tiny_world
from torch.nn.functional import logsigmoid

from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.mixing.traces import importance_weights
from bvpo_kernels.types import EMPTY, TRACE
from train import cli
from train.model.head import FusedHeadLM
from train.study import arms, marginal, measure, model, results, run, tables, task
from train.study.config import ARMS, NAMES, StudyConfig, chosen_arms, sized
from train.study.preferences import choose, score_all, score_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tiny_cfg(tmp_path_factory.mktemp("world"), lr=3e-3))


def test_teacher_without_slips_is_right():
    rng = np.random.default_rng(0)
    (digits,) = task.split_prompts(3, [400])
    for thinking in (True, False):
        responses = task.teach(digits, thinking, task.Teacher(slip=0.0), rng)
        assert all(
            task.is_correct(row, r, thinking) for row, r in zip(digits, responses, strict=True)
        )
    lengths = {len(r) for r in task.teach(digits, True, task.Teacher(), rng)}
    assert lengths == {task.LINE + 3, task.LONGEST}
    # All orders occur: the first digit of the trace is any of the five.
    drawn = task.teach(np.tile([1, 2, 3, 4, 5], (200, 1)), True, task.Teacher(), rng)
    assert {r[0] - task.NUMBER for r in drawn} == {1, 2, 3, 4, 5}
    wrong = task.teach(digits, True, task.Teacher(slip=0.06), rng)
    share = np.mean([task.is_correct(row, r, True) for row, r in zip(digits, wrong, strict=True)])
    assert share == pytest.approx(0.94**4, abs=0.06)


def test_prompts_are_disjoint_and_in_range():
    parts = task.split_prompts(1, [3000, 500, 200])
    seen = {tuple(row) for part in parts for row in part}
    assert len(seen) == 3700
    assert {value for row in seen for value in row} == set(range(10))
    with pytest.raises(ValueError, match="sizes: expected at most 100000"):
        task.split_prompts(0, [100_001])


@pytest.mark.parametrize(
    ("response", "thinking", "expected"),
    [
        ([20, task.CLOSE, 21, task.EOS], True, 12),
        ([20, task.CLOSE, 30, task.CLOSE, 21, task.EOS], True, 12),
        ([21, task.EOS], False, 12),
        ([21, task.EOS], True, None),
        ([20, task.CLOSE, 21], True, None),
        ([20, task.CLOSE, 21, 22, task.EOS], True, None),
        ([20, task.CLOSE, task.PLUS, task.EOS], True, None),
        ([], True, None),
    ],
)
def test_answer(response, thinking, expected):
    assert task.answer(response, thinking) == expected


def test_choice_of_a_pair():
    digits = np.array([1, 2, 3, 4, 5])

    def direct(total):
        return [task.NUMBER + total, task.EOS]

    responses = [[5], direct(14), direct(15), direct(13), [*direct(15)]]
    assert choose(digits, responses, False) == (direct(15), direct(14))
    assert choose(digits, [direct(15)] * 3, False) is None
    assert choose(digits, [[5], direct(15)], False) is None  # unfinished is not wrong


def test_samples_depend_on_the_seed_alone(world):
    drawn = model.generate(world.base, world.test_N5[:3], True, 4, 0.8, seed=5)
    torch.manual_seed(99)
    assert model.generate(world.base, world.test_N5[:3], True, 4, 0.8, seed=5) == drawn
    assert model.generate(world.base, world.test_N5[:3], True, 4, 0.8, seed=6) != drawn
    assert [len(group) for group in drawn] == [4, 4, 4]
    assert all(task.EOS not in r[:-1] and len(r) <= task.LONGEST for g in drawn for r in g)


def test_scores_are_those_of_each_row_alone(world):
    rows = marginal.marginal_rows(world.preferences.units[0], 4)
    together = score_all(world.base, rows)
    alone = torch.cat([score_rows(world.base, [row]) for row in rows]).detach()
    assert torch.allclose(together, alone, atol=1e-4)
    prompt, response = rows[0]
    logits = world.base(torch.tensor([[*prompt, *response]])).logits[0]
    logp = (logits / 0.8).log_softmax(-1)[len(prompt) - 1 : -1]
    expected = logp.gather(1, torch.tensor(response)[:, None]).sum()
    assert score_rows(world.base, rows[:1], 0.8)[0].item() == pytest.approx(expected.item(), 1e-5)


def test_marginal_margin_and_its_gradient(world):
    """Against autograd through log sum_k exp(s_k - q_k), up to the jackknife's weights."""
    unit, posterior = world.preferences.units[0], world.posterior
    torch.manual_seed(0)
    reference = posterior.reference[unit.unit_id]
    scores = (reference + 0.3 * torch.randn_like(reference)).double().requires_grad_()
    log_q = posterior.proposal[unit.unit_id].double()
    ratio = (scores - log_q).logsumexp(1) - (reference.double() - log_q).logsumexp(1)
    margin, weights, ess = marginal.margin_and_weights(scores, unit, posterior)
    assert margin.item() == pytest.approx((ratio[0] - ratio[1]).item())
    assert ess >= 1
    loss = -logsigmoid(0.1 * (ratio[0] - ratio[1]))
    (plain,) = torch.autograd.grad(loss, scores)
    (got,) = torch.autograd.grad(marginal.marginal_loss(scores, unit, posterior, 0.1), scores)
    own = importance_weights(scores.detach(), log_q)
    assert torch.allclose(got * own.weights / own.jackknife, plain, rtol=1e-6)
    assert torch.allclose(weights.sum(1), torch.ones(2).double())


def test_package_and_brute_force_measure_the_same_gradients(world):
    """`GradStats` on packed rows against autograd on padded ones, all three kinds."""
    units = world.preferences.units[:4]
    references = arms.reference_scores(world, units)
    policy = FusedHeadLM(world.base)
    head = world.base.get_output_embeddings()
    stats = GradStats(policy, cross="exact", head=head)
    measured = marginal.measure(
        policy, stats, units, world.posterior, references, 4, world.cfg.beta
    )
    assert measured.skipped == 0
    assert all(parameter.grad is None for parameter in policy.parameters())
    rows = torch.stack(
        [measure.unit_gradients(world.base, u, references[u.unit_id], world)[0] for u in units], 1
    )
    gram = measure.gram_matrix(rows.flatten(0, 1)).view(3, 4, 3, 4)
    within = torch.einsum("kblb->bkl", gram)
    assert torch.allclose(measured.gram_BKK, within, rtol=1e-3, atol=1e-3 * within.abs().max())
    sums = gram.sum((1, 3))
    assert torch.allclose(measured.sums_KK, sums, rtol=1e-3, atol=1e-3 * sums.abs().max())


def synthetic(units: int, seed: int):
    """Gradients with a known optimum: [3, M, D] of t, e and m, m the mean of t plus noise."""
    generator = torch.Generator().manual_seed(seed)
    dim, shift = 24, torch.zeros(24).double()
    shift[0] = 1.0
    t = shift + 1.5 * torch.randn(units, dim, generator=generator).double()
    e = 0.4 * shift + 0.5 * torch.randn(units, dim, generator=generator).double()
    m = shift + 0.3 * torch.randn(units, dim, generator=generator).double()
    return torch.stack([t, e, m]), dim


def test_brute_force_finds_the_known_optimum():
    batch = 8
    rows, dim = synthetic(400, 0)
    gram = torch.einsum("kmd,lnd->kmln", rows, rows)
    curve = measure.BruteForce(gram, batch, 0).curve()
    noise_t, noise_e, gap = 2.25 * dim / batch, 0.25 * dim / batch, 0.36
    exact = (gap + noise_e) / (gap + noise_e + noise_t)
    assert curve["low"] <= exact <= curve["high"]
    assert curve["argmin"] == pytest.approx(exact, abs=0.05)
    assert curve["high"] - curve["low"] < 0.2
    for a in (0.0, 0.5, 1.0):
        value = curve["mse"][curve["a"].index(a)]
        expected = a**2 * noise_t + (1 - a) ** 2 * (noise_e + gap)
        assert value == pytest.approx(expected, rel=0.12)
    assert results.curve_value(curve, 0.35) == pytest.approx(curve["mse"][7], rel=1e-9)
    moments = measure.moments_of(gram)
    assert moments["trS_t"] == pytest.approx(2.25 * dim, rel=0.05)
    assert moments["trS_te"] == pytest.approx(0, abs=0.5)
    assert moments["bias_e_sq"] == pytest.approx(gap, abs=0.05)
    assert moments["bias_t_sq"] == pytest.approx(0, abs=0.3)


def test_arms_train_on_what_they_say(world):
    by_name = {arm.name: arm for arm in ARMS}
    preferences = world.preferences

    def pairs(name):
        unit = arms.units_of(by_name[name], preferences)[0]
        return {kind: len(items) for kind, items in unit.pairs.items()}

    assert pairs("a=.5") == {TRACE: 1, EMPTY: 1}
    assert pairs("a* marginal") == {TRACE: 1, EMPTY: 1}
    assert pairs("a=1") == {TRACE: 1}
    assert pairs("a=0") == {EMPTY: 1}
    assert pairs("K=4") == {TRACE: 4}
    assert pairs("DPO 2x") == {TRACE: 1}
    assert len(arms.units_of(by_name["DPO 2x"], preferences)) == 2 * len(preferences.units)
    steps = {
        name: arms.ArmTrainer(world, by_name[name]).plan[0].pair_counts
        for name in ("a=.5", "DPO 2x")
    }
    assert sum(steps["a=.5"].values()) == sum(steps["DPO 2x"].values())


@pytest.mark.parametrize("name", ["a* trace", "a* marginal"])
def test_measured_weights_are_lagged(world, name):
    arm = next(arm for arm in ARMS if arm.name == name)
    trainer = arms.ArmTrainer(world, arm)
    weights, estimates, determined = [], [], []
    for number in range(4):
        line = trainer.step(number)
        weights.append(line["alpha"])
        estimates.append(line.get("alpha_next"))
        determined.append(line.get("alpha_determined"))
    assert weights[0] == 0.5 or name == "a* marginal"
    low, high = trainer.alpha.clip
    if name == "a* trace":  # the weight of a step is the estimate after the step before
        assert weights[1] == 0.5
        assert weights[3] == estimates[2]
        assert low <= weights[3] <= high
        assert (weights[3] != 0.5) == determined[2]


def test_first_losses_are_log_two(world):
    for name in ("a=0", "a=.5", "a* trace", "DPO 2x", "K=4"):
        arm = next(arm for arm in ARMS if arm.name == name)
        assert arms.ArmTrainer(world, arm).step(0)["loss"] == pytest.approx(math.log(2), abs=1e-5)
    losses = arms.Probe(world).losses(world.base)
    assert losses == pytest.approx(dict.fromkeys((TRACE, EMPTY, MARGINAL), math.log(2)), abs=1e-5)


CHOSEN = ("a=.5", "a* trace", "a* marginal", "SimPO 2x", "KTO 2x")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds of a study from end to end."""
    out = tmp_path_factory.mktemp("study")
    cfg = tiny_cfg(out, seeds=(0, 1), arms=CHOSEN, report=str(out / "report"))
    for seed in cfg.seeds:
        make_pairs(cfg, seed, out / f"seed{seed}" / "pairs.json")
    run.run(cfg)
    return cfg


def test_report(finished):
    folder = Path(finished.report)
    text = (folder / "report.md").read_text()
    names = {path.name for path in folder.iterdir()}
    figures = {f"{name}.png" for name in ("accuracy", "error", "variances", "weights", "losses")}
    assert figures <= names
    assert all(f"({name})" in text for name in figures)
    for name in CHOSEN:
        assert f"| {name} " in text
    assert "seeds 0, 1; commit" in text
    for name in ("accuracy", "optimum", "curves", "training", "probes"):
        rows = list(csv.DictReader((folder / f"{name}.csv").open()))
        assert rows
    rows = list(csv.DictReader((folder / "accuracy.csv").open()))
    assert [row["arm"] for row in rows] == ["base model", *CHOSEN]


def test_a_finished_study_is_not_run_again(finished, monkeypatch):
    for name in ("train_sft", "run_arm", "measure_checkpoint", "evaluate"):
        monkeypatch.setattr(run, name, None)
    run.run(finished)


def test_results_of_other_settings_are_refused(finished):
    other = tiny_cfg(Path(finished.out), seeds=(0, 1), arms=CHOSEN, lr=0.5)
    with pytest.raises(ValueError, match=r"holds results of other settings: lr: expected 0\.0001"):
        run.run(other)


def test_a_killed_arm_is_run_again_and_gives_the_same(finished):
    path = Path(finished.out) / "seed1" / "arm-astar_trace.json"
    before = json.loads(path.read_text())
    path.unlink()
    run.run(finished)
    after = json.loads(path.read_text())
    assert [line["loss"] for line in after["log"]] == [line["loss"] for line in before["log"]]
    assert after["evaluation"] == before["evaluation"]


def outcome(name: str, seed: int, solved: np.ndarray, loss: float) -> dict:
    evaluation = {
        mode: {
            "accuracy": float(solved.mean()),
            "answered": 1.0,
            "trace_length": 20.0,
            "bits": np.packbits(solved.astype(bool)).tobytes().hex(),
        }
        for mode in results.MODES
    }
    probe = [
        {"step": step, TRACE: value + 0.1, EMPTY: value - 0.1, MARGINAL: 0.7}
        for step, value in ((0, math.log(2)), (10, 0.65), (20, loss))
    ]
    log = [{"step": 1, "alpha": 0.5, "loss": 0.6, "grad_norm": 1.0}]
    return {
        "arm": name,
        "seed": seed,
        "log": log,
        "probe": probe,
        "evaluation": evaluation,
        "pairs_per_step": 8,
        "seconds": {"train": 1.0, "all": 2.0},
    }


@pytest.mark.parametrize("gain", [40, -40, 1])
def test_differences_and_steps_to_a_loss(gain):
    prompts, seeds = 200, (0, 1, 2)
    base = np.arange(prompts) < 100
    other = np.arange(prompts) < 100 + gain
    by_arm = {
        "a=.5": {s: outcome("a=.5", s, base, 0.6) for s in seeds},
        "a* trace": {s: outcome("a* trace", s, other, 0.62) for s in seeds},
    }
    made = results.Results({s: outcome("base", s, base, 0.69) for s in seeds}, by_arm, {}, prompts)
    change = results.difference(made, "a* trace", "a=.5", "thinking")
    assert change is not None
    assert change.shown(100).startswith(f"{gain / 2:.1f} [")
    p = abs(gain) / prompts
    half = 1.96 * math.sqrt(p * (1 - p) / (prompts - 1) / 3)
    assert change.high - change.mean == pytest.approx(half, rel=1e-6)
    # The fixed loss is half-way from log 2 to .6: interpolated between the probes around it.
    target = (math.log(2) + 0.6) / 2
    assert results.target_loss(made, 0) == pytest.approx(target)
    expected = (
        10 * (math.log(2) - target) / (math.log(2) - 0.65)
        if target > 0.65
        else (10 + 10 * (0.65 - target) / (0.65 - 0.62))
    )
    assert results.steps_to_loss(made, "a* trace", 0) == pytest.approx(expected)
    by_arm["a=.5"][1]["probe"] = [{"step": 0, TRACE: 0.7, EMPTY: 0.7, MARGINAL: 0.7}]
    assert results.target_loss(made, 1) is None
    for run_file in by_arm["a* trace"].values():
        run_file["probe"][-1][EMPTY] = run_file["probe"][1][EMPTY] = 0.9
    assert results.steps_to_loss(made, "a* trace", 0) == math.inf
    assert "not reached" in tables.to_markdown(tables.markdown_accuracy(made))


def test_command_line():
    command, cfg = cli.parse(["study", "--quick", "--seeds", "[3]"])
    assert (command, cfg.quick, cfg.seeds) == ("study", True, (3,))
    assert sized(cfg).steps < StudyConfig().steps
    with pytest.raises(ValueError, match="arms: expected names of"):
        chosen_arms(StudyConfig(arms=("a=.6",)))
    assert [arm.name for arm in chosen_arms(StudyConfig())] == list(NAMES)
