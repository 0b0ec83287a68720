"""`bvpo::pair_reduce`: one contract, held by every backend (Triton's interpreted, CUDA's compiled
for the host where there is no GPU)."""

import pytest
import torch
from host_kernels import DEVICE, cuda_kernels

from bvpo_kernels import backends
from bvpo_kernels.oracles.testing import assert_accurate

IMPLS = ("eager", "cpp", "triton", "cuda")


def reduce_with(impl):
    """The operator's arguments but `impl`, on a backend that may run on the host only."""
    if impl == "cuda" and DEVICE == "cpu":
        return cuda_kernels().pair_reduce
    if backends.MISSING[impl]:
        pytest.skip(backends.MISSING[impl])
    return lambda *arguments: torch.ops.bvpo.pair_reduce(*arguments, impl)


def case(count, shape, tiles_dtype, total_dtype):
    device = DEVICE
    tiles = torch.randn(count, *shape, device=device).to(tiles_dtype)
    return tiles, torch.randn(shape, device=device).to(total_dtype)


def expected(tiles, total, weights, add, dtype):
    """Sum and Gram matrix, formed in `dtype`."""
    wide = tiles.to(dtype)
    weighted = wide if weights is None else weights.to(dtype)[:, None, None] * wide
    summed = weighted.sum(0) + (total.to(dtype) if add else 0)
    flat = wide.flatten(1)
    return summed, flat @ flat.T


# One and two stretches of fp32 partials, ragged; a second tile that does not start at 16 bytes.
CASES = [(2, (3, 5)), (2, (300, 437)), (2, (256, 256)), (2, (0, 8))]
CASES += [(1, (9, 7)), (3, (70, 61)), (20, (5, 3))]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("count", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "weights, added"])
def test_sum_and_inner_products(impl, count, shape, dtype, mixed):
    if (impl == "cuda" and count != 2) or (impl == "cpp" and (mixed or DEVICE == "cuda")):
        pytest.skip("refused: test_a_backend_that_cannot_serve_says_so")
    reduce = reduce_with(impl)
    tiles, start = case(count, shape, torch.float32, dtype)
    weights = torch.rand(count, device=DEVICE) if mixed else None
    total = start.clone() if mixed else torch.full_like(start, float("nan"))
    gram = reduce(tiles, total, weights, mixed)
    assert gram.shape == (count, count)
    assert gram.dtype == torch.float64
    assert impl == "eager" or torch.equal(gram, gram.T)
    oracle, exact = expected(tiles, start, weights, mixed, torch.float64)
    naive = expected(tiles, start, weights, mixed, torch.float32)[0].to(dtype)
    torch.testing.assert_close(gram, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().amax()))
    assert total.dtype == dtype
    if start.numel():
        assert_accurate(f"{impl} total", total, naive, oracle)
    again = torch.zeros_like(total) if mixed else torch.empty_like(total)
    assert torch.equal(reduce(tiles, again, weights, mixed), gram)


@pytest.mark.parametrize("impl", ["eager", "cpp", "triton"])
@pytest.mark.parametrize("count", [2, 3])
def test_tiles_in_half_precision(impl, count):
    tiles, total = case(count, (40, 33), torch.bfloat16, torch.bfloat16)
    gram = reduce_with(impl)(tiles, total, None, False)
    oracle, exact = expected(tiles, total, None, False, torch.float64)
    torch.testing.assert_close(gram, exact, rtol=1e-6, atol=1e-3)
    naive = expected(tiles, total, None, False, torch.float32)[0].bfloat16()
    assert_accurate("total", total, naive, oracle)


def test_fp64_stays_fp64():
    tiles, total = case(3, (5, 7), torch.float64, torch.float64)
    weights = torch.rand(3, device=DEVICE)
    gram = torch.ops.bvpo.pair_reduce(tiles, total, weights)
    oracle, exact = expected(tiles, total, weights, False, torch.float64)
    torch.testing.assert_close(gram, exact, rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(total, oracle, rtol=1e-14, atol=1e-14)


def test_a_backend_that_cannot_serve_says_so():
    tiles, total = case(2, (4, 6), torch.float32, torch.float32)
    weights = torch.ones(2, device=DEVICE)
    for impl, arguments, message in (
        ("cpp", (tiles, total, weights), "without weights"),
        ("reference", (tiles, total), "it has no pair_reduce"),
        ("triton", (tiles.double(), total), "got torch.float64"),
        ("triton", (tiles.new_zeros(65, 1, 1), total[:1, :1].clone()), "at most 64 tiles, got 65"),
    ):
        padded = (*arguments, *(None, False)[len(arguments) - 2 :])
        if backends.MISSING[impl]:
            continue
        with pytest.raises(ValueError, match=message):
            torch.ops.bvpo.pair_reduce(*padded, impl)


@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tiles", lambda tiles, total, weights: (tiles.mT, total.mT.contiguous(), weights)),
        ("total", lambda tiles, total, weights: (tiles, total.mT.contiguous().mT, weights)),
        ("total", lambda tiles, total, weights: (tiles, total[:2], weights)),
        ("weights", lambda tiles, total, weights: (tiles, total, weights.double())),
    ],
)
def test_errors_name_the_argument(impl, name, change):
    tiles, total = case(2, (4, 6), torch.float32, torch.float32)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        reduce_with(impl)(*change(tiles, total, torch.ones(2, device=DEVICE)), False)
