"""What the C++ backend promises beyond the shared oracle suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logprob_cases import Case, compare, order_of_sums, run

from bvpo_kernels import backends, linear_logprobs
from bvpo_kernels.oracles.testing import max_error

pytestmark = pytest.mark.skipif(bool(backends.MISSING["cpp"]), reason=backends.MISSING["cpp"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def poisoned_memory():
    """Every `empty` is filled with NaN: an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("need", [(), ("hidden",), ("hidden", "weight", "bias"), ("weight",)])
def test_every_output_is_written(poisoned_memory, dtype, need):
    assert torch.empty(3).isnan().all()
    compare(Case(301, 33, 1031, dtype, bias=True), "cpp", need)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("need", [(), ("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("workspace", [None, 1 << 20], ids=["one sweep", "two sweeps"])
def test_bitwise_the_same_for_any_number_of_threads(dtype, need, workspace):
    case = Case(777, 65, 3001, dtype, bias=True)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(case.inputs(), "cpp", need, workspace_bytes=workspace))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


# Sizes around what the kernel rounds to: 16 lanes, 32 of an AMX row, blocks of 32..256 tokens,
# tiles of 256 rows, panels of 512 and 1024.
sizes = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 127, 255, 256, 257, 300])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    num_tokens=sizes,
    dim=sizes,
    vocab=st.sampled_from([1, 2, 3, 255, 256, 257, 511, 512, 513, 1023, 1025, 1281]),
    dtype=st.sampled_from(DTYPES),
    need=st.sampled_from([(), ("hidden",), ("hidden", "weight", "bias"), ("weight",)]),
    bias=st.booleans(),
    options=st.sampled_from([{}, {"softcap": 5.0}, {"temperature": 0.6}]),
    workspace=st.sampled_from([1, 1 << 16, 1 << 27]),
)
def test_ragged_shapes(num_tokens, dim, vocab, dtype, need, bias, options, workspace):
    need = tuple(name for name in need if bias or name != "bias")
    case = Case(num_tokens, dim, vocab, dtype, bias=bias, options=options)
    # Of one token and one column the naive head may be exact by luck: two standard deviations.
    slack = 2 * float(order_of_sums(case.inputs()).max())
    compare(case, "cpp", need, slack=slack, workspace_bytes=workspace)


def test_error_is_a_hundred_times_below_that_of_bf16_logits():
    inputs = Case(33, 896, 20000, torch.bfloat16, scale=4.0).inputs()
    oracle = run(inputs, "reference", (), torch.float64)["logprobs"]
    error = {
        impl: max_error(run(inputs, impl, ())["logprobs"], oracle) for impl in ("cpp", "reference")
    }
    assert error["cpp"] * 100 < error["reference"]


def test_nan_in_the_weight_is_not_swallowed():
    """A broken row of the weight makes every token's log-probability NaN, as in plain torch."""
    inputs = Case(40, 24, 600).inputs()
    inputs["weight"][300] = float("nan")
    for need in ((), ("hidden",)):
        result = run(inputs, "cpp", need)["logprobs"]
        assert result[inputs["target"] != -100].isnan().all()


def test_masked_columns():
    """A bias of -inf takes a column out (padded vocabularies), in value and in gradient."""
    case = Case(50, 24, 400, bias=True, ignored=0.0)
    inputs = case.inputs()
    inputs["target"].clamp_(max=299)
    short = {k: v[:300] if k in ("weight", "bias") else v for k, v in inputs.items()}
    inputs["bias"][300:] = float("-inf")
    masked, expected = run(inputs, "cpp"), run(short, "cpp")
    assert max_error(masked["logprobs"], expected["logprobs"]) < 1e-5
    assert max_error(masked["dhidden"], expected["dhidden"]) < 1e-5
    assert max_error(masked["dweight"][:300], expected["dweight"]) < 1e-5
    assert masked["dweight"][300:].abs().max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("need_weight", [False, True], ids=["scores", "trained"])
def test_memory_does_not_grow_with_tokens(need_weight):
    """Above inputs and gradients at most the workspace + 64 MiB, also at 4 x the tokens; scores
    alone need no more then than before."""
    peaks = []
    for num_tokens in (4096, 16384):
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(num_tokens), str(int(need_weight))],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(float(result.stdout))
        assert peaks[-1] < 64 + 64, num_tokens
    assert need_weight or peaks[1] < peaks[0] + 8


MEASURE = """
import sys, torch
from bvpo_kernels import linear_logprobs
num_tokens, need_weight = map(int, sys.argv[1:])
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) / 1024 for l in lines if l.startswith(key))
hidden = torch.randn(num_tokens, 512).bfloat16()
weight = (torch.randn(5003, 512) * 0.03).bfloat16()
target = torch.randint(5003, (num_tokens,))
def step(tokens):
    h, w = (x.requires_grad_(bool(need_weight)) for x in (hidden[:tokens], weight))
    logprobs = linear_logprobs(h, w, target[:tokens], impl="cpp", workspace_bytes=64 << 20)
    if not need_weight:
        return 0
    grads = torch.autograd.grad(logprobs.sum(), (h, w))
    return sum(g.numel() * g.element_size() for g in grads) / 2**20
step(64)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
gradients = step(num_tokens)
print(status("VmHWM") - before - gradients)
"""


def test_expanded_and_overlapping_hidden():
    """Stride 0 in tokens: one row for all."""
    inputs = Case(20, 24, 100, ignored=0.0).inputs()
    row = inputs["hidden"][:1]
    expanded = linear_logprobs(row.expand(20, 24), inputs["weight"], inputs["target"], impl="cpp")
    copied = linear_logprobs(row.repeat(20, 1), inputs["weight"], inputs["target"], impl="cpp")
    assert torch.equal(expanded, copied)


OLDER_ISA = """
import torch
from logprob_cases import Case, compare
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    compare(Case(70, 65, 600, dtype, bias=True), "cpp")
print(torch.ops.bvpo.cpu_path(torch.bfloat16))
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_onednn_held_to_an_older_instruction_set(isa):
    """brgemm then refuses two-byte operands, whatever the CPU can do."""
    result = subprocess.run(
        [sys.executable, "-c", OLDER_ISA],
        cwd=Path(__file__).parent,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "AMX" not in result.stdout


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_switched_off():
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.ops.bvpo.cpu_path(torch.bfloat16) == "widened to fp32 brgemm"
        compare(Case(70, 65, 600, torch.bfloat16, bias=True), "cpp")
