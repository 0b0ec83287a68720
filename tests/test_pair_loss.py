"""`linear_bvpo_loss`: gradients formed with the scores, against naive code in fp64."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from pair_loss_cases import Case, call, compare, run, units
from test_logprobs import IMPLS

from bvpo_kernels import Unit, bvpo_loss, linear_bvpo_loss, linear_logprobs, ops, pack, segment_sum
from bvpo_kernels.backends import one_pass
from bvpo_kernels.backends.slopes import SLOPES
from bvpo_kernels.head.cost import HeadShape, one_pass_bytes
from bvpo_kernels.losses import LOSSES

PAIRS = tuple(SLOPES)
OPTIONS = {
    "dpo": {"label_smoothing": 0.2},
    "simpo": {"gamma": 1.5, "beta": 2.0},
    "ipo": {"beta": 0.7},
}


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def least_workspace(case, impl, rows):
    """Room for the tiles and the logits of so few rows: many chunks."""
    shape = HeadShape(case.pack().num_tokens, case.dim, case.vocab, case.rank)
    weight = "weight" in case.trained
    return one_pass_bytes(shape, case.dtype, impl, weight=weight, tiles=2, rows=rows).total


@pytest.mark.parametrize("loss", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_loss_and_dtype(impl, loss, dtype):
    if dtype == torch.float64 and impl != "eager":
        pytest.skip("fp64 is eager's")
    compare(Case(dtype, loss=loss, options=OPTIONS.get(loss, {})), impl)


@pytest.mark.parametrize("loss", PAIRS)
def test_the_slope_of_a_loss_is_its_derivative(loss):
    spec, options = LOSSES[loss], {"beta": 0.7, **OPTIONS.get(loss, {})}
    chosen = torch.linspace(-9, 9, 41, dtype=torch.float64).requires_grad_()
    sides = {"chosen": chosen, "rejected": torch.zeros_like(chosen)}
    if spec.reference:
        sides |= {f"ref_{name}": torch.zeros_like(chosen) for name in ("chosen", "rejected")}
    if spec.lengths:
        ones = torch.ones(41, dtype=torch.int64)
        sides |= {"chosen_lengths": ones, "rejected_lengths": ones}
    spec.function(**sides, **options).sum().backward()
    slope = SLOPES[loss](chosen.detach(), **options)
    torch.testing.assert_close(slope, chosen.grad, rtol=1e-13, atol=1e-15)


def test_losses_of_a_margin_are_those_that_have_a_slope():
    """Moving both scores of a pair alike changes no other loss."""
    for name, spec in LOSSES.items():
        values = {"chosen": torch.tensor([-3.0]), "rejected": torch.tensor([-4.5])}
        if spec.reference:
            values |= {"ref_chosen": torch.tensor([-3.5]), "ref_rejected": torch.tensor([-3.9])}
        if spec.lengths:
            values |= {f"{side}_lengths": torch.tensor([2]) for side in ("chosen", "rejected")}
        fixed = {"kl": torch.tensor(0.3)} if spec.kl else {}
        moved = {n: v + 1.0 if n in ("chosen", "rejected") else v for n, v in values.items()}
        same = torch.equal(
            spec.function(**values, **fixed, beta=0.3), spec.function(**moved, **fixed, beta=0.3)
        )
        assert same == (name in SLOPES), name


def _masked(batch):
    """Some tokens of a response, and all of another, are not scored after all."""
    target_T = batch.target_T.clone()
    target_T[5:12] = target_T[slice(*batch.cu_seqlens[2:4].tolist())] = -100
    return dataclasses.replace(batch, target_T=target_T)


HEADS = {
    "masked": Case(batch=_masked(pack(units(301)))),
    "bias": Case(bias=True),
    "cap": Case(bias=True, options={"softcap": 5.0, "temperature": 0.7}),
    "lora": Case(rank=3, trained=("hidden", "low", "lora_b")),
    "lora and weight": Case(rank=3, bias=True),
    "frozen hidden": Case(trained=("weight",)),
    "bias alone": Case(bias=True, trained=("hidden", "bias")),
    "sharp": Case(scale=6.0),
    "two pairs": Case(batch=pack(units(301, pairs=2))),
    "one pair": Case(batch=pack([Unit("u", {"trace": units(301)[0].pairs["trace"]})])),
    "a kind missing": Case(
        batch=pack([units(301)[0], Unit("u", {"empty": units(301)[1].pairs["empty"]})])
    ),
    "small vocabulary": Case(vocab=7, batch=pack(units(7))),
    "alpha 1": Case(options={"alpha": 1.0}),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads(impl, name, dtype):
    case = replace(HEADS[name], dtype=dtype)
    if impl == "cpp" and case.rank:
        pytest.skip("cpp has no LoRA")
    compare(case, impl)


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("name", ["bias", "lora", "two pairs"])
def test_chunks(monkeypatch, impl, rows, name):
    case = HEADS[name]
    if impl == "cpp" and case.rank:
        pytest.skip("cpp has no LoRA")
    if impl == "triton" and rows < 16 and (rows, name) != (5, "lora"):
        pytest.skip("a chunk takes a second in the interpreter")
    monkeypatch.setattr(one_pass, "LEAST_ROWS", 1)
    compare(case, impl, workspace_bytes=least_workspace(case, impl, rows), upstream=-1.7)


def test_a_pair_alone_and_in_any_order_of_units(impl):
    """Same scores bit for bit; the same gradients, whose sums have another order."""
    made = units(301)
    whole = {}
    for order in ([0, 1, 2], [2, 0, 1], [0], [1], [2]):
        batch = pack([made[i] for i in order])
        case = Case(batch=batch, options={"pair_counts": {"trace": 3, "empty": 3}})
        draw = torch.Generator().manual_seed(1)
        states, weight = (torch.randn(301, 24, generator=draw) for _ in range(2))
        hidden, weight = states[batch.tokens_T].requires_grad_(), weight.requires_grad_()
        ref = torch.zeros(batch.num_segments)
        result = call(case, {"hidden": hidden, "weight": weight}, ref, one_pass=True, impl=impl)
        result.loss.backward()
        whole[tuple(order)] = (result.scores_S.view(len(order), 4), hidden.grad, weight.grad)
    first, second, *alone = whole.values()
    scores, rows, sums = (torch.cat(parts) for parts in zip(*alone, strict=True))
    sums = sums.view(3, *first[2].shape).sum(0)
    for other in (second[2], sums):
        torch.testing.assert_close(other, first[2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(rows, first[1], rtol=1e-5, atol=1e-7)
    for other in (second[0][[1, 2, 0]], scores):
        torch.testing.assert_close(other, first[0], rtol=1e-6, atol=1e-5)
        if impl == "cpp":  # fixed blocks
            assert torch.equal(other, first[0])


def test_gradcheck():
    case = Case(torch.float64, dim=5, vocab=11, batch=pack(units(11, count=2, lengths=(4, 2))))
    ref = case.ref_scores()
    inputs = {n: t.requires_grad_() for n, t in replace(case, rank=2).inputs().items()}

    def loss(hidden, weight, low, lora_b):
        given = {"hidden": hidden, "weight": weight, "low": low, "lora_b": lora_b}
        return call(case, given, ref, one_pass=True, impl="eager", softcap=4.0).loss

    assert torch.autograd.gradcheck(loss, tuple(inputs.values()))


def test_saturated_and_hopeless_pairs(impl):
    """c = 0 gives no gradient at all, and c of either sign its own."""
    case = Case(loss="hinge")
    batch = case.pack()
    hidden, weight = (t.requires_grad_() for t in case.inputs().values())
    scores_S = call(case, {"hidden": hidden, "weight": weight}, one_pass=False).scores_S.detach()
    won_S = torch.tensor([-1e3, 1e3]).repeat(batch.num_pairs)
    for sign in (1, -1):
        result = call(
            case,
            {"hidden": hidden, "weight": weight},
            scores_S + sign * won_S,
            impl=impl,
            one_pass=True,
        )
        gradients = torch.autograd.grad(result.loss, (hidden, weight))
        assert all((g.abs().max() == 0) == (sign == 1) for g in gradients)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_a_kind_of_weight_zero_may_be_infinite(impl, loss):
    """And its loss have an infinite slope."""
    case = Case(bias=True, loss=loss, options={"alpha": 0.0})
    inputs, batch = case.inputs(), case.pack()
    start, stop = batch.group_ranges_G2[0].tolist()
    trace = set(batch.target_T[start:stop].tolist()) - set(batch.target_T[stop:].tolist())
    inputs["bias"][max(trace)] = -torch.inf  # a score of the trace is -inf
    made = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    result = call(case, made, one_pass=True, impl=impl)
    assert not result.scores_S.isfinite().all()
    gradients = torch.autograd.grad(result.loss, list(made.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert result.loss.isfinite()


def test_two_uses_in_one_graph(impl):
    """Each has its own sums; a graph may be walked twice."""
    case = Case()
    hidden, weight = (t.requires_grad_() for t in case.inputs().values())
    ref = case.ref_scores()
    inputs = {"hidden": hidden, "weight": weight}
    one = call(case, inputs, ref, one_pass=True, impl=impl).loss
    (single,) = torch.autograd.grad(one, weight, retain_graph=True)
    (again,) = torch.autograd.grad(one, weight)
    assert torch.equal(single, again)
    both = [call(case, inputs, ref, one_pass=True, impl=impl, alpha=a).loss for a in (0.3, 0.9)]
    (joint,) = torch.autograd.grad(both[0] + 2 * both[1], weight)
    parts = [call(case, inputs, ref, one_pass=False, impl=impl, alpha=a).loss for a in (0.3, 0.9)]
    (expected,) = torch.autograd.grad(parts[0] + 2 * parts[1], weight)
    torch.testing.assert_close(joint, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", [*PAIRS, "kto"])
def test_equals_its_parts(impl, loss):
    """Whatever the loss: linear_logprobs + segment_sum + bvpo_loss."""
    case = Case(loss=loss)
    ref, batch = case.ref_scores(), case.pack()
    actual, result = run(case, impl=impl)
    assert result.one_pass == (loss in SLOPES)
    hidden, weight = (t.requires_grad_() for t in case.inputs().values())
    logprobs_T = linear_logprobs(hidden, weight, batch.target_T, impl=impl)
    scores_S = segment_sum(logprobs_T, batch.cu_seqlens)
    ref = None if ref is None else ref.float()
    expected = bvpo_loss(scores_S, ref, batch, 0.3, loss=loss)
    expected.loss.backward()
    torch.testing.assert_close(actual["scores"], scores_S.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(actual["loss"], expected.loss.detach(), rtol=1e-5, atol=1e-6)
    for name, tensor in (("dweight", weight), ("dhidden", hidden)):
        assert (actual[name] - tensor.grad).norm() <= 1e-6 * tensor.grad.norm()
    assert set(result.metrics) == set(expected.metrics)
    assert result.kind_scale == expected.kind_scale


REFUSED = {
    "kto": (Case(loss="kto"), {}, "loss 'kto' is no function of a pair's margin"),
    "frozen": (Case(trained=("hidden",)), {}, "the head is frozen: 4 TVD already"),
    "sparse": (Case(), {"tail_tolerance": 0.01}, "tail_tolerance > 0 asks for the sparse"),
    "small": (Case(), {"workspace_bytes": 1000}, r"workspace_bytes: expected \d+, got 1000"),
    "reference": (Case(), {"impl": "reference"}, "impl 'reference' keeps all logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_serve_takes_the_other_schedule(name):
    case, options, why = REFUSED[name]
    with pytest.raises(ValueError, match=f"one_pass: expected .* got {why}"):
        run(case, one_pass=True, **options)
    found, result = run(case, **options)
    assert not result.one_pass
    assert result.scores_S.requires_grad
    assert found["dhidden"].abs().max() > 0


@pytest.mark.parametrize("amx", [True, False])
def test_the_default_is_the_faster_one(monkeypatch, impl, amx):
    """Which on a CPU depends on the rate of its products."""
    paths = {torch.bfloat16: "AMX brgemm" if amx else "AVX512-BF16 brgemm"}
    monkeypatch.setattr(one_pass, "CPU_PATHS", paths)
    half = impl != "eager" and not (amx and impl == "cpp")
    for dtype, expected in ((torch.float32, True), (torch.bfloat16, half)):
        assert run(Case(dtype), impl=impl)[1].one_pass == expected
        assert run(Case(dtype), impl=impl, one_pass=True)[1].one_pass


def test_without_gradients_there_are_scores_alone(impl):
    case = Case()
    with torch.no_grad():
        result = call(case, case.inputs(), case.ref_scores(), impl=impl)
    assert not result.one_pass
    assert not result.loss.requires_grad


def test_an_empty_batch_has_zero_gradients(impl):
    case = Case(batch=pack([]))
    hidden = torch.zeros(0, 24).requires_grad_()
    weight = torch.randn(301, 24).requires_grad_()
    result = call(case, {"hidden": hidden, "weight": weight}, torch.zeros(0), impl=impl)
    result.loss.backward()
    assert result.loss == 0
    assert weight.grad.shape == weight.shape
    assert weight.grad.abs().max() == 0


def test_autocast(impl):
    case = Case(torch.bfloat16)
    inputs = {name: tensor.float().requires_grad_() for name, tensor in case.inputs().items()}
    ref = case.ref_scores()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = call(case, inputs, ref, one_pass=True, impl=impl)
    result.loss.backward()
    expected, _ = run(case, one_pass=True, impl=impl)
    for name, tensor in inputs.items():
        assert tensor.grad.dtype == torch.float32
        assert torch.equal(tensor.grad, expected[f"d{name}"].float())


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "triton"])
def test_compiles_to_one_graph(impl):
    case = Case(bias=True, batch=pack(units(301)))
    ref = case.ref_scores().float()

    def step(hidden, weight, bias):
        given = {"hidden": hidden, "weight": weight, "bias": bias}
        return call(case, given, ref, one_pass=True, impl=impl).loss

    inputs = [tensor.requires_grad_() for tensor in case.inputs().values()]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*inputs), inputs)
    expected = torch.autograd.grad(step(*inputs), inputs)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(monkeypatch, impl, dtype):
    """Of a small call of every gradient, and of the scaling in its backward."""
    case = Case(dtype, dim=5, vocab=11, bias=True, batch=pack(units(11, 2, lengths=(3, 2))))
    asked = []
    run_op = ops.linear_pair_loss
    monkeypatch.setattr(ops, "linear_pair_loss", lambda *a: asked.append(a) or run_op(*a))
    inputs = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    call(case, inputs, case.ref_scores(), one_pass=True, impl=impl)
    torch.library.opcheck(run_op.default, asked[0])
    values, rows = torch.randn(4, 3), torch.randn(4)
    for factor in (rows, rows[0]):
        torch.library.opcheck(torch.ops.bvpo.scaled, (values, factor, dtype))
    expected = (values.double() * rows[:, None].double()).to(dtype)
    assert torch.equal(torch.ops.bvpo.scaled(values, rows, dtype), expected)


def test_second_derivatives_raise(impl):
    case = Case()
    hidden, weight = (t.requires_grad_() for t in case.inputs().values())
    loss = call(case, {"hidden": hidden, "weight": weight}, one_pass=True, impl=impl).loss
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_bad_input_is_named():
    case = Case()
    made = case.inputs()
    batch = case.pack()
    for given, message in (
        ({"loss": "none"}, "loss: expected one of"),
        ({"ref": torch.zeros(3)}, "ref_scores_S: expected shape"),
        ({"gamma": 1.0}, "loss_options: 'dpo' takes"),
    ):
        ref = given.pop("ref", torch.zeros(batch.num_segments))
        with pytest.raises((ValueError, TypeError), match=message):
            linear_bvpo_loss(
                made["hidden"], made["weight"].requires_grad_(), batch, ref, 0.5, **given
            )
