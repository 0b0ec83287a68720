"""LoRA on the LM head inside the op, against the dense delta."""

import pytest
import torch

from bvpo_kernels import linear_logprobs
from bvpo_kernels.call import Call
from bvpo_kernels.oracles import logprobs as reference
from bvpo_kernels.oracles.testing import assert_accurate

# Ragged, more tokens than rank, several tiles of both tokens and vocabulary with a small workspace.
T, D, V, R = 37, 20, 211, 3
SCALE = 1.5


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(dtype, frozen=False):
    torch.manual_seed(0)
    sizes = {"hidden": (T, D), "weight": (V, D), "a": (R, D), "b": (V, R), "bias": (V,)}
    values = {
        name: torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_()
        for name, size in sizes.items()
    }
    values["weight"].requires_grad_(not frozen)
    target = torch.randint(0, V, (T,))
    target[[0, 5, 36]] = -100
    return values, target


def inside(values, target, **options):
    low = SCALE * (values["hidden"] @ values["a"].T)
    return linear_logprobs(
        values["hidden"],
        values["weight"],
        target,
        lora=(low, values["b"]),
        bias=values["bias"],
        **options,
    )


def dense(values, target, **options):
    weight = values["weight"] + SCALE * values["b"] @ values["a"]
    return reference.linear_logprobs(
        values["hidden"], weight, target, bias_V=values["bias"], **options
    )


def gradients(logprobs, values):
    trained = {name: value for name, value in values.items() if value.requires_grad}
    upstream = torch.linspace(-2, 1, T).to(logprobs)
    return dict(
        zip(trained, torch.autograd.grad(logprobs, list(trained.values()), upstream), strict=True)
    )


@pytest.mark.parametrize("workspace", [1, 40_000, 2**27])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_are_those_of_the_dense_delta(workspace, frozen, softcap):
    values, target = inputs(torch.float64, frozen)
    options = {"temperature": 0.7, "softcap": softcap}
    logprobs, entropy = inside(
        values, target, workspace_bytes=workspace, return_entropy=True, **options
    )
    expected, expected_entropy = dense(values, target, **options)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    got, want = gradients(logprobs, values), gradients(expected, values)
    assert got.keys() == want.keys()
    assert ("weight" in got) != frozen
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accuracy(dtype):
    values, target = inputs(dtype)
    exact = {name: v.detach().double().requires_grad_() for name, v in values.items()}
    # Plain torch, which also rounds x: what the dense delta rounds is another quantity.
    low = SCALE * (values["hidden"] @ values["a"].T)
    z = values["hidden"] @ values["weight"].T + low @ values["b"].T + values["bias"]
    kept = target.clamp(min=0)[:, None]
    eager = z.float().log_softmax(-1).gather(1, kept)[:, 0].masked_fill(target == -100, 0)
    got, oracle = inside(values, target), dense(exact, target)[0]
    assert got.dtype == torch.float32
    assert_accurate("logprobs", got, eager, oracle)
    want, naive = gradients(oracle, exact), gradients(eager, values)
    for name, grad in gradients(got, values).items():
        assert grad.dtype == dtype
        assert_accurate(name, grad, naive[name], want[name])


def test_only_what_is_needed_is_returned_and_nothing_is_scored_for_free():
    values, target = inputs(torch.float32, frozen=True)
    with torch.no_grad():
        logprobs = inside(values, torch.full_like(target, -100))
    assert torch.equal(logprobs, torch.zeros(T))
    values["hidden"].requires_grad_(False)
    got = gradients(inside(values, target), values)
    assert set(got) == {"a", "b", "bias"}
    values, target = inputs(torch.float32, frozen=True)
    empty = {name: v[:0] if name == "hidden" else v for name, v in values.items()}
    assert inside(empty, target[:0]).shape == (0,)


def test_opcheck_and_compile():
    values, target = inputs(torch.float32)
    low = (values["hidden"] @ values["a"].T).detach().requires_grad_()
    inputs_ = (values["hidden"], values["weight"], target, values["bias"], low, values["b"])
    call = Call(0.7, workspace_bytes=2**20, need_entropy=True)
    op = torch.ops.bvpo.linear_logprobs_forward.default
    torch.library.opcheck(op, (*inputs_, *call, False))
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, target), inside(values, target))


def test_errors():
    values, target = inputs(torch.float32)
    hidden, weight, b = values["hidden"], values["weight"], values["b"]
    low = hidden @ values["a"].T
    for lora, error, match in (
        ((low[:-1], b), ValueError, r"lora\[0\]: expected shape \[37, R\]"),
        ((low, b[:, :1]), ValueError, r"lora\[1\]: expected shape \[211, R\]"),
        ((low.double(), b), TypeError, r"lora\[0\]: expected the dtype of hidden"),
    ):
        with pytest.raises(error, match=match):
            linear_logprobs(hidden, weight, target, lora=lora)
    with pytest.raises(ValueError, match="target: expected values in"):
        linear_logprobs(hidden, weight, target + V, lora=(low, b))
    with pytest.raises(ValueError, match="impl: 'cpp' cannot serve this call: it has no LoRA"):
        linear_logprobs(hidden, weight, target, lora=(low, b), impl="cpp")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("frozen", [True, False])
def test_other_backends_serve_it(impl, frozen):
    """The adapter lies beside the weight in every engine, with a bound on the scored rows too."""
    values, target = inputs(torch.float32, frozen)
    options = {"workspace_bytes": 40_000, "max_scored": T - 3, "softcap": 3.0}
    got = inside(values, target, impl=impl, **options)
    want = inside(values, target, impl="eager", **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    expected = gradients(want, values)
    for name, gradient in gradients(got, values).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
