"""`bvpo::pair_reduce`: one contract, held by every backend (Triton's interpreted, CUDA's compiled
for the host where there is no GPU)."""

import pytest
import torch
from host_kernels import DEVICE, cuda_kernels

from bvpo_kernels import backends
from bvpo_kernels.oracles.testing import assert_accurate

IMPLS = ("eager", "cpp", "triton", "cuda")


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    """Interpreted, a step takes as long whatever its size: two to a stretch."""
    if backends.INTERPRETED:
        from bvpo_kernels.backends.triton import grad_stats

        monkeypatch.setattr(grad_stats, "_SMALL_TILE", 2048)
        monkeypatch.setattr(grad_stats, "_GRAM_BLOCK", 1024)
        small = dict.fromkeys(range(3, grad_stats.FUSED + 1), 1024)
        monkeypatch.setattr(grad_stats, "_BLOCKS", grad_stats._BLOCKS | small)


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
# 2867 elements are two stretches of more than two tiles; 9 and 10 tiles are two blocks of 8.
CASES += [(1, (300, 437)), (1, (9, 7)), (20, (5, 3)), (10, (0, 8))]
CASES += [(count, (47, 61)) for count in (*range(3, 9), 10)]


def signed(count):
    """Weights of both signs, one of them 0."""
    return torch.tensor([(-1) ** k * (0.3 + k) * (k != 2) for k in range(count)], device=DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("count", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "weights, added"])
def test_sum_and_inner_products(impl, count, shape, dtype, mixed):
    if (impl == "cuda" and count != 2) or (impl == "cpp" and DEVICE == "cuda"):
        pytest.skip("refused: test_a_backend_that_cannot_serve_says_so")
    reduce = reduce_with(impl)
    tiles, start = case(count, shape, torch.float32, dtype)
    weights = signed(count) if mixed else None
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
@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True], ids=["half total", "fp32 total"])
def test_tiles_in_half_precision(impl, count, dtype, wide):
    if impl == "cpp" and dtype == torch.float16:
        pytest.skip("refused: test_a_backend_that_cannot_serve_says_so")
    tiles, total = case(count, (40, 33), dtype, torch.float32 if wide else dtype)
    start, weights = total.clone(), signed(count)
    gram = reduce_with(impl)(tiles, total, weights, True)
    oracle, exact = expected(tiles, start, weights, True, torch.float64)
    torch.testing.assert_close(gram, exact, rtol=1e-6, atol=1e-3)
    naive = expected(tiles, start, weights, True, torch.float32)[0].to(total.dtype)
    assert_accurate("total", total, naive, oracle)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "weights, added"])
def test_the_total_may_be_the_first_tile(impl, count, dtype, mixed):
    """Over two stretches: same bits as into memory of its own, inner products of what was there."""
    compiled_for_host = impl == "cuda" and DEVICE == "cpu"  # fp32 tiles only
    if compiled_for_host and dtype == torch.bfloat16:
        pytest.skip("the CUDA kernels compiled for the host take tiles in fp32")
    if (impl == "cuda" and count != 2) or (impl == "cpp" and DEVICE == "cuda"):
        pytest.skip("refused: test_a_backend_that_cannot_serve_says_so")
    reduce, weights = reduce_with(impl), signed(count) if mixed else None
    tiles, _ = case(count, (257, 263) if count <= 2 else (47, 61), dtype, dtype)
    apart = tiles[0].clone()
    gram = reduce(tiles.clone(), apart, weights, mixed)
    assert torch.equal(reduce(tiles, tiles[0], weights, mixed), gram)
    assert torch.equal(tiles[0], apart)


@pytest.mark.parametrize("count", [1, 2, 4, 11])
def test_results_do_not_depend_on_what_memory_held(monkeypatch, count):
    tiles, total = case(count, (47, 61), torch.float32, torch.float32)
    clean = reduce_with("triton")(tiles, total, None, False)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        poisoned = reduce_with("triton")(tiles, total, None, False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(clean, poisoned)


def test_fp64_stays_fp64():
    tiles, total = case(3, (5, 7), torch.float64, torch.float64)
    weights = torch.rand(3, device=DEVICE)
    gram = torch.ops.bvpo.pair_reduce(tiles, total, weights)
    oracle, exact = expected(tiles, total, weights, False, torch.float64)
    torch.testing.assert_close(gram, exact, rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(total, oracle, rtol=1e-14, atol=1e-14)


def test_a_backend_that_cannot_serve_says_so():
    tiles, total = case(2, (4, 6), torch.float32, torch.float32)
    for impl, arguments, message in (
        ("cpp", (tiles.half(), total), "fp32 and bf16"),
        ("cuda", (tiles[:1], total), "two tiles|CUDA tensors"),
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
