"""Second derivatives and forward mode: right where they are served, refused where they are not."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from bvpo_kernels import GradStats, TokenPair, Unit, linear_logprobs, pack, segment_sum
from bvpo_kernels.ops.derivatives import once

IMPLS = ("eager", "cpp", "triton")
REFUSED = pytest.raises(NotImplementedError, match="second derivatives are not served")


def _head(weight_grad, bias=False):
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=weight_grad)
    return hidden, weight, torch.randn(11, requires_grad=weight_grad) if bias else None


def _differentiate_twice(logprobs, leaves):
    """Of a gradient penalty with a plain square beside it, behind which a zero could hide."""
    (first,) = torch.autograd.grad(logprobs.sum(), leaves[0], create_graph=True)
    total = first.square().sum() + sum(leaf.square().sum() for leaf in leaves)
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("tolerance", [0.0, 2**-6], ids=["exact", "sparse"])
@pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl, weight_grad, tolerance):
    hidden, weight, bias = _head(weight_grad, bias=True)
    logprobs = linear_logprobs(
        hidden, weight, torch.arange(5), bias=bias, impl=impl, tail_tolerance=tolerance
    )
    leaves = [hidden, weight, bias] if weight_grad else [hidden]
    with REFUSED:
        _differentiate_twice(logprobs, leaves)


@pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "trained"])
def test_a_second_derivative_with_respect_to_the_upstream_is_refused(weight_grad):
    hidden, weight, _ = _head(weight_grad)
    upstream = torch.randn(5, requires_grad=True)
    logprobs = linear_logprobs(hidden, weight, torch.arange(5))
    (first,) = torch.autograd.grad(logprobs, hidden, upstream, create_graph=True)
    with REFUSED:
        torch.autograd.grad(first.square().sum(), upstream)


def test_a_second_derivative_of_the_lora_head_is_refused():
    hidden, weight, _ = _head(weight_grad=False)
    low = torch.randn(5, 2, requires_grad=True)
    logprobs = linear_logprobs(hidden, weight, torch.arange(5), lora=(low, torch.randn(11, 2)))
    with REFUSED:
        _differentiate_twice(logprobs, [hidden, low])


def test_a_second_derivative_inside_a_collection_is_refused():
    model = torch.nn.Linear(4, 3)
    batch = pack(
        [Unit("a", {k: [TokenPair([1], [2], [3])] for k in ("trace", "empty")})]
    )  # eight tokens
    x = torch.randn(8, 4, requires_grad=True)
    stats = GradStats(model)
    with pytest.raises(NotImplementedError, match="second"), stats.collect(batch):
        _differentiate_twice(model(x).square(), [x])


def test_create_graph_alone_is_served():
    hidden, weight, _ = _head(weight_grad=True)
    logprobs = linear_logprobs(hidden, weight, torch.arange(5))
    kept = torch.autograd.grad(logprobs.sum(), [hidden, weight], create_graph=True)
    plain = torch.autograd.grad(
        linear_logprobs(hidden, weight, torch.arange(5)).sum(), [hidden, weight]
    )
    for one, other in zip(kept, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_naive_backend_has_second_derivatives():
    hidden, weight, _ = _head(weight_grad=False)
    target = torch.arange(5)
    found = _differentiate_twice(
        linear_logprobs(hidden, weight, target, impl="reference"), [hidden]
    )
    plain = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(found, _differentiate_twice(plain, [hidden]))


@pytest.mark.parametrize("impl", ["reference", "eager", "triton"])
def test_segment_sum_has_derivatives_of_any_order(impl):
    bounds = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    values = torch.randn(7, requires_grad=True)

    def penalty(sums):
        (first,) = torch.autograd.grad(sums.pow(3).sum(), values, create_graph=True)
        return torch.autograd.grad(first.pow(3).sum(), values)[0]

    plain = torch.stack([values[s:e].sum() for s, e in itertools.pairwise(bounds)])
    torch.testing.assert_close(
        penalty(segment_sum(values, bounds, impl=impl)), penalty(plain), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("impl", ["auto", "eager", "cpp"])
@pytest.mark.parametrize("place", ["hidden", "weight", "bias"])
def test_forward_mode_is_refused(impl, place):
    tensors = {"hidden": torch.randn(5, 8), "weight": torch.randn(11, 8), "bias": torch.randn(11)}

    def run(value):
        given = tensors | {place: value}
        return linear_logprobs(
            given["hidden"], given["weight"], torch.arange(5), bias=given["bias"], impl=impl
        )

    with pytest.raises(NotImplementedError, match=r"linear_logprobs: forward-mode .* \(jvp\)"):
        torch.func.jvp(run, (tensors[place],), (torch.ones_like(tensors[place]),))
    with forward_ad.dual_level():  # a level alone is no derivative
        assert run(tensors[place]).shape == (5,)


def test_forward_mode_of_the_others_is_refused():
    values, bounds = torch.randn(7), torch.tensor([0, 7], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="segment_sum: forward-mode"):
        torch.func.jvp(lambda v: segment_sum(v, bounds), (values,), (values,))
    low, hidden = torch.randn(5, 2), torch.randn(5, 8)
    weight, lora_b = torch.randn(11, 8), torch.randn(11, 2)
    with pytest.raises(NotImplementedError, match="linear_logprobs: forward-mode"):
        torch.func.jvp(
            lambda x: linear_logprobs(hidden, weight, torch.arange(5), lora=(x, lora_b)),
            (low,),
            (low,),
        )


def test_once_sees_a_result_that_hangs_on_no_upstream_gradient():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @once
        def backward(ctx, dy):
            return (3 * ctx.saved_tensors[0] ** 2 * dy,)

    x = torch.tensor([2.0], requires_grad=True)
    (first,) = torch.autograd.grad(Cube.apply(x), x, create_graph=True)
    assert first.item() == 12.0
    with REFUSED:
        torch.autograd.grad(first + x, x)
