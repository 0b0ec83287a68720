"""`linear_logprobs` against the fp64 oracle, for every backend that runs here."""

import itertools

import pytest
import torch
from logprob_cases import Case, compare, run, with_options

from bvpo_kernels import backends, linear_logprobs
from bvpo_kernels.backends.eager.engine import cpu_multiplies
from bvpo_kernels.call import Call, Inputs
from bvpo_kernels.oracles.testing import assert_accurate, max_error

# Those that take CPU tensors here; tests/test_kernels_gpu.py is for the others.
SERVING = ("eager", "cpp", "triton") if backends.INTERPRETED else ("eager", "cpp")
IMPLS = [name for name in SERVING if not backends.MISSING[name]]
# Enough for a tile of a few hundred logits: these small cases then take many tiles in both
# directions, with ragged last ones, which is where the bugs of the field were.
TINY_WORKSPACE = 16 * 2048
SMALL = Case()
BF16 = Case(dtype=torch.bfloat16)
NEEDS = {
    "scores": (),
    "frozen": ("hidden",),
    "trained": ("hidden", "weight", "bias"),
    "weight_only": ("weight",),
    "bias_only": ("bias",),
    "hidden_and_bias": ("hidden", "bias"),
}


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "both": {"softcap": 3.0, "temperature": 1.3},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _every_option():
    """The whole product; of it, for the interpreter, the corners (a case takes a second there)."""
    for impl, need, option, dtype in itertools.product(IMPLS, NEEDS, OPTIONS, DTYPES):
        corner = need in ("scores", "frozen", "trained") and option in ("plain", "both")
        if impl != "triton" or (corner and dtype != torch.float16):
            name = f"{impl}-{option}-{str(dtype).removeprefix('torch.')}-{need}"
            yield pytest.param(impl, dtype, OPTIONS[option], NEEDS[need], id=name)


@pytest.mark.parametrize(("impl", "dtype", "options", "need"), list(_every_option()))
def test_small_with_every_option(impl, dtype, options, need):
    case = Case(dtype=dtype, bias=True, options=options)
    compare(case, impl, need, workspace_bytes=TINY_WORKSPACE)
    compare(case, impl, need)


# D beyond one block, odd and of the models we serve, as V; T ragged. fp64 weights bound V D here.
REAL_SHAPES = [
    (17, 64, 151936),
    (130, 577, 49152),
    (33, 576, 50257),
    (21, 896, 151936),
    (9, 4096, 49152),
]


