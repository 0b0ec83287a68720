"""Losses of pairs against scalar oracles written from the papers, and at their extremes."""

import inspect
import math

import pytest
import torch
from loss_cases import OPTIONS, ORACLES, fp64

from bvpo_kernels.losses import LOSSES, dpo_loss, hinge_loss, ipo_loss, kto_loss, simpo_loss

LN2 = math.log(2)


def random_inputs(name, pairs=6, seed=3):
    """fp64 arguments of a loss; margins of both signs, lengths that differ within a pair."""
    generator = torch.Generator().manual_seed(seed)
    spec = LOSSES[name]
    sides = ["chosen", "rejected"] + (["ref_chosen", "ref_rejected"] if spec.reference else [])
    inputs = {
        side: -12 * torch.rand(pairs, generator=generator, dtype=torch.float64) for side in sides
    }
    if spec.lengths:
        for side in ("chosen_lengths", "rejected_lengths"):
            inputs[side] = torch.randint(1, 9, (pairs,), generator=generator)
    if spec.kl:
        inputs["kl"] = fp64(0.4).squeeze()
    return inputs


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_pair_losses_against_scalar_oracles(name, beta):
    inputs = random_inputs(name)
    for options in ({}, OPTIONS.get(name, {})):
        options = {"gamma": 0.5} | options if name == "simpo" else options
        actual = LOSSES[name].function(**inputs, beta=beta, **options)
        for p, value in enumerate(actual.tolist()):
            one = {k: v.item() if v.ndim == 0 else v[p].item() for k, v in inputs.items()}
            assert value == pytest.approx(ORACLES[name](**one, beta=beta, **options), rel=1e-9)


def test_values_by_hand():
    """r_w = 2, r_l = -1; the numbers are from a pocket calculator."""
    scores = (fp64(-3), fp64(-5), fp64(-5), fp64(-4))
    assert dpo_loss(*scores, beta=0.5).item() == pytest.approx(0.20141327798)
    smoothed = dpo_loss(*scores, beta=0.5, label_smoothing=0.1).item()
    assert smoothed == pytest.approx(0.9 * 0.20141327798 + 0.1 * 1.70141327798)
    assert ipo_loss(*scores, beta=0.5).item() == pytest.approx((3 - 1) ** 2)
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([2])}
    assert ipo_loss(*scores, beta=0.5, **lengths).item() == pytest.approx((0.5 + 0.5 - 1) ** 2)
    assert hinge_loss(*scores, beta=0.25).item() == pytest.approx(0.25)
    assert hinge_loss(*scores, beta=0.5).item() == 0
    # -log sigma(2 (-3/4 + 5/2) - 1) = -log sigma(2.5)
    simpo = simpo_loss(scores[0], scores[1], *lengths.values(), beta=2.0, gamma=1.0).item()
    assert simpo == pytest.approx(0.07888973429)
    # z = 1: (1 - sigma(2 - 1)) = .26894, (1 - sigma(1 + 1)) = .11920
    kto = kto_loss(*scores, fp64(1).squeeze(), beta=1.0).item()
    assert kto == pytest.approx((0.26894142137 + 0.11920292202) / 2)


def test_policy_equal_to_reference():
    chosen, rejected = torch.randn(5) * 1000, torch.randn(5) * 1000
    same = (chosen, rejected, chosen, rejected)
    assert dpo_loss(*same).tolist() == [pytest.approx(LN2, rel=1e-7)] * 5
    assert dpo_loss(*same, label_smoothing=0.3).tolist() == [pytest.approx(LN2, rel=1e-7)] * 5
    assert ipo_loss(*same, beta=0.1).tolist() == [25.0] * 5
    assert hinge_loss(*same).tolist() == [1.0] * 5
    assert kto_loss(*same, torch.tensor(0.0)).tolist() == [0.5] * 5


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    inputs = random_inputs(name)
    leaves = [v.requires_grad_() for k, v in inputs.items() if v.is_floating_point() and k != "kl"]

    def function(*_):
        return LOSSES[name].function(**inputs, beta=0.3, **OPTIONS.get(name, {}))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_margins_are_finite(name, margin):
    """On long traces a sum of log-ratios reaches thousands of nats; exp of that overflows fp32."""
    inputs = {
        key: value.float() if value.is_floating_point() else torch.ones_like(value)
        for key, value in random_inputs(name, pairs=1).items()
    }
    inputs["chosen"] = torch.tensor([margin / 2]).requires_grad_()
    inputs["rejected"] = torch.tensor([-margin / 2]).requires_grad_()
    sides = inputs["chosen"], inputs["rejected"]
    for options in ({}, OPTIONS.get(name, {})):
        loss = LOSSES[name].function(**inputs, beta=2.0, **options)
        grads = torch.autograd.grad(loss.sum(), sides)
        assert loss.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)
        if name == "dpo" and margin < 0:  # the slope must not vanish where the pair is wrong
            slope = -2.0 * (1 - options.get("label_smoothing", 0.0))
            assert grads[0].item() == pytest.approx(slope)


