"""Packing is exact and checked; a segment's sum does not depend on where the segment lies."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_checks import unpack, validate, validate_cu_seqlens

from bvpo_kernels import PackedBatch, TokenPair, Unit, backends, pack, segment_sum
from bvpo_kernels.oracles.testing import max_error, ulp
from bvpo_kernels.packing import plan_packs
from bvpo_kernels.types import EMPTY, IGNORE_INDEX, TRACE

THREE_KINDS = (TRACE, EMPTY, "marginal")
BACKENDS = ["reference", "eager"]
if backends.INTERPRETED and not backends.MISSING["triton"]:
    BACKENDS.append("triton")

token_ids = st.lists(st.integers(0, 2**40), min_size=1, max_size=6).map(tuple)
token_pairs = st.builds(TokenPair, token_ids, token_ids, token_ids)
units = st.lists(
    st.builds(
        Unit,
        st.text(max_size=3),
        st.dictionaries(
            st.sampled_from(THREE_KINDS), st.lists(token_pairs, min_size=1, max_size=3).map(tuple)
        ),
    ),
    max_size=5,
)


def make_units():
    """Two units with both kinds (the second with two traces), one with the empty kind only."""
    return [
        Unit(
            "a",
            {
                TRACE: (TokenPair((1, 2), (3, 4, 5), (6,)),),
                EMPTY: (TokenPair((1, 2, 9), (3,), (6, 7)),),
            },
        ),
        Unit(
            "b",
            {
                TRACE: (TokenPair((8,), (1,), (2,)), TokenPair((8,), (1, 1), (2, 2))),
                EMPTY: (TokenPair((8, 9), (1,), (2,)),),
            },
        ),
        Unit("c", {EMPTY: (TokenPair((5,), (0,), (4, 4)),)}),
    ]


def cu(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def test_layout_of_one_unit_by_hand():
    batch = pack(make_units()[:1])
    i = IGNORE_INDEX
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 1, 2, 6, 1, 2, 9, 3, 1, 2, 9, 6, 7]
    assert batch.target_T.tolist() == [i, 3, 4, 5, i, i, 6, i, i, i, 3, i, i, i, 6, 7, i]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 12, 17]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.scored_lengths_S.tolist() == [3, 1, 1, 2]
    assert batch.pair_group_P.tolist() == [0, 1]
    assert batch.group_ranges_G2.tolist() == [[0, 8], [8, 17]]
    assert (batch.max_seqlen, batch.num_scored) == (5, 7)
    assert batch.num_tokens == sum(unit.num_tokens for unit in make_units()[:1])


def test_groups_of_several_units_by_hand():
    batch = pack(make_units())
    assert batch.unit_ids == ("a", "b", "c")
    assert batch.pair_group_P.tolist() == [0, 1, 2, 2, 3, 4]
    assert batch.group_unit_G.tolist() == [0, 0, 1, 1, 2]
    assert batch.group_kind_G.tolist() == [0, 1, 0, 1, 1]
    assert batch.pair_kind_P.tolist() == [0, 1, 0, 0, 1, 1]


@settings(deadline=None)
@given(units)
def test_unpack_is_the_inverse_of_pack(given_units):
    batch = pack(given_units, kinds=THREE_KINDS)
    validate(batch)
    assert unpack(batch) == given_units


@settings(deadline=None)
@given(units)
def test_invariants_of_a_pack(given_units):
    """Checked segment by segment, not with the vectorised formulas of `validate`."""
    batch = pack(given_units, kinds=THREE_KINDS)
    bounds, tokens, target = (
        x.tolist() for x in (batch.cu_seqlens, batch.tokens_T, batch.target_T)
    )
    responses = [
        (pair.prompt, response)
        for unit in given_units
        for kind in THREE_KINDS
        for pair in unit.pairs.get(kind, ())
        for response in (pair.chosen, pair.rejected)
    ]
    assert len(responses) == batch.num_segments == 2 * batch.num_pairs
    for s, (prompt, response) in enumerate(responses):
        start, end = bounds[s], bounds[s + 1]
        assert tuple(tokens[start:end]) == prompt + response
        assert batch.position_ids_T[start:end].tolist() == list(range(end - start))
        scored = [t for t in range(start, end) if target[t] != IGNORE_INDEX]
        # The prompt's tokens are never targets, the last prompt token predicts the response, and
        # no target comes from beyond the segment.
        assert scored == list(range(start + len(prompt) - 1, end - 1))
        assert tuple(target[t] for t in scored) == response
        assert batch.scored_lengths_S[s] == len(response)
    ranges = batch.group_ranges_G2.tolist()
    edges = [0] + [end for _, end in ranges]
    assert [start for start, _ in ranges] == edges[:-1]
    assert edges[-1] == batch.num_tokens
    assert batch.max_seqlen == max((len(p) + len(r) for p, r in responses), default=0)


@pytest.mark.parametrize("given_units", [[], [Unit("no pairs", {})], [Unit("none", {TRACE: ()})]])
def test_nothing_to_pack_gives_a_valid_empty_batch(given_units):
    batch = pack(given_units)
    validate(batch)
    assert batch.num_tokens == batch.num_segments == batch.num_pairs == batch.max_seqlen == 0
    assert batch.cu_seqlens.tolist() == [0]
    assert batch.group_ranges_G2.shape == (0, 2)
    assert [unit.unit_id for unit in unpack(batch)] == [unit.unit_id for unit in given_units]


def test_other_ignore_index_and_integer_types():
    ids = torch.tensor([3, 4])
    batch = pack([Unit("a", {TRACE: [TokenPair(ids, ids.numpy(), [5])]})], ignore_index=-1)
    assert batch.target_T.tolist() == [-1, 3, 4, -1, -1, 5, -1]
    validate(batch, ignore_index=-1)
    with pytest.raises(ValueError, match="target_T"):
        validate(batch)


def test_device_is_where_the_tensors_go():
    batch = pack(make_units(), device="meta")
    tensors = [getattr(batch, field.name) for field in dataclasses.fields(PackedBatch)]
    assert all(t.device.type == "meta" for t in tensors if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    ("pair", "error", "words"),
    [
        (TokenPair((), (1,), (2,)), ValueError, ["'u7'", "'trace'", "prompt", "at least one"]),
        (TokenPair((1,), (), (2,)), ValueError, ["'u7'", "'trace'", "chosen", "at least one"]),
        (TokenPair((1,), (2,), ()), ValueError, ["'u7'", "'trace'", "rejected", "at least one"]),
        (TokenPair((1,), (2, -3), (2,)), ValueError, ["'u7'", "'trace'", "chosen", "-3"]),
        (TokenPair((1,), (2,), (1.5,)), TypeError, ["'u7'", "'trace'", "rejected", "float"]),
    ],
)
def test_bad_pairs_are_named(pair, error, words):
    with pytest.raises(error) as raised:
        pack([make_units()[0], Unit("u7", {TRACE: [pair]})])
    assert all(word in str(raised.value) for word in words), raised.value


def test_bad_arguments_of_pack():
    with pytest.raises(ValueError, match=r"'a'.*'trace', 'empty'.*\['marginal'\]"):
        pack([Unit("a", {"marginal": [TokenPair((1,), (2,), (3,))]})])
    with pytest.raises(ValueError, match="kinds: expected distinct"):
        pack([], kinds=(TRACE, TRACE))
    with pytest.raises(ValueError, match="ignore_index: expected a number < 0, got 0"):
        pack([], ignore_index=0)


def changed(tensor, index, value):
    copy = tensor.clone()
    copy[index] = value
    return copy


# field, index, value of the corruption; what the error must name
CORRUPTIONS = [
    ("cu_seqlens", 0, 1, "cu_seqlens: expected the first value to be 0, got 1"),
    ("cu_seqlens", 2, 4, "cu_seqlens: expected values that do not decrease, got a step of -1 at"),
    ("cu_seqlens", -1, 3, "cu_seqlens: "),
    ("cu_seqlens", 1, 6, "max_seqlen: "),
    ("scored_lengths_S", 0, 0, "scored_lengths_S: .*got 0 at flat index 0"),
    ("scored_lengths_S", 3, 5, "scored_lengths_S: .*got 5 at flat index 3"),
    ("scored_lengths_S", 0, 2, "target_T: "),
    ("tokens_T", 1, -1, "tokens_T: expected token ids >= 0, got -1 at flat index 1"),
    ("tokens_T", 3, 77, "target_T: .*got 4 at flat index 2"),
    ("position_ids_T", 5, 5, "position_ids_T: .*got 5 at flat index 5"),
    ("target_T", 4, 1, "target_T: .*got 1 at flat index 4"),
    ("target_T", 0, 2, "target_T: .*got 2 at flat index 0"),
    ("target_T", 2, IGNORE_INDEX, "target_T: .*got -100 at flat index 2"),
    ("pair_group_P", 1, 7, r"pair_group_P: expected values in \[0, 5\), got 7 at flat index 1"),
    ("pair_group_P", 2, 0, "pair_group_P: expected values that do not decrease, got 0"),
    ("pair_group_P", 5, 3, "pair_group_P: expected at least one pair in each group, got 0 at .* 4"),
    ("pair_group_P", 3, 3, "group_ranges_G2: "),
    ("group_ranges_G2", (1, 0), 9, "group_ranges_G2: .*got 9 at flat index 2"),
    ("group_unit_G", 4, 3, r"group_unit_G: expected values in \[0, 3\), got 3"),
    ("group_unit_G", 4, 1, "group_unit_G: expected groups in order"),
    ("group_kind_G", 0, -1, r"group_kind_G: expected values in \[0, 2\), got -1"),
    ("group_kind_G", 0, 1, "group_unit_G: expected groups in order"),
]


@pytest.mark.parametrize(("field", "index", "value", "message"), CORRUPTIONS)
def test_validate_names_what_is_wrong(field, index, value, message):
    batch = pack(make_units())
    validate(batch)
    bad = dataclasses.replace(batch, **{field: changed(getattr(batch, field), index, value)})
    with pytest.raises(ValueError, match=f"^{message}"):
        validate(bad)


def test_validate_checks_shapes_dtypes_and_max_seqlen():
    batch = pack(make_units())
    with pytest.raises(ValueError, match=r"max_seqlen: .*for 4, got segments of up to 5"):
        validate(dataclasses.replace(batch, max_seqlen=4))
    validate(dataclasses.replace(batch, num_scored=None))
    with pytest.raises(ValueError, match=r"num_scored: expected .* for 3, got a sum of"):
        validate(dataclasses.replace(batch, num_scored=3))
    with pytest.raises(TypeError, match=r"target_T: expected torch.int64, got torch.int32"):
        validate(dataclasses.replace(batch, target_T=batch.target_T.int()))
    with pytest.raises(TypeError, match=r"cu_seqlens: expected torch.int32, got torch.int64"):
        validate(dataclasses.replace(batch, cu_seqlens=batch.cu_seqlens.long()))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected shape \[13\], got \[12\]"):
        validate(dataclasses.replace(batch, cu_seqlens=batch.cu_seqlens[:-1]))
    with pytest.raises(ValueError, match="target_T: expected device cpu, got meta"):
        validate(dataclasses.replace(batch, target_T=batch.target_T.to("meta")))


@pytest.mark.parametrize(
    ("bounds", "num_tokens", "error", "message"),
    [
        ([0, 3], 3, TypeError, "expected a Tensor, got list"),
        (torch.tensor([0, 3]), 3, TypeError, "expected int32, got torch.int64"),
        (cu(0, 3)[None], 3, ValueError, r"expected shape \[S \+ 1\], got \(1, 2\)"),
        (cu(), 0, ValueError, r"expected shape \[S \+ 1\], got \(0,\)"),
        (cu(1, 3), 3, ValueError, "expected the first value to be 0, got 1"),
        (cu(0, 2, 1, 3), 3, ValueError, "got a step of -1 at index 2"),
        (cu(0, 2), 3, ValueError, "expected the last value to be the number of tokens, 3, got 2"),
        (cu(0, 4), 3, ValueError, "expected the last value to be the number of tokens, 3, got 4"),
    ],
)
def test_bad_cu_seqlens(bounds, num_tokens, error, message):
    with pytest.raises(error, match=message):
        validate_cu_seqlens(bounds, num_tokens)
    for impl in BACKENDS:
        with pytest.raises(error, match=message):
            segment_sum(torch.ones(num_tokens), bounds, impl=impl)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=40), st.integers(50, 120))
def test_plan_keeps_the_budget_and_every_unit_once(lengths, budget):
    plan = plan_packs(lengths, budget)
    assert sorted(i for members in plan.bins for i in members) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in members) for members in plan.bins]
    assert all(members for members in plan.bins)
    assert max(used, default=0) <= budget
    assert plan.fill == (sum(used) / (len(used) * budget) if used else 1.0)
    # What first fit promises: at most one pack is half empty or more.
    assert sum(2 * u <= budget for u in used) <= 1
    assert plan == plan_packs(lengths, budget)


def test_plan_is_first_fit_decreasing():
    # First fit in the given order would make 5 + 4 + 1, 6 + 3 and 7.
    plan = plan_packs([5, 6, 4, 3, 7, 1], 10)
    assert plan.bins == [[3, 4], [1, 2], [0, 5]]
    assert plan.fill == 26 / 30
    assert plan_packs([2, 2, 2], 4).bins == [[0, 1], [2]]
    assert plan_packs([], 4).bins == []


def test_bad_arguments_of_plan_packs():
    with pytest.raises(ValueError, match="unit 'long' has 11 tokens, more than the budget of 10"):
        plan_packs([1, 11], 10, names=["short", "long"])
    with pytest.raises(ValueError, match="unit 1 has 11 tokens"):
        plan_packs([1, 11], 10)
    with pytest.raises(ValueError, match="unit 0: expected a number >= 0, got -1"):
        plan_packs([-1], 10)
    with pytest.raises(ValueError, match="token_budget: expected a number > 0, got 0"):
        plan_packs([], 0)
    with pytest.raises(ValueError, match="names: expected 2 names, got 1"):
        plan_packs([1, 2], 10, names=["a"])


def mixed(length, dtype=torch.float32):
    """Values from 1e-6 to 1e6 of both signs: the order of additions shows in the last bits."""
    return (torch.randn(length) * 10 ** (12 * torch.rand(length) - 6)).to(dtype)


# 1 and 2: no vector register is full. 8191 to 8193: around the blocks of a vectorised sum. 30000: a
# long trace. 17 and 1023: odd sizes that move what follows off every alignment.
LENGTHS = (1, 2, 17, 1023, 8191, 8192, 8193, 30000)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_is_alone_bitwise(impl, dtype):
    segments = [mixed(length, dtype) for length in LENGTHS]
    alone = torch.cat([segment_sum(s, cu(0, len(s)), impl=impl) for s in segments])
    for shift in range(len(segments)):
        order = [(i + shift) % len(segments) for i in range(len(segments))]
        for before in ([], [5], [0, 3, 0]):
            # Neighbours so large that a difference of running sums would have no digit left.
            parts = [1e25 * mixed(n, dtype) for n in before] + [segments[i] for i in order]
            bounds = cu(0, *torch.tensor([len(p) for p in parts]).cumsum(0).tolist())
            packed = segment_sum(torch.cat(parts), bounds, impl=impl)[len(before) :]
            assert torch.equal(packed, alone[order]), (shift, before)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_is_the_exact_one_rounded_once(impl, dtype):
    """Against math.fsum. Sums that cancel, and sums of -20 000 nats, where bf16 is 128 coarse."""
    noise = torch.randn(3000)
    noise = torch.cat([noise, -noise, torch.tensor([2.0**-9])])
    parts = [noise.to(dtype), -20 * torch.rand(2000).to(dtype), (-torch.rand(30000)).to(dtype)]
    bounds = cu(0, *torch.tensor([len(p) for p in parts]).cumsum(0).tolist())
    sums = segment_sum(torch.cat(parts), bounds, impl=impl)
    assert sums.dtype == torch.float32
    exact = torch.tensor([math.fsum(p.double().tolist()) for p in parts], dtype=torch.float64)
    for got, want in zip(sums, exact, strict=True):
        assert max_error(got, want) <= 0.5001 * ulp(
            2.0 ** math.floor(math.log2(abs(want))), torch.float32
        )


@pytest.mark.parametrize("impl", BACKENDS)
def test_fp64_in_fp64_out(impl):
    value = torch.tensor([1.0, 2.0**-50], dtype=torch.float64)
    total = segment_sum(value, cu(0, 2), impl=impl)
    assert total.dtype == torch.float64
    assert total.item() == 1.0 + 2.0**-50


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0, 0], [0, 0, 3, 3, 3, 5, 5]])
def test_empty_segments_and_no_tokens(impl, bounds):
    values = torch.arange(1.0, bounds[-1] + 1).requires_grad_()
    sums = segment_sum(values, cu(*bounds), impl=impl)
    assert sums.tolist() == [sum(range(a + 1, b + 1)) for a, b in itertools.pairwise(bounds)]
    upstream = torch.arange(10.0, 10 + len(sums))
    sums.backward(upstream)
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    assert torch.equal(values.grad, upstream.repeat_interleave(torch.tensor(lengths).long()))


@pytest.mark.parametrize("impl", BACKENDS)
def test_gradient_is_the_upstream_gradient_exactly(impl):
    values = mixed(101, torch.bfloat16).requires_grad_()
    upstream = torch.randn(3)
    segment_sum(values, cu(0, 50, 50, 101), impl=impl).backward(upstream)
    expected = upstream[[0, 2]].repeat_interleave(torch.tensor([50, 51]))
    assert torch.equal(values.grad, expected.bfloat16())


@pytest.mark.parametrize("impl", BACKENDS)
def test_gradcheck(impl):
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    for bounds in (cu(0, 4, 4, 9), cu(0, 9), cu(0, 0, 1, 9, 9)):
        assert torch.autograd.gradcheck(lambda v, b=bounds: segment_sum(v, b, impl=impl), values)


@pytest.mark.parametrize("impl", BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(impl, dtype):
    values = torch.randn(9, dtype=dtype, requires_grad=True)
    for bounds in (cu(0, 4, 4, 9), cu(0, 0, 9), cu(0, 9)):
        torch.library.opcheck(torch.ops.bvpo.segment_sum, (values, bounds, impl))
        dsums = torch.randn(bounds.shape[0] - 1)
        torch.library.opcheck(torch.ops.bvpo.segment_spread, (dsums, bounds, 9, dtype, impl))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break_and_still_checks(backend):
    compiled = torch.compile(segment_sum, fullgraph=True, backend=backend)
    values = torch.randn(5, requires_grad=True)
    for bounds in (cu(0, 2, 2, 5), cu(0, 1, 4, 5)):
        out, expected = compiled(values, bounds), segment_sum(values, bounds)
        assert torch.equal(out, expected)
        grads = [torch.autograd.grad(x.square().sum(), values)[0] for x in (out, expected)]
        assert torch.equal(*grads)
    with pytest.raises(ValueError, match="got a step of -1 at index 2"):
        compiled(values, cu(0, 3, 2, 5))


def test_bad_arguments_of_segment_sum():
    with pytest.raises(TypeError, match="values: expected a Tensor, got list"):
        segment_sum([1.0], cu(0, 1))
    with pytest.raises(TypeError, match=r"values: expected bf16.*got torch.int64"):
        segment_sum(torch.ones(1).long(), cu(0, 1))
    with pytest.raises(ValueError, match=r"values: expected shape \[T\], got \(1, 1\)"):
        segment_sum(torch.ones(1, 1), cu(0, 1))
    with pytest.raises(ValueError, match="cu_seqlens: expected device cpu, got meta"):
        segment_sum(torch.ones(1), cu(0, 1).to("meta"))
    with pytest.raises(ValueError, match=r"impl: expected 'auto' or one of .*got 'fast'"):
        segment_sum(torch.ones(1), cu(0, 1), impl="fast")
    with pytest.raises(ValueError, match=r"'cpp' cannot serve.*can: \['reference', 'eager'"):
        segment_sum(torch.ones(1), cu(0, 1), impl="cpp")


@pytest.mark.gpu
def test_gpu_checks_and_sums_without_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        values, bounds = torch.ones(5, device="cuda"), torch.zeros(3, device="cuda").int()
        bounds[1:] = torch.full((), 5, device="cuda")
        validate_cu_seqlens(bounds, 5)
        sums = segment_sum(values, bounds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.tolist() == [5.0, 0.0]
