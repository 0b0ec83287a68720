"""The GPU backends at real shapes; all of this needs a CUDA device."""

import pytest
import torch
from logprob_cases import Case, run

from bvpo_kernels import backends, linear_logprobs, segment_sum
from bvpo_kernels.oracles.testing import assert_accurate

pytestmark = pytest.mark.gpu

IMPLS = [name for name in ("triton",) if not backends.MISSING[name]]
NEEDS = {"scores": (), "frozen": ("hidden",), "trained": ("hidden", "weight")}


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("workspace", [1 << 22, None], ids=["fused", "rows"])
def test_against_fp64(impl, dtype, need, workspace):
    """Ragged in every direction, V and D of the models we serve and an odd D, which no descriptor
    can follow; a small workspace takes the fused forward and many tiles."""
    for tokens, dim, vocab in ((333, 896, 151936), (130, 577, 50257)):
        inputs = on_gpu(Case(tokens, dim, vocab, dtype, scale=3.0).inputs())
        for options in ({}, {"softcap": 20.0, "temperature": 0.7}):
            oracle = run(inputs, "reference", need, torch.float64, **options)
            naive = run(inputs, "reference", need, **options)
            actual = run(inputs, impl, need, workspace_bytes=workspace, **options)
            for name, value in actual.items():
                assert_accurate(f"{impl} {name}", value, naive[name], oracle[name])


def test_more_logits_than_int32_counts(impl):
    inputs = on_gpu(Case(20000, 64, 151936, torch.bfloat16).inputs())
    full = run(inputs, impl, ("hidden",))
    tail = {k: v[-64:] if v.shape[0] == 20000 else v for k, v in inputs.items()}
    for name, value in run(tail, impl, ("hidden",)).items():
        expected = full[name][-64:]
        assert (value - expected).abs().max() <= 2e-2 * expected.abs().max(), name


@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS.keys())
@pytest.mark.parametrize(
    "options",
    [{}, {"max_scored": 450}, {"workspace_bytes": 1 << 16}, {"tail_tolerance": 2**-7}],
    ids=["plain", "bounded", "fused", "sparse"],
)
def test_the_host_is_never_waited_for(impl, need, options):
    inputs = on_gpu(Case(512, 128, 5000, torch.bfloat16).inputs())
    expected = run(inputs, impl, need, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(inputs, impl, need, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS.keys())
def test_a_bound_on_the_scored_rows_changes_no_result(impl, need):
    inputs = on_gpu(Case(700, 256, 50257, torch.bfloat16, ignored=0.6).inputs())
    oracle = run(inputs, "reference", need, torch.float64)
    naive = run(inputs, "reference", need)
    scored = int((inputs["target"] != -100).sum())
    for name, value in run(inputs, impl, need, max_scored=scored).items():
        assert_accurate(f"{impl} {name}", value, naive[name], oracle[name])


def test_a_cuda_graph_replays_with_other_inputs(impl):
    """Including another number of ignored tokens: the count lives on the device."""
    inputs = on_gpu(Case(300, 128, 5000, torch.bfloat16).inputs())
    hidden, weight = (inputs[name].requires_grad_() for name in ("hidden", "weight"))

    def step():
        logprobs = linear_logprobs(hidden, weight, inputs["target"], impl=impl, max_scored=290)
        return logprobs, *torch.autograd.grad(logprobs, (hidden, weight), inputs["upstream"])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.mul_(0.5)
        inputs["target"][100:250] = -100
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


def test_same_bits_every_time(impl):
    inputs = on_gpu(Case(700, 256, 50257, torch.bfloat16).inputs())
    for need in NEEDS.values():
        first, second = run(inputs, impl, need), run(inputs, impl, need)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_memory_stays_within_the_workspace(impl):
    inputs = on_gpu(Case(4096, 512, 151936, torch.bfloat16).inputs())
    run(inputs, impl, ("hidden", "weight"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(inputs, impl, ("hidden", "weight"), workspace_bytes=1 << 28)
    torch.cuda.synchronize()
    # The leaves are clones of the inputs, and their gradients are results.
    expected = sum(t.nbytes for t in inputs.values()) + sum(t.nbytes for t in results.values())
    per_token = 64 * 4096
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= expected + (1 << 28) + per_token + (16 << 20)


@pytest.mark.parametrize("need", [("hidden",), ("hidden", "weight")])
def test_compiles_into_one_graph(impl, need):
    inputs = on_gpu(Case(300, 128, 5000, torch.bfloat16).inputs())
    leaves = [inputs[name].requires_grad_(name in need) for name in ("hidden", "weight")]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def loss(hidden, weight):
        logprobs = linear_logprobs(hidden * 2, weight, inputs["target"], impl=impl)
        return (logprobs * inputs["upstream"]).sum()

    expected = torch.autograd.grad(loss(*leaves), wanted)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), wanted)
    for value, exact in zip(got, expected, strict=True):
        assert (value - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("count", [2, 5])
def test_pair_reduce_waits_for_nothing(count):
    tiles, total = torch.randn(count, 512, 512, device="cuda"), torch.zeros(512, 512, device="cuda")
    torch.ops.bvpo.pair_reduce(tiles, total)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.bvpo.pair_reduce(tiles, total)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_segment_sum():
    lengths = torch.tensor([0, 1, 30000, 17, 0, 8193])
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().cuda()
    values = torch.randn(int(bounds[-1]), device="cuda", requires_grad=True)
    triton = segment_sum(values, bounds, impl="triton")
    assert torch.equal(triton.cpu(), segment_sum(values.cpu(), bounds.cpu(), impl="reference"))
    upstream = torch.randn(6, device="cuda")
    triton.backward(upstream)
    assert torch.equal(values.grad, upstream.repeat_interleave(lengths.cuda()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pair_reduce_twins_agree(dtype):
    """Their sums to the bit; inner products to fp32's partials, which they add in other orders."""
    tiles = torch.randn(2, 1000, 4099, device="cuda")
    weights = torch.tensor([0.4, 0.6], device="cuda")
    start = torch.randn(1000, 4099, device="cuda").to(dtype)
    flat = tiles.double().flatten(1)
    exact = flat @ flat.T
    totals = []
    for impl in IMPLS:
        totals.append(start.clone())
        gram = torch.ops.bvpo.pair_reduce(tiles, totals[-1], weights, True, impl)
        assert (gram - exact).abs().max() <= 1e-6 * exact[0, 0]
    assert all(torch.equal(totals[0], other) for other in totals[1:])