@pytest.mark.slow
@pytest.mark.parametrize(("num_tokens", "dim", "vocab"), REAL_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_real_shapes(num_tokens, dim, vocab, dtype):
    if dtype == torch.bfloat16 and not cpu_multiplies(dtype):
        num_tokens = min(num_tokens, 9)  # naive torch takes seconds for one
    case = Case(num_tokens, dim, vocab, dtype, scale=3.0)
    inputs, need = case.inputs(), ("hidden", "weight")
    oracle = run(inputs, "reference", need, torch.float64)
    naive = run(inputs, "reference", need)
    for impl in (name for name in IMPLS if name != "triton"):  # the interpreter takes minutes
        for results in (run(inputs, impl, need), run(inputs, impl, ("hidden",))):
            for name, value in results.items():
                assert_accurate(f"{impl} {name}", value, naive[name], oracle[name])


@pytest.mark.parametrize("num_tokens", [1, 17, 4097])
def test_many_token_tiles(impl, num_tokens):
    num_tokens = min(num_tokens, 301) if impl == "triton" else num_tokens
    compare(Case(num_tokens, 40, 515, torch.bfloat16), impl)
    compare(Case(num_tokens, 40, 515, torch.float32), impl, ("hidden",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_accumulator_that_does_not_fit_gets_its_own_sweep(impl, dtype):
    """T x D fp32 beyond half the workspace: two sweeps, the same numbers."""
    case = Case(150 if impl == "triton" else 600, 64, 333, dtype)
    compare(case, impl, workspace_bytes=case.num_tokens * 64 * 4)


def test_no_tokens(impl):
    for need in NEEDS.values():
        result = run(Case(0, bias=True).inputs(), impl, need)
        assert result["logprobs"].shape == (0,)
        assert all(result[f"d{name}"].abs().sum() == 0 for name in need)


def test_all_ignored_gives_zeros_and_zero_gradients(impl):
    result = run(Case(ignored=2.0, bias=True).inputs(), impl)
    for name, value in result.items():
        assert value.abs().sum() == 0, name


def test_ignored_rows_may_hold_anything(impl):
    inputs = Case(bias=True).inputs()
    ignored = inputs["target"] == -100
    assert 0 < ignored.sum() < len(ignored)
    clean = run(inputs, impl)
    inputs["hidden"][ignored] = float("nan")
    inputs["upstream"][ignored] = float("nan")
    poisoned = run(inputs, impl)
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name


@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS.keys())
def test_a_bound_on_the_scored_rows_changes_no_result(impl, need):
    inputs = Case(bias=True, ignored=0.5).inputs()
    scored = int((inputs["target"] != -100).sum())
    free = run(inputs, impl, need)
    for bound in (scored, scored + 3, 1000):
        bounded = run(inputs, impl, need, max_scored=bound)
        for name, value in free.items():
            assert max_error(bounded[name], value) <= 1e-5, (name, bound)
    with pytest.raises(ValueError, match=f"max_scored: expected .*, got {scored - 1} for {scored}"):
        run(inputs, impl, need, max_scored=scored - 1)


def test_no_scored_row_under_a_bound_of_zero(impl):
    inputs = Case(ignored=2.0, bias=True).inputs()
    for need in ((), ("hidden",), ("hidden", "weight", "bias")):
        result = run(inputs, impl, need, max_scored=0)
        assert all(value.abs().sum() == 0 for value in result.values())


def test_custom_ignore_index_may_be_a_valid_column(impl):
    inputs = Case(ignored=0.0).inputs()
    kept = inputs["target"] != 0
    assert 0 < kept.sum() < len(kept)
    logprobs = run(inputs, impl, ignore_index=0)["logprobs"]
    assert torch.equal(logprobs != 0, kept)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_far_from_zero(impl, offset):
    """A running maximum that starts at 0 fails on the negative side."""
    compare(Case(bias=True, offset=offset), impl, workspace_bytes=TINY_WORKSPACE)
    logits = torch.randn(50, 64) + offset
    eye = torch.eye(64)
    oracle = torch.log_softmax(logits.double(), -1)[:, 7]
    logprobs = linear_logprobs(logits, eye, torch.full((50,), 7), impl=impl)
    assert max_error(logprobs, oracle) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tile_dominates(impl, dtype):
    """Spread of hundreds of nats: the log-sum-exp comes from one tile, the rest underflows.

    The weight is the identity: logits are exact, so that only the softmax is judged.
    """
    case = Case(64, 300, 300, dtype, bias=True)
    inputs = case.inputs() | {"weight": torch.eye(300, dtype=dtype)}
    inputs["hidden"] = (inputs["hidden"] * 200).round()
    inputs["bias"] = inputs["bias"] * 0
    compare(case, impl, inputs=inputs, workspace_bytes=TINY_WORKSPACE)
    compare(case, impl, ("hidden",), inputs=inputs, workspace_bytes=TINY_WORKSPACE)


@pytest.mark.parametrize("gap", [2.0, 8.0, 14.0, 25.0, 60.0])
def test_near_certain_target_keeps_its_gradient(impl, gap):
    """1 - p_y to 1e-3 in bf16 even where p_y rounds to 1: it is never formed as a difference."""
    dim, vocab = 64, 128
    hidden = torch.zeros(3, dim, dtype=torch.bfloat16)
    hidden[:, 5] = gap
    weight = torch.eye(vocab, dim, dtype=torch.bfloat16).requires_grad_()
    target = torch.full((3,), 5)
    linear_logprobs(hidden, weight, target, impl=impl).sum().backward()
    logits = hidden[0].double() @ weight.detach().double().T
    others = torch.exp(logits - logits[5]).sum() - 1
    expected = 3 * gap * others / (1 + others)  # dW[y, 5] = sum_t (1 - p_y) h
    got = float(weight.grad[5, 5])
    # bf16 rounds dW by up to 2^-9; all but cpp also the gradient of the logit, and CPU products.
    rounding = 2**-9 + 1e-3 if impl == "cpp" else 2**-7
    assert got == pytest.approx(float(expected), rel=rounding)
    wide = weight.detach().float().requires_grad_()
    linear_logprobs(hidden.float(), wide, target, impl=impl).sum().backward()
    assert float(wide.grad[5, 5]) == pytest.approx(float(expected), rel=1e-5)
    frozen = hidden.float().requires_grad_()
    linear_logprobs(frozen, weight.detach().float(), target, impl=impl).sum().backward()
    assert float(frozen.grad[0, 5]) == pytest.approx(float(expected) / 3 / gap, rel=1e-5)


def test_vocabulary_of_one(impl):
    result = run(Case(vocab=1, ignored=0.0).inputs(), impl, ("hidden", "weight"))
    for value in result.values():
        assert value.abs().sum() == 0


def test_strided_inputs(impl):
    base = Case(64, 40, 130).inputs()
    dense = run(base, impl, ())
    wide_h = torch.full((64, 80), float("nan"))
    wide_h[:, ::2] = base["hidden"]
    wide_w = torch.full((40, 130), float("nan"))
    wide_w[:] = base["weight"].T
    args = (wide_h[:, ::2], wide_w.T, base["target"])
    strided = linear_logprobs(*args, impl=impl)
    assert max_error(strided, dense["logprobs"]) < 1e-5
    hidden = wide_h[:, ::2].requires_grad_()
    weight = wide_w.T.requires_grad_()
    linear_logprobs(hidden, weight, base["target"], impl=impl).backward(base["upstream"])
    plain = run(base, impl)
    assert hidden.grad is not None
    assert max_error(hidden.grad, plain["dhidden"]) < 1e-5
    assert max_error(weight.grad, plain["dweight"]) < 1e-5


def test_upstream_gradient_may_be_expanded(impl):
    """`.sum()` sends a stride-0 gradient."""
    inputs = SMALL.inputs()
    inputs["upstream"] = torch.ones(1).expand(SMALL.num_tokens)
    expanded = run(inputs, impl)
    inputs["upstream"] = torch.ones(SMALL.num_tokens)
    for name, value in run(inputs, impl).items():
        assert torch.equal(expanded[name], value), name


def test_two_uses_in_one_graph(impl):
    """Trace and empty passes share the head: gradients add."""
    inputs = SMALL.inputs()
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    target, upstream = inputs["target"], inputs["upstream"]
    first = linear_logprobs(hidden, weight, target, impl=impl)
    second = linear_logprobs(2 * hidden, weight, target.roll(1), impl=impl)
    (first @ upstream + second @ upstream).backward()
    both = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    (linear_logprobs(hidden, weight, target, impl=impl) @ upstream).backward()
    (linear_logprobs(2 * hidden, weight, target.roll(1), impl=impl) @ upstream).backward()
    assert max_error(both[0], hidden.grad) < 1e-6
    assert max_error(both[1], weight.grad) < 1e-6


def test_weight_gradient_accumulates_in_fp32(impl):
    """bf16 accumulation over chunks would lose the small tokens behind one large one."""
    case = Case(256 if impl == "triton" else 2048, 16, 64, torch.bfloat16, ignored=0.0)
    compare(case, impl, workspace_bytes=TINY_WORKSPACE)
    inputs = case.inputs()
    inputs["upstream"][0] *= 4096
    oracle = run(inputs, "reference", dtype=torch.float64)["dweight"]
    actual = run(inputs, impl, workspace_bytes=16 * 64 * 64)["dweight"]
    assert max_error(actual, oracle) <= 2**-7 * float(oracle.abs().max())


def test_workspace_changes_speed_not_results(impl):
    case = with_options(SMALL, num_tokens=300)
    small = run(case.inputs(), impl, workspace_bytes=TINY_WORKSPACE)
    large = run(case.inputs(), impl)
    for name, value in large.items():
        assert max_error(small[name], value) <= 1e-5 * max(1.0, float(value.abs().max())), name


def test_entropy_carries_no_gradient(impl):
    inputs = SMALL.inputs()
    _, entropy = linear_logprobs(
        inputs["hidden"].requires_grad_(),
        inputs["weight"],
        inputs["target"],
        return_entropy=True,
        impl=impl,
    )
    assert not entropy.requires_grad
    uniform = torch.zeros(5, 24)
    _, entropy = linear_logprobs(
        uniform,
        inputs["weight"].detach(),
        torch.zeros(5, dtype=torch.int64),
        return_entropy=True,
        impl=impl,
    )
    assert entropy.tolist() == pytest.approx([torch.tensor(301.0).log().item()] * 5, rel=1e-6)


def test_int32_targets(impl):
    inputs = SMALL.inputs()
    args = inputs["hidden"], inputs["weight"]
    wide = linear_logprobs(*args, inputs["target"], impl=impl)
    assert torch.equal(linear_logprobs(*args, inputs["target"].int(), impl=impl), wide)


def test_gradcheck_eager():
    """First derivatives in fp64, over several tiles, with every option."""
    case = Case(7, 5, 23, torch.float64, bias=True)
    inputs = case.inputs()
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]

    def logprobs(hidden, weight, bias):
        return linear_logprobs(
            hidden,
            weight,
            inputs["target"],
            bias=bias,
            softcap=2.0,
            temperature=0.8,
            impl="eager",
            workspace_bytes=16 * 12,
        )

    assert torch.autograd.gradcheck(logprobs, leaves)

    def frozen(hidden):
        return logprobs(hidden, inputs["weight"].detach(), inputs["bias"].detach())

    assert torch.autograd.gradcheck(frozen, leaves[:1])


@pytest.mark.parametrize("need", [(), ("hidden",), ("hidden", "weight")])
def test_autocast(impl, need):
    """As a linear layer under autocast: the product in bf16, gradients in the parameters' dtype."""
    inputs = SMALL.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        result = run(inputs, impl, need)
    half = {k: v.bfloat16() if k in ("hidden", "weight") else v for k, v in inputs.items()}
    expected = run(half, impl, need)
    assert torch.equal(result["logprobs"], expected["logprobs"])
    for name in need:
        assert result[f"d{name}"].dtype == torch.float32
        assert torch.equal(result[f"d{name}"], expected[f"d{name}"].float())


@pytest.mark.parametrize("need", [("hidden",), ("hidden", "weight")])
def test_compile_fullgraph(impl, need):
    inputs = with_options(SMALL, dtype=torch.bfloat16).inputs()
    hidden = inputs["hidden"].requires_grad_()
    weight = inputs["weight"].requires_grad_("weight" in need)

    def loss(hidden, weight):
        logprobs, entropy = linear_logprobs(
            hidden * 2, weight, inputs["target"], impl=impl, return_entropy=True, max_scored=36
        )
        return (logprobs * inputs["upstream"]).sum() + entropy.sum()

    expected = loss(hidden, weight)
    expected.backward()
    grads = [p.grad.clone() for p in (hidden, weight) if p.requires_grad]
    hidden.grad = weight.grad = None
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    got.backward()
    assert torch.equal(got, expected)
    for parameter, grad in zip(
        [p for p in (hidden, weight) if p.requires_grad], grads, strict=True
    ):
        assert torch.equal(parameter.grad, grad)


def test_opcheck(impl):
    inputs = Case(9, 8, 33, bias=True).inputs()
    hidden, weight, bias = (inputs[k].requires_grad_() for k in ("hidden", "weight", "bias"))
    target = inputs["target"]
    call = Call(0.9, 4.0, -100, 4096, need_entropy=True, impl=impl)
    for unit in (False, True):
        fixed = [p.detach() if unit else p for p in (weight, bias)]
        args = (*Inputs(hidden, fixed[0], target, fixed[1]), *call, unit)
        torch.library.opcheck(torch.ops.bvpo.linear_logprobs_forward, args)
    kept = [t.detach() for t in torch.ops.bvpo.linear_logprobs_forward(*args)][:7]
    given = Inputs(hidden.detach(), weight.detach(), target, bias.detach())
    args = (inputs["upstream"], *given, *kept, *call, True, True, True)
    torch.library.opcheck(torch.ops.bvpo.linear_logprobs_backward, args)


def _bad(**changes):
    inputs = SMALL.inputs()
    arguments = {k: inputs[k] for k in ("hidden", "weight", "target")} | changes
    hidden, weight, target = (arguments.pop(k) for k in ("hidden", "weight", "target"))
    return linear_logprobs(hidden, weight, target, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 24)}, ValueError, r"hidden: .*\[T, D\], D >= 1, got \(2"),
        ({"hidden": [1.0]}, TypeError, "hidden: expected a Tensor, got list"),
        ({"hidden": torch.zeros(37, 24).long()}, TypeError, "hidden: .*got torch.int64"),
        ({"weight": torch.zeros(301, 23)}, ValueError, r"weight: expected shape \[V, 24\].*23"),
        ({"weight": torch.zeros(301, 24).half()}, TypeError, "weight: .*dtype of hidden"),
        ({"target": torch.zeros(36).long()}, ValueError, r"target: .*\[37\], got \(36"),
        ({"target": torch.zeros(37)}, TypeError, "target: expected an int64 or int32"),
        ({"target": torch.full((37,), 301)}, ValueError, r"target: .*\[0, 301\).*got 301"),
        ({"target": torch.full((37,), -1)}, ValueError, r"target: .*got -1"),
        ({"bias": torch.zeros(300)}, ValueError, r"bias: expected shape \[301\], got \(300"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature: .*got nan"),
        ({"softcap": -1.0}, ValueError, "softcap: .*got -1"),
        ({"tail_tolerance": 1.0}, ValueError, r"tail_tolerance: expected a number in \[0, 1\)"),
        ({"tail_tolerance": -0.1}, ValueError, "tail_tolerance"),
        ({"max_scored": -1}, ValueError, "max_scored: expected None or a number >= 0, got -1"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes: expected a number > 0, got 0"),
        ({"impl": "fast"}, ValueError, "impl: .*one of .*'eager'.*got 'fast'"),
        ({"impl": "cuda"}, ValueError, "impl: 'cuda' cannot serve .*these can: .*eager"),
        ({"hidden": torch.zeros(37, 24, device="meta")}, ValueError, "weight: .*device meta"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        _bad(**changes)
