"""What the oracle suite does not reach: the Triton kernels alone, without a GPU interpreted."""

import pytest
import torch
from host_kernels import DEVICE
from logprob_cases import Case, compare, run

from bvpo_kernels import backends
from bvpo_kernels.backends import schedule
from bvpo_kernels.backends.schedule import MAX, finish_rows
from bvpo_kernels.call import Call, Head, Inputs, Kept, Need
from bvpo_kernels.oracles.testing import assert_accurate, max_error

if backends.MISSING["triton"]:
    pytest.skip(backends.MISSING["triton"], allow_module_level=True)

from bvpo_kernels.backends.triton import configs, engine, logprobs, logprobs_gemm, packing
from bvpo_kernels.backends.triton.logprobs import Scored, Upstream

PLAIN = Head(torch.zeros(1, 1))  # no bias, no softcap: the row kernels read nothing else of it


def statistics(state, target_T, weight_VD):
    """logp, lse and entropy from a state [6, rows]."""
    result = finish_rows(Head(weight_VD), target_T, state, entropy=True)
    return result.logprobs_T, result.max_T + result.logsum_T, result.entropy_T


def oracle(z, target_T):
    logp = torch.log_softmax(z.double(), -1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(1, target_T[:, None])[:, 0]
    return chosen, z.double().logsumexp(-1), entropy


def logits(num_rows=70, vocab=701, offset=0.0, scale=3.0):
    """Rows and columns that no block divides; targets in the first, the last and other columns."""
    z = torch.randn(num_rows, vocab, device=DEVICE) * scale + offset
    target_T = torch.randint(vocab, (num_rows,), device=DEVICE)
    target_T[:10:2], target_T[1:10:2] = 0, vocab - 1
    return z, target_T


@pytest.mark.parametrize("widths", [[701], [300, 401], [1, 256, 443, 1]])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_forward_rows_over_any_tiles(widths, offset):
    z, target_T = logits(26, offset=offset)
    state = logprobs.new_state(26, z.device)
    count = torch.tensor([26], dtype=torch.int32, device=DEVICE)
    start = 0
    for width in widths:
        tile = z[:, start : start + width].contiguous()
        logprobs.forward_rows(tile, Scored(target_T, count), state, (0, start), PLAIN, entropy=True)
        start += width
    got = statistics(state, target_T, torch.zeros(701, 1))
    for value, expected in zip(got, oracle(z, target_T), strict=True):
        assert max_error(value, expected) <= 2e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.skipif(not backends.INTERPRETED, reason="configuration of the interpreter")
@pytest.mark.parametrize("vocab", [511, 512, 513])
def test_one_row_per_program(monkeypatch, vocab):
    """As on a GPU: only blocks that are cut off or hold the row's own target drop a column."""
    shapes = configs.CONFIGS["interpreter"]
    alone = shapes._replace(rows=shapes.rows._replace(rows=1))
    monkeypatch.setitem(configs.CONFIGS, "interpreter", alone)
    z, _ = logits(7, vocab=vocab)
    z -= 20.0  # columns behind the end, 0 when read, would weigh more
    target_T = torch.tensor([0, 1, 255, 256, 257, 510, vocab - 1])
    z[torch.arange(7), target_T] += 20.0  # and so would a target that is not left out
    state = logprobs.new_state(7, z.device)
    count = torch.tensor([7], dtype=torch.int32)
    logprobs.forward_rows(z, Scored(target_T, count), state, (0, 0), PLAIN, entropy=True)
    got = statistics(state, target_T, torch.zeros(vocab, 1))
    for value, expected in zip(got, oracle(z, target_T), strict=True):
        assert max_error(value, expected) <= 2e-6 * max(1.0, float(expected.abs().max()))


# Blocks of the interpreter are of 256 columns: two whole ones and a half, and an odd one.
@pytest.mark.parametrize("vocab", [640, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p_and_dz_lie_over_the_products(dtype, vocab):
    """In place in half precision: a block is written over what has been read already."""
    z, target_T = logits(66, vocab=vocab)
    count = torch.tensor([60], dtype=torch.int32, device=DEVICE)
    probabilities = torch.softmax(z.double(), -1)
    one_hot = torch.nn.functional.one_hot(target_T, vocab).bool()

    over, state = z.clone(), logprobs.new_state(66, z.device)
    p = engine.over(over, dtype)
    assert p.data_ptr() == over.data_ptr()
    logprobs.forward_rows(over, Scored(target_T, count), state, (0, 0), PLAIN, p=p)
    expected = torch.exp(z.double() - state[MAX][:, None].double())
    expected = expected.masked_fill(one_hot, 0)
    expected[60:] = 0
    assert max_error(p, expected) <= torch.finfo(dtype).eps

    upstream = torch.randn(66, device=DEVICE)
    upstream[3] = 0.0
    logp, lse = oracle(z, target_T)[:2]
    coefficient = (-torch.expm1(logp)).float() * upstream
    over = z.clone()
    dz = engine.over(over, dtype)
    values = Upstream(upstream, coefficient, torch.zeros_like(upstream), lse.float())
    logprobs.backward_rows(over, dz, Scored(target_T, count), values, (0, 0), PLAIN)
    expected = (one_hot.double() - probabilities) * upstream[:, None].double()
    expected[60:] = 0
    # exp of the difference of numbers near 10 loses their last digit.
    assert max_error(dz, expected) <= torch.finfo(dtype).eps * 3 + 3e-6
    assert dz[60:].abs().sum() == 0
    assert dz[3].abs().sum() == 0


def test_rows_behind_the_count_are_not_read():
    z, target_T = logits(40)
    z[30:] = float("nan")
    target_T[30:] = 10**9
    state = logprobs.new_state(40, z.device)
    count = torch.tensor([130], dtype=torch.int32, device=DEVICE)
    logprobs.forward_rows(z, Scored(target_T, count), state, (100, 0), PLAIN)
    assert not state.isnan().any()
    assert torch.equal(state[:, 30:], logprobs.new_state(10, z.device))
    got = statistics(state[:, :30], target_T[:30], torch.zeros(701, 1))[0]
    assert max_error(got, oracle(z[:30], target_T[:30])[0]) < 5e-6


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("tokens", "dim", "vocab"), [(37, 24, 301), (5, 72, 129), (33, 40, 128)])
def test_fused_forward_on_ragged_tiles(monkeypatch, tma, tokens, dim, vocab):
    """Tails of tokens, vocabulary and hidden size; groups of two token tiles; both ways to load."""
    name = (
        "interpreter" if backends.INTERPRETED else pytest.skip("configuration of the interpreter")
    )
    config = configs.CONFIGS[name]
    shape = config.gemm_fp32._replace(tma=tma)
    monkeypatch.setitem(configs.CONFIGS, name, config._replace(gemm_fp32=shape))
    hidden, weight = torch.randn(tokens, dim), torch.randn(vocab, dim)
    target_T = torch.randint(vocab, (tokens,))
    target_T[0], target_T[-1] = 0, vocab - 1
    state = logprobs.new_state(tokens, hidden.device)
    count = torch.tensor([tokens - 2], dtype=torch.int32)
    logprobs_gemm.fused_forward(
        hidden, Head(weight), Scored(target_T, count), state, 0, entropy=True
    )
    assert torch.equal(state[:, -2:], logprobs.new_state(2, hidden.device))
    scored = slice(0, tokens - 2)
    got = statistics(state[:, scored], target_T[scored], weight)
    expected = oracle((hidden.double() @ weight.double().T)[scored], target_T[scored])
    for value, wanted in zip(got, expected, strict=True):
        assert max_error(value, wanted) <= 5e-6 * max(1.0, float(wanted.abs().max()))


def test_a_refused_workspace_takes_the_fused_forward(monkeypatch):
    calls = []
    fused = logprobs_gemm.fused_forward
    monkeypatch.setattr(
        logprobs_gemm, "fused_forward", lambda *a, **k: (calls.append(1), fused(*a, **k))
    )
    case = Case(40, 16, 1500, ignored=0.0)
    compare(case, "triton", (), workspace_bytes=1 << 14)
    assert calls
    calls.clear()
    compare(case, "triton", ())
    assert not calls
    if backends.INTERPRETED:  # a chip on which it is faster
        faster = configs.CONFIGS["interpreter"]._replace(fused_scores=True)
        monkeypatch.setitem(configs.CONFIGS, "interpreter", faster)
        compare(case, "triton", ())
        assert calls == [1]


@pytest.mark.parametrize("need", [(), ("hidden",), ("hidden", "weight")])
@pytest.mark.parametrize("workspace", [1 << 14, 1 << 24])
def test_products_stop_at_the_bound_on_scored_rows(monkeypatch, need, workspace):
    """Of 100 rows 10 are scored: a bound of 12 leaves 12 / 100 of the multiplications."""
    inputs = Case(100, 16, 700, ignored=0.0).inputs()
    inputs["target"][torch.arange(100) % 10 != 3] = -100
    work = []
    monkeypatch.setattr(engine, "mm", lambda a, b: (work.append(a.numel() * b.shape[1]), a @ b)[1])
    fused = logprobs_gemm.fused_forward
    monkeypatch.setattr(
        logprobs_gemm,
        "fused_forward",
        lambda h, head, *a, **k: (work.append(h.numel() * head.vocab), fused(h, head, *a, **k)),
    )
    run(inputs, "triton", need, workspace_bytes=workspace)
    free = sum(work)
    work.clear()
    compare(Case(), "triton", need, inputs=inputs, workspace_bytes=workspace, max_scored=12)
    assert 0 < sum(work) <= free * 12 / 100


def test_tile_fits_the_workspace():
    for tokens, vocab, workspace in ((8192, 151936, 2**30), (100000, 50257, 2**27), (7, 33, 2**20)):
        tile = engine.fit(tokens, vocab, workspace, 4096 * 6, 4096 * 4)
        used = tile.tokens * (tile.columns * 4 + 4096 * 6) + tile.columns * 4096 * 4
        assert used <= workspace
        assert tile.columns == vocab or tile.columns % engine.COLUMN_STEP == 0
    # One GEMM of useful width even where the workspace is small.
    assert engine.fit(8192, 151936, 2**27, 4096 * 2, 0).columns >= engine.MIN_COLUMNS


def test_near_certain_target_in_one_column_tile():
    """The last tile is one column wide and is the target: nothing else is in it."""
    case = Case(20, 8, 129, scale=2.0)
    inputs = case.inputs()
    inputs["target"][:] = 128
    compare(case, "triton", ("hidden",), inputs=inputs, workspace_bytes=1 << 13)
    compare(case, "triton", (), inputs=inputs, workspace_bytes=1 << 13)


@pytest.mark.parametrize("pattern", ["none", "all", "first", "last", "random"])
def test_compaction(pattern):
    tokens = 2500  # more than two blocks
    scored = {
        "none": torch.zeros(tokens, dtype=torch.bool),
        "all": torch.ones(tokens, dtype=torch.bool),
        "first": torch.arange(tokens) == 0,
        "last": torch.arange(tokens) == tokens - 1,
        "random": torch.rand(tokens) < 0.6,
    }[pattern].to(DEVICE)
    position, index, count = packing.compact(scored)
    expected = scored.nonzero()[:, 0]
    assert count.tolist() == [len(expected)]
    assert torch.equal(index[: len(expected)].long(), expected)
    assert (index[len(expected) :] == -1).all()
    assert torch.equal(position[scored].long(), torch.arange(len(expected), device=DEVICE))


@pytest.mark.parametrize("columns", [1, 33, 1030])
def test_rows_move_there_and_back(columns):
    source = torch.randn(70, columns, device=DEVICE)
    index = torch.full((70,), -1, dtype=torch.int32, device=DEVICE)
    index[:50] = torch.randperm(70)[:50].to(DEVICE, torch.int32)
    gathered = packing.gather_rows(source, index)
    assert torch.equal(gathered[:50].nan_to_num(7.0), source[index[:50].long()].nan_to_num(7.0))
    assert gathered[50:].abs().sum() == 0
    out = torch.zeros(70, columns, dtype=torch.bfloat16, device=DEVICE)
    packing.scatter_rows(gathered, index, out)
    moved = torch.zeros(70, columns, device=DEVICE)
    moved[index[:50].long()] = gathered[:50]
    assert torch.equal(out.nan_to_num(7.0), moved.bfloat16().nan_to_num(7.0))


def test_softcap_bias_and_tiles_of_a_schedule():
    """The whole schedule over the kernels, small tiles in both directions."""
    case = Case(45, 16, 401, bias=True, options={"softcap": 3.0, "temperature": 1.3})
    inputs = {name: tensor.to(DEVICE) for name, tensor in case.inputs().items()}
    given = Inputs(*(inputs[name] for name in ("hidden", "weight", "target", "bias")))
    call = Call(1.3, 3.0, workspace_bytes=1 << 14, need_entropy=True, impl="triton")
    logprobs_T, *kept, entropy_T, unit_TD = schedule.forward(engine.TritonEngine(given, call), True)
    upstream = inputs["upstream"]
    running = engine.TritonEngine(given, call, Kept(logprobs_T, *kept), upstream)
    grads = schedule.backward(running, Need(True, True, True))
    got = {"logprobs": logprobs_T, "entropy": entropy_T, "dhidden": grads.hidden_TD}
    got |= {"dweight": grads.weight_VD, "dbias": grads.bias_V}
    oracle = run(inputs, "reference", dtype=torch.float64, **case.options)
    naive = run(inputs, "reference", **case.options)
    for name, value in got.items():
        assert_accurate(name, value, naive[name], oracle[name])
    assert_accurate("unit", unit_TD * upstream[:, None], naive["dhidden"], oracle["dhidden"])


def test_results_do_not_depend_on_what_memory_held(monkeypatch):
    """Every buffer that a kernel leaves partly unwritten must never be read there."""
    inputs = Case(50, 16, 400, torch.bfloat16).inputs()
    needs = ((), ("hidden",), ("hidden", "weight"))
    clean = [run(inputs, "triton", need, workspace_bytes=1 << 14) for need in needs]
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        poisoned = [run(inputs, "triton", need, workspace_bytes=1 << 14) for need in needs]
    finally:
        torch.use_deterministic_algorithms(False)
    for before, after in zip(clean, poisoned, strict=True):
        for name, value in before.items():
            assert torch.equal(value, after[name]), name


def test_triton_is_never_chosen_on_the_cpu():
    assert backends.choose("auto", lambda name: "") in ("cpp", "eager") or DEVICE == "cuda"
