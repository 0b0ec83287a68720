"""The C++ head that forms its gradients in the forward, for factors that are known beforehand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from logprob_cases import Case
from torch import Tensor

from bvpo_kernels import backends
from bvpo_kernels.backends import cpp
from bvpo_kernels.call import Call, Inputs
from bvpo_kernels.oracles.testing import assert_accurate, max_error, norm_error

pytestmark = pytest.mark.skipif(bool(backends.MISSING["cpp"]), reason=backends.MISSING["cpp"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("logprobs", "unit", "sums", "bias_sums")


def signs(num_tokens: int) -> Tensor:
    """Chosen and rejected tokens, some with a factor of zero."""
    factor_T = torch.ones(num_tokens)
    factor_T[num_tokens // 2 :] = -1
    factor_T[::7] = 0
    return factor_T


def one_pass(
    inputs: dict[str, Tensor],
    factor_T: Tensor,
    chunk_tokens: int = 64,
    hidden: bool = True,
    weight: bool = True,
    bias: bool = True,
    **options,
) -> dict[str, Tensor]:
    """The op on memory that holds NaN beforehand."""
    weight_VD = inputs["weight"]
    sums_VD = torch.full(weight_VD.shape, torch.nan) if weight else None
    bias_sums_V = torch.full(weight_VD.shape[:1], torch.nan) if bias else None
    tensors = Inputs(inputs["hidden"], weight_VD, inputs["target"], inputs.get("bias"))
    unit_TD = torch.full(inputs["hidden"].shape, torch.nan, dtype=weight_VD.dtype)
    into = (unit_TD if hidden else None, sums_VD, bias_sums_V)
    logprobs_T = cpp.pair_gradients(tensors, Call(**options), factor_T, chunk_tokens, into)
    return dict(zip(NAMES, (logprobs_T, *into), strict=True))


def naive(
    inputs: dict[str, Tensor],
    factor_T: Tensor,
    dtype: torch.dtype | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """logsumexp of all logits and autograd, in `dtype` or that of the inputs."""
    names = [name for name in ("hidden", "weight", "bias") if name in inputs]
    leaves = {name: inputs[name].to(dtype or inputs[name].dtype, copy=True) for name in names}
    if "bias" not in leaves:
        leaves["bias"] = torch.zeros_like(leaves["weight"][:, 0])
    for leaf in leaves.values():
        leaf.requires_grad_()
    z = leaves["hidden"] @ leaves["weight"].T + leaves["bias"]
    z = z if z.dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    target_T = inputs["target"]
    own_T = z.gather(1, target_T.clamp_min(0)[:, None])[:, 0]
    logprobs_T = (own_T - z.logsumexp(1)).where(target_T != -100, 0)
    (logprobs_T * factor_T.to(z.dtype)).sum().backward()
    grads = (leaves[name].grad for name in ("hidden", "weight", "bias"))
    return dict(zip(NAMES, (logprobs_T.detach(), *grads), strict=True))


def compare(
    case: Case, factor_T: Tensor | None = None, inputs=None, **options
) -> dict[str, Tensor]:
    """Assert that everything wanted is as accurate as naive code in the same dtype."""
    inputs = inputs or case.inputs()
    factor_T = signs(case.num_tokens) if factor_T is None else factor_T
    oracle = naive(inputs, factor_T, torch.float64, **case.options)
    eager = naive(inputs, factor_T, **case.options)
    actual = one_pass(inputs, factor_T, **options, **case.options)
    for name, value in actual.items():
        if value is not None and value.numel():
            assert value.dtype == (case.dtype if name == "unit" else torch.float32), name
            assert_accurate(name, value, eager[name], oracle[name])
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(300, 33, 1031), (1, 24, 301), (37, 40, 5), (17, 31, 1), (70, 64, 256), (5, 32, 2305)],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_equals_autograd_of_all_logits(dtype, sizes, bias):
    """Ragged blocks, tiles, panels and chunks; every third token is ignored."""
    compare(Case(*sizes, dtype, bias=bias, ignored=1 / 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"softcap": 3.0}, {"softcap": 30.0}])
def test_temperature_and_softcap(dtype, options):
    options = {"temperature": 1.3} | options
    compare(Case(150, 33, 700, dtype, bias=True, scale=4.0, options=options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_tokens", [1, 64, 200, 10_000])
def test_any_length_of_a_chunk(dtype, chunk_tokens):
    compare(Case(300, 33, 601, dtype, bias=True), chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_any_value(dtype):
    """Means over two completions of unequal length, and numbers of no meaning."""
    case = Case(120, 33, 400, dtype, bias=True)
    mean_T = torch.full((120,), 1 / 37)
    mean_T[37:] = -1 / 83
    compare(case, mean_T)
    compare(case, torch.randn(120, generator=torch.Generator().manual_seed(3)) * 100)
    nothing = one_pass(case.inputs(), torch.zeros(120))
    assert all(not nothing[name].any() for name in NAMES[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_certain_targets(dtype):
    """1 - p_y far below one ulp of p_y keeps its digits."""
    case = Case(64, 32, 300, dtype, ignored=0.0)
    inputs = case.inputs()
    rows_T = inputs["weight"][inputs["target"]].float()
    gain = torch.linspace(8, 40, 64)[:, None]
    inputs["hidden"] = (gain * rows_T / rows_T.square().sum(1, keepdim=True)).to(dtype)
    oracle = naive(inputs, signs(64), torch.float64)
    actual = one_pass(inputs, signs(64))
    assert oracle["logprobs"].max() > -1e-5
    assert norm_error(actual["logprobs"], oracle["logprobs"]) < 1e-4
    certain = oracle["logprobs"] > -1e-3
    assert certain.sum() > 16
    assert ((actual["logprobs"] / oracle["logprobs"])[certain] - 1).abs().max() < 1e-3
    unit_TD, expected_TD = actual["unit"].double()[certain], oracle["unit"][certain]
    bound = 2e-2 if dtype != torch.float32 else 1e-3
    if dtype != torch.float16:  # whose smallest numbers are too large
        error_T = (unit_TD - expected_TD).norm(dim=1) / expected_TD.norm(dim=1).clamp_min(1e-300)
        assert error_T[expected_TD.norm(dim=1) > 1e-12].max() < bound


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_all_logits(offset):
    case = Case(90, 24, 301, bias=True, offset=offset)
    compare(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_rows(dtype):
    """Rows of a wider tensor, every second one: the outputs have strides of their own."""
    case = Case(150, 33, 500, dtype)
    inputs = case.inputs()
    wide = torch.full((300, 50), torch.nan, dtype=dtype)
    view_TD = wide[::2, 10:43]
    view_TD.copy_(inputs["hidden"])
    expected = one_pass(inputs, signs(150))
    actual = one_pass(inputs | {"hidden": view_TD}, signs(150))
    assert not view_TD.is_contiguous()
    for name in NAMES:
        assert torch.equal(actual[name], expected[name]), name
    assert not actual["sums"].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("left_out", NAMES[1:])
def test_what_is_not_wanted_changes_nothing(dtype, options, left_out):
    inputs = Case(150, 33, 1100, dtype, bias=True).inputs()
    need = {"unit": "hidden", "sums": "weight", "bias_sums": "bias"}[left_out]
    expected = one_pass(inputs, signs(150), **options)
    actual = one_pass(inputs, signs(150), **{need: False}, **options)
    left = actual.pop(left_out)
    assert left is None or left.numel() == 0
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignored", [0.3, 1.0], ids=["some", "all"])
def test_ignored_rows_are_zero(dtype, ignored):
    case = Case(130, 33, 301, dtype, bias=True, ignored=ignored)
    inputs = case.inputs()
    ignored_T = inputs["target"] == -100
    inputs["hidden"][ignored_T] = torch.nan
    actual = one_pass(inputs, torch.ones(130))
    assert not actual["logprobs"][ignored_T].any()
    assert not actual["unit"][ignored_T].any()
    if ignored == 1.0:
        assert not any(value.any() for value in actual.values())
    else:
        inputs["hidden"][ignored_T] = 0
        compare(case, torch.ones(130), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_for_any_number_of_threads(dtype):
    inputs = Case(777, 65, 3001, dtype, bias=True).inputs()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(one_pass(inputs, signs(777), 256, softcap=8.0))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name in NAMES:
            assert torch.equal(other[name], results[0][name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(300, 64, 64, 2100), (300, 512, 64, 2100), (1100, 512, 72, 600)])
def test_logprobs_are_those_of_the_scores(dtype, sizes):
    """Bit for bit: a reference's log-probabilities and the policy's cancel at the same weights."""
    num_tokens, chunk_tokens, dim, vocab = sizes
    inputs = Case(num_tokens, dim, vocab, dtype, bias=True).inputs()
    tensors = [inputs[name] for name in ("hidden", "weight", "target", "bias")]
    scores = torch.ops.bvpo.cpu_linear_logprobs_forward(
        *tensors, 0.9, 20.0, -100, 2**27, False, False
    )
    actual = one_pass(inputs, signs(num_tokens), chunk_tokens, temperature=0.9, softcap=20.0)
    assert torch.equal(actual["logprobs"], scores[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_recomputing_backward(dtype):
    """Up to the order of additions: the sums have what its rounding of dW takes away."""
    inputs = Case(600, 64, 1500, dtype, ignored=0.1).inputs()
    factor_T = signs(600)
    tensors = [inputs["hidden"], inputs["weight"], inputs["target"], None]
    options = (1.0, None, -100, 2**27)
    kept = torch.ops.bvpo.cpu_linear_logprobs_forward(*tensors, *options, False, False)[:3]
    dhidden, dweight, _ = torch.ops.bvpo.cpu_linear_logprobs_backward(
        factor_T, *tensors, *kept, *options, True, True, False
    )
    actual = one_pass(inputs, factor_T, 128)
    ulp = torch.finfo(dtype).eps
    assert norm_error(actual["unit"], dhidden) <= ulp * float(dhidden.double().norm())
    assert norm_error(actual["sums"], dweight) <= ulp * float(dweight.double().norm())
    if dtype != torch.float32:
        rounded = max_error(actual["sums"].to(dtype), actual["sums"])
        assert rounded > 1e-4 * float(actual["sums"].abs().max())


OLDER_ISA = """
import torch
from logprob_cases import Case
from test_pair_gradients_cpp import compare
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    compare(Case(70, 65, 600, dtype, bias=True))
"""


def test_onednn_held_to_an_older_instruction_set():
    """Two-byte operands are widened to fp32 then, the weight tile by tile."""
    result = subprocess.run(
        [sys.executable, "-c", OLDER_ISA],
        cwd=Path(__file__).parent,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_wrong_arguments_are_refused():
    inputs = Case(8, 16, 20).inputs()
    tensors = [inputs[name] for name in ("hidden", "weight", "target")]

    def call(factor_T=None, chunk_tokens=64, unit=None, sums=None, bias_sums=None):
        factor_T = torch.ones(8) if factor_T is None else factor_T
        torch.ops.bvpo.cpu_pair_gradients(
            *tensors, None, factor_T, 1.0, None, -100, chunk_tokens, unit, sums, bias_sums
        )

    for wrong, message in [
        ({"factor_T": torch.ones(7)}, "factor"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"sums": torch.zeros(20, 16).bfloat16()}, "sums: contiguous Float"),
        ({"sums": torch.zeros(16, 20).T}, "sums: contiguous Float"),
        ({"unit": torch.zeros(8, 15)}, "unit: contiguous Float"),
        ({"bias_sums": torch.zeros(19)}, "bias_sums: contiguous Float"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)