def test_log_ratios_keep_small_differences_of_large_scores():
    """-20 000.0 against -20 000.002: subtracting the two responses first would lose this."""
    chosen, ref = torch.tensor([-20000.0]), torch.tensor([-20000.001953125])
    rejected = torch.tensor([-3.3])
    margin = 0.001953125
    loss = hinge_loss(chosen, rejected, ref, rejected, beta=1.0)
    assert loss.item() == 1 - margin


def test_kto_reference_point_is_clamped_and_constant():
    inputs = random_inputs("kto")
    below = kto_loss(**inputs | {"kl": fp64(-5.0).squeeze()})
    assert torch.equal(below, kto_loss(**inputs | {"kl": fp64(0.0).squeeze()}))
    kl = fp64(0.4).squeeze().requires_grad_()
    inputs["chosen"].requires_grad_()
    kto_loss(**inputs | {"kl": kl}).sum().backward()
    assert kl.grad is None


def test_dtypes_of_the_results():
    for name in LOSSES:
        inputs = random_inputs(name)
        assert LOSSES[name].function(**inputs).dtype == torch.float64
        single = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        assert LOSSES[name].function(**single).dtype == torch.float32


def test_options_of_the_registry_are_the_arguments_of_the_functions():
    taken = {"chosen", "rejected", "ref_chosen", "ref_rejected", "kl", "beta"}
    taken |= {"chosen_lengths", "rejected_lengths"}
    for spec in LOSSES.values():
        assert set(spec.options) == set(inspect.signature(spec.function).parameters) - taken


@pytest.mark.parametrize("name", LOSSES)
def test_bad_numbers_and_shapes_of_pair_losses(name):
    function, inputs = LOSSES[name].function, random_inputs(name)
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta: expected a finite number > 0, got"):
            function(**inputs, beta=beta)
    with pytest.raises(TypeError, match="beta: expected a number, got str"):
        function(**inputs, beta="0.1")
    with pytest.raises(ValueError, match=r"rejected: expected shape \[6\], got \[5\]"):
        function(**inputs | {"rejected": inputs["rejected"][:5]})
    with pytest.raises(ValueError, match=r"chosen: expected shape \[P\], got \[1, 6\]"):
        function(**inputs | {"chosen": inputs["chosen"][None]})
    with pytest.raises(TypeError, match=r"rejected: expected one of .*got torch.bfloat16"):
        function(**inputs | {"rejected": inputs["rejected"].bfloat16()})
    with pytest.raises(TypeError, match="chosen: expected a Tensor, got list"):
        function(**inputs | {"chosen": [0.0] * 6})
    with pytest.raises(ValueError, match="rejected: expected device cpu, got meta"):
        function(**inputs | {"rejected": inputs["rejected"].to("meta")})


def test_bad_options_of_pair_losses():
    dpo, simpo, kto, ipo = (random_inputs(name) for name in ("dpo", "simpo", "kto", "ipo"))
    for value in (-0.1, 0.5):
        with pytest.raises(ValueError, match=r"label_smoothing: expected a number in \[0, 0.5\)"):
            dpo_loss(**dpo, label_smoothing=value)
    with pytest.raises(ValueError, match="gamma: expected a finite number >= 0, got -1"):
        simpo_loss(**simpo, gamma=-1)
    with pytest.raises(ValueError, match="chosen_lengths: expected numbers >= 1, got 0"):
        simpo_loss(**simpo | {"chosen_lengths": torch.tensor([1, 2, 0, 1, 1, 1])})
    with pytest.raises(TypeError, match=r"rejected_lengths: expected one of .*got torch.float64"):
        ipo_loss(**ipo | {"rejected_lengths": ipo["chosen"]})
    with pytest.raises(ValueError, match="expected both or neither"):
        ipo_loss(**ipo | {"rejected_lengths": None})
    for name in ("desirable_weight", "undesirable_weight"):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number >= 0, got -1"):
            kto_loss(**kto, **{name: -1})
    for kl, got in ((0.1, "float"), (fp64(0.1), r"torch.float64 of \[1\]")):
        with pytest.raises(TypeError, match=f"kl: expected a 0-dim .*got {got}"):
            kto_loss(**kto | {"kl": kl})
