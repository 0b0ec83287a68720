"""The C++ passes of the gradient statistics against the same operators in fp64."""

import pytest
import torch
from logprob_cases import Case

from bvpo_kernels import backends, ops
from bvpo_kernels.call import Call, Inputs
from bvpo_kernels.oracles.testing import assert_accurate

pytestmark = pytest.mark.skipif(bool(backends.MISSING["cpp"]), reason=backends.MISSING["cpp"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESULTS = ("dhidden", "dweight", "dbias", "record", "kept", "kept_bias", "rows")
# Tokens, cut into groups: one without a scored token, one of a single token, one over many blocks.
GROUPS = [[0, 5], [5, 6], [6, 17], [17, 83], [83, 400]]


def plan(kept: str, exact: bool = True, groups=GROUPS) -> tuple:
    sketch, kinds = {"": (0, 0), "sketch": (7, 0), "kinds": (0, 2)}[kept]
    kind = torch.arange(len(groups)) % 2
    scored = torch.zeros(len(groups), dtype=torch.int64)  # found by `head`
    return torch.tensor(groups), kind, torch.tensor(3), scored, 2, exact, sketch, kinds, 1


def head(
    case: Case, impl: str, plan, *, dtype=None, workspace=1 << 27, rows=True, need_hidden=True
):
    """Results by name; the forward runs in the same dtype, on the reference backend."""
    inputs = case.inputs()
    inputs["target"][5:6] = -100
    hidden, weight = (inputs[name].to(dtype or case.dtype) for name in ("hidden", "weight"))
    bias = inputs["bias"].to(dtype or case.dtype) if case.bias else None
    softcap = case.options.get("softcap")
    call = Call(
        case.options.get("temperature", 1.0),
        softcap,
        workspace_bytes=workspace,
        impl=impl if dtype is None else "eager",
    )
    given = Inputs(hidden, weight, inputs["target"], bias)
    *kept, _, _ = ops.linear_logprobs_forward(*given, *call, False)
    upstream = inputs["upstream"].to(kept[0].dtype)
    ids = torch.tensor([0, 1, 17, case.vocab - 1]) if rows else None
    ranges, kinds, seed, _, *rest = plan
    scored = [int((inputs["target"][start:end] != -100).sum()) for start, end in ranges.tolist()]
    plan = (ranges, kinds, seed, torch.tensor(scored), *rest)
    results = ops.linear_logprobs_statistics(
        upstream, *given, *kept, *call, need_hidden, True, case.bias, ids, *plan
    )
    return dict(zip(RESULTS, results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", ["", "sketch", "kinds"])
@pytest.mark.parametrize(
    ("exact", "bias", "options", "workspace"),
    [
        (True, True, {}, 1 << 27),
        (True, False, {"softcap": 5.0}, 1 << 27),
        (False, True, {"temperature": 0.6}, 1 << 27),
        (False, False, {}, 1 << 16),
        (True, True, {}, 1 << 16),
    ],
)
def test_head(dtype, kept, exact, bias, options, workspace):
    """D and V are no multiples of a block or a panel; 64 KiB forces reloads and a sweep for dH."""
    case = Case(400, 47, 1801, dtype, bias=bias, options=options)
    statistics = plan(kept, exact or kept == "kinds")
    oracle = head(case, "eager", statistics, dtype=torch.float64)
    eager = head(case, "eager", statistics)
    for name, actual in head(case, "cpp", statistics, workspace=workspace).items():
        assert actual.dtype == eager[name].dtype, name
        assert_accurate(name, actual, eager[name].nan_to_num(), oracle[name])


@pytest.mark.skipif(not backends.INTERPRETED, reason="the inputs are on the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.6}])
def test_head_by_triton(dtype, options):
    case = Case(400, 47, 1801, dtype, bias=True, options=options)
    oracle = head(case, "eager", plan("kinds"), dtype=torch.float64)
    eager = head(case, "eager", plan("kinds"))
    for name, actual in head(case, "triton", plan("kinds")).items():
        assert_accurate(name, actual, eager[name].nan_to_num(), oracle[name])


def test_head_without_hidden_and_rows():
    """What is not wanted is empty, and the rest does not depend on it."""
    case = Case(400, 32, 700, torch.float32)
    whole, part = (
        head(case, "cpp", plan("sketch"), rows=wanted, need_hidden=wanted)
        for wanted in (True, False)
    )
    assert part["dhidden"].numel() == part["rows"].numel() == 0
    assert torch.equal(part["dweight"], whole["dweight"])
    assert torch.equal(part["record"], whole["record"])
    torch.testing.assert_close(part["kept"], whole["kept"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", [1 << 27, 1 << 16], ids=["one sweep", "reloads"])
def test_bitwise_the_same_for_any_number_of_threads(dtype, workspace):
    case = Case(400, 65, 2001, dtype, bias=True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        one = head(case, "cpp", plan("sketch"), workspace=workspace)
        tiles, total = torch.randn(5, 301, 77, generator=torch.Generator().manual_seed(1)), []
        total = torch.empty(301, 77, dtype=dtype)
        one["gram"] = torch.ops.bvpo.pair_reduce(tiles.to(dtype), total)
        sums = torch.ops.bvpo.cpu_norm_sums(
            tiles[0], tiles[1], torch.tensor([[0, 130], [130, 301]]), 1e-5, True, True, True
        )
        results.append(one | {"total": total, "weight": sums[0], "bias": sums[1]})
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_no_scored_token():
    case = Case(400, 16, 300, torch.float32, bias=True, ignored=1.1)
    results = head(case, "cpp", plan("kinds"))
    record = results.pop("record")
    assert record[:25].eq(0).all()
    assert record[25:].tolist() == [0, 1]
    for name, value in results.items():
        assert value.numel() > 0, name
        assert value.eq(0).all(), name


def test_memory_does_not_grow_with_the_vocabulary_times_the_groups():
    """Eight groups' gradients of 40 000 x 256 would take 328 MB; one is the result itself."""
    from benchmarks.measure import peak_bytes

    groups = [[50 * g, 50 * g + 50] for g in range(8)]
    case = Case(400, 256, 40_000, torch.bfloat16)
    inputs = case.inputs()
    given = Inputs(inputs["hidden"], inputs["weight"], inputs["target"])
    options = Call(workspace_bytes=1 << 24, impl="cpp")
    kept = ops.linear_logprobs_forward(*given, *options, False)[:7]

    def call():
        results = ops.linear_logprobs_statistics(
            inputs["upstream"],
            *given,
            *kept,
            *options,
            True,
            True,
            False,
            None,
            *plan("", groups=groups),
        )
        return dict(zip(RESULTS, results, strict=True))

    call()
    assert peak_bytes(call) < 64 * 2**20


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 7, 8, 11])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_reduce(groups, dtype):
    """Blocks of four, two and one groups; stretches and lanes that do not come out even."""
    generator = torch.Generator().manual_seed(groups)
    tiles = torch.randn(groups, 83, 51, generator=generator).to(dtype)
    total = torch.empty(83, 51, dtype=dtype)
    gram = torch.ops.bvpo.pair_reduce(tiles, total)
    wide = tiles.double().flatten(1)
    torch.testing.assert_close(gram, wide @ wide.T, rtol=1e-6, atol=1e-6 * wide[0].norm() ** 2)
    assert dtype == torch.float16 or torch.equal(gram, gram.T)
    assert_accurate("total", total, tiles.float().sum(0).to(dtype), tiles.double().sum(0))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_sums(dtype, needs, centered):
    """A norm over heads has more rows than there are tokens: the groups are scaled."""
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(1200, 37, generator=generator).to(dtype) for _ in range(2))
    x += 1  # so that the mean matters
    call = (1e-5, centered, *needs, *plan("kinds"))
    oracle = torch.ops.bvpo.grouped_norm_statistics(dy.double(), x.double(), *call)
    actual = torch.ops.bvpo.grouped_norm_statistics(dy, x, *call)
    for value, expected in zip(actual, oracle, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-3)


def test_errors():
    tiles = torch.randn(2, 4, 5)
    for call, match in (
        (lambda: torch.ops.bvpo.cpu_pair_reduce(tiles, torch.empty(4, 4)), "total: expected"),
        (lambda: torch.ops.bvpo.cpu_pair_reduce(tiles.mT, torch.empty(5, 4)), "tiles: expected"),
        (
            lambda: torch.ops.bvpo.cpu_pair_reduce(tiles, torch.empty(4, 5), torch.ones(3)),
            "weights: expected",
        ),
        (lambda: head(Case(400, 8, 20), "cpp", plan("", groups=[[0, 3], [4, 400]])), "ranges: exp"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
